"""Judges the samples of a run while it is drawn, and says which problems stay open.

The grading is that of ``thinkfast-eval score`` (`lm_eval_tasks.verdicts.Judge`), the decision that
of `lm_eval_tasks.stopping`. `lm_eval_tasks.sampling.waves` asks it problem by problem.
"""

from collections import defaultdict
from pathlib import Path
from types import TracebackType

from lm_eval_tasks.answers import Extracted
from lm_eval_tasks.errors import stop
from lm_eval_tasks.provenance import record_grading
from lm_eval_tasks.stopping import StopRule
from lm_eval_tasks.verdicts import Judge


class VoteJury:
    """A `lm_eval_tasks.sampling.waves.Jury`; use it in a ``with`` statement."""

    def __init__(self, folder: Path, rule: StopRule, cap: int, command: str | None) -> None:
        """See the class.

        Args:
            folder: the run folder.
            rule: of the run.
            cap: most samples of a problem.
            command: the command line, for grading.jsonl.

        Raises:
            InputError: as for `lm_eval_tasks.verdicts.Judge`.
        """
        self._judge = Judge(folder)
        self._rule = rule
        self._cap = cap
        self._command = command
        self._waiting: dict[str, list[tuple[int, Extracted]]] = defaultdict(list)
        self._is_recorded = False

    def __enter__(self) -> "VoteJury":
        """Judge what is stored; samples of a killed session may lack their verdicts.

        Raises:
            InputError: as for `lm_eval_tasks.verdicts.score_run`.
        """
        self._judge.__enter__()
        try:
            self._judge.catch_up(self._command)
        except (ImportError, RuntimeError) as error:
            self._judge.__exit__(None, None, None)
            stop(f"{error}; samples that are stored cannot be judged: mend that, then go on")
        except BaseException:
            self._judge.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._judge.__exit__(kind, error, trace)

    def keep(self, problem_id: str, index: int, text: str) -> None:
        """Take a finished sample; of its text only the answer is kept."""
        self._waiting[problem_id].append((index, self._judge.extract(text)))

    def is_open(self, problem_id: str, num_drawn: int) -> bool:
        """Judge the samples taken of a problem and look at its vote; see the protocol.

        Raises:
            InputError: the disk is full, or answers cannot be compared.
        """
        samples = self._waiting.pop(problem_id, [])
        try:
            if samples and not self._is_recorded:
                record_grading(self._judge.folder, self._command, None)
                self._is_recorded = True
            self._judge.store.sync_samples()
            self._judge.judge(problem_id, samples)
        except (ImportError, RuntimeError) as error:
            stop(
                f"{error}; the samples of {problem_id} are stored and cannot be judged: mend that, "
                "then run the same command again"
            )
        return self._rule.end(self._judge.votes(problem_id), num_drawn, self._cap) is None
