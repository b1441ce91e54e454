"""Samples as the estimators need them: when they ended, what they cost, how they were judged.

Reads a run folder after ``thinkfast-eval score`` (and ``reward``, if a score is wanted). Texts,
models and data sets are not needed any more.
"""

import dataclasses
import hashlib
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval_tasks.costs import Occupancy, overlap_costs
from lm_eval_tasks.errors import stop
from lm_eval_tasks.rewards.aggregation import AGGREGATIONS
from lm_eval_tasks.rewards.scores import ScoreRecord, read_scores
from lm_eval_tasks.samples import SampleRecord, SampleStore
from lm_eval_tasks.scoring import grading_of
from lm_eval_tasks.stopping import StopRule
from lm_eval_tasks.verdicts import read_classes, read_verdicts


@dataclass(frozen=True, slots=True)
class ScoredSample:
    """One judged sample."""

    finish_s: float
    """Seconds from the start of the clock until it was finished. Regime "saturated": one clock for
    the run, the sessions of a resumed run one after another without their start-ups. Regime
    "latency": the problem's clock, from its first submission."""
    cost_s: float
    """Its share of the server's time in seconds; see `lm_eval_tasks.costs`."""
    answer_class: int | None
    """Answers of a problem that count as equal share a number; None: no answer, no vote."""
    correct: bool
    score: float | None
    """Aggregated reward in [0, 1]; None: no reward was asked for, or the solution has none."""
    num_tokens: int
    """Generated tokens."""
    is_truncated: bool
    """Cut at the token limit."""
    sample_index: int = 0
    reward_s: float | None = None
    """The reward model's seconds on this sample; None where it did not read it."""
    reward_tokens: int | None = None
    """Tokens that the reward model read; None where that is not known."""
    measured_reward_s: float | None = None
    """The measured seconds, where ``reward_s`` is a price per token (`lm_eval_tasks.analysis`)."""


@dataclass(frozen=True)
class Unfinished:
    """What is used of a run that is not finished: the sample indices that every problem has.

    What is stored of such a run is what finished first, short texts, which are right more often.
    Which samples have a low index has nothing to do with how long they are.
    """

    num_wanted: int
    """Samples that every problem shall have."""
    num_used: int
    """Samples of every problem that are used, from index 0 on without a gap; at least 1."""
    num_problems: int
    num_short: int
    """Problems that lack some of the wanted samples."""
    num_stored: int

    @property
    def sentence(self) -> str:
        """What a reader must know, without the run's name."""
        return (
            f"{self.num_short} of {self.num_problems} problems lack some of their "
            f"{self.num_wanted} samples; used are the first {self.num_used} of each problem, which "
            f"all have ({self.num_used * self.num_problems} of {self.num_stored} stored samples)"
        )


@dataclass(frozen=True)
class ScoredRun:
    """A run folder's samples, as they were judged and as they were stored."""

    samples: dict[str, list[ScoredSample]]
    """Problem id to samples in the order of their indices; the problems in data set order. A
    problem without samples has an empty list."""
    records: list[SampleRecord]
    """All stored samples in the order in which they were stored, their texts left out (empty);
    of an unfinished run more than ``samples``."""
    costs: dict[tuple[str, int], float]
    """Server seconds of each of ``records``, by problem and index."""
    num_distinct_texts: int
    """Different texts, those of different problems counted apart."""
    occupancy: Occupancy
    unfinished: Unfinished | None = None
    """None: every problem has all its samples, or as many as its early stop left it."""


def refuse_early_stops(folder: Path | str, config: Mapping[str, Any]) -> None:
    """Refuse a run whose estimates would be biased by early stops.

    Args:
        folder: the run folder, for the message.
        config: its config.json.

    Raises:
        InputError: it was drawn with early stops.
    """
    if StopRule.of(config) is not None:
        stop(
            f"{folder} was drawn with early stops (--stop-error {config['stop_error']:g}): how "
            "many samples a problem has depends on their answers, so pass@k and all estimates over "
            "subsets, rewards and seconds would be biased; see what it gives with thinkfast-eval "
            f"adaptive {folder}, or draw a run without --stop-error"
        )


def load_scored(
    folder: Path | str, reward: str | None = None, aggregation: str = "last"
) -> dict[str, list[ScoredSample]]:
    """Return `ScoredRun.samples` alone; arguments and errors as of `load_scored_run`."""
    return load_scored_run(folder, reward, aggregation).samples


def load_scored_run(
    folder: Path | str,
    reward: str | None = None,
    aggregation: str = "last",
    with_early_stops: bool = False,
    whole: bool = False,
) -> ScoredRun:
    """Return the judged samples of a run, and how they used the server.

    Of an unfinished run only the samples that `Unfinished` describes are returned.

    Args:
        folder: the run folder.
        reward: name of a reward whose scores the folder holds; None leaves ``score`` empty.
        aggregation: how step scores become the score of a solution.
        with_early_stops: the caller knows what to do with problems whose number of samples depends
            on their answers. Estimates over subsets, orders and seconds are biased for these.
        whole: return all samples of an unfinished run; the caller refuses it.

    Raises:
        InputError: the run has early stops and the caller does not know of them, it is unfinished
            and no sample index is there for every problem, a file is malformed, samples lack their
            verdict or their reward score (the message names the command that makes them), or
            ``aggregation`` is unknown.
    """
    if aggregation not in AGGREGATIONS:
        stop(f"aggregation {aggregation!r}: accepted are {', '.join(AGGREGATIONS)}")
    store = SampleStore(folder)
    config = store.config()
    if not with_early_stops:
        refuse_early_stops(folder, config)
    version = grading_of(config["task"]).version_of(config["task_version"])
    records, texts = [], set()
    for record in store.records():
        # At 500 problems x 256 samples the texts are most of the memory, and only counted.
        text = record.text.encode("utf-8", "surrogatepass")
        texts.add((record.problem_id, hashlib.blake2b(text, digest_size=16).digest()))
        records.append(dataclasses.replace(record, text=""))
    by_problem: dict[str, list[SampleRecord]] = {p.problem_id: [] for p in store.problems()}
    for record in records:
        by_problem[record.problem_id].append(record)
    unfinished = None
    if not whole and StopRule.of(config) is None:
        unfinished = _unfinished(folder, config.get("num_samples"), by_problem)
    if unfinished is not None:
        used = unfinished.num_used
        by_problem = {
            name: [record for record in drawn if record.sample_index < used]
            for name, drawn in by_problem.items()
        }
    needed = [record for drawn in by_problem.values() for record in drawn]
    verdicts = {v.key: v for v in read_verdicts(folder) if v.task_version == version}
    missing = sum(record.key not in verdicts for record in needed)
    if missing:
        stop(
            f"{folder}: {missing} of {len(needed)} samples have no verdict of version {version}; "
            f"run thinkfast-eval score {folder}"
        )
    scores: dict[tuple[str, int], ScoreRecord] = {}
    if reward is not None:
        scores = {score.key: score for score in read_scores(folder, reward)}
        missing = sum(record.key not in scores for record in needed)
        if missing:
            stop(
                f"{folder}: {missing} of {len(needed)} samples are not scored by {reward}; run "
                f"thinkfast-eval reward {folder} with that reward again, it resumes"
            )
    classes = {name: row.class_of() for name, row in read_classes(folder, version).items()}
    finished = finish_times(records, config["regime"])
    costs, occupancy = overlap_costs(records, config["regime"])
    samples: dict[str, list[ScoredSample]] = {}
    for name, drawn in by_problem.items():
        samples[name] = []
        for record in sorted(drawn, key=lambda record: record.sample_index):
            verdict, score = verdicts[record.key], scores.get(record.key)
            number = None
            if verdict.answer is not None:
                number = classes.get(name, {}).get(verdict.answer)
                if number is None:
                    stop(
                        f"{folder}: the answers of {name} are not grouped completely; run "
                        f"thinkfast-eval score {folder}"
                    )
            samples[name].append(
                ScoredSample(
                    finish_s=finished[record.key],
                    cost_s=costs[record.key],
                    answer_class=number,
                    correct=verdict.correct,
                    score=score.score(aggregation) if score else None,
                    num_tokens=record.num_tokens,
                    is_truncated=record.is_truncated,
                    sample_index=record.sample_index,
                    reward_s=score.seconds if score else None,
                    reward_tokens=score.num_tokens if score else None,
                )
            )
    return ScoredRun(samples, records, costs, len(texts), occupancy, unfinished)


def _unfinished(
    folder: Path | str, wanted: int | None, by_problem: Mapping[str, Sequence[SampleRecord]]
) -> Unfinished | None:
    """Return what can be used of an unfinished run; None where every problem has its samples.

    Raises:
        InputError: no sample index is there for every problem.
    """
    have = {name: {r.sample_index for r in drawn} for name, drawn in by_problem.items()}
    if wanted is None:  # a folder that another program wrote
        wanted = max((max(indices, default=0) + 1 for indices in have.values()), default=1)
    short = [name for name, indices in have.items() if not indices.issuperset(range(wanted))]
    if not short:
        return None
    used = min(next(i for i in range(wanted) if i not in have[name]) for name in short)
    if not used:
        empty = [name for name in short if not have[name]]
        first = [name for name in short if 0 not in have[name]]
        what = "no sample yet" if empty else "no sample 0 yet"
        named = empty or first
        stop(
            f"{folder}: {len(named)} of {len(have)} problems have {what} (first: {named[0]}), and "
            "the others alone would be those that finish fast; finish thinkfast-eval sample with "
            "the same options, it resumes"
        )
    return Unfinished(wanted, used, len(have), len(short), sum(map(len, have.values())))


def say_unfinished(folder: Path | str, unfinished: Unfinished | None) -> None:
    """Say on stderr what of an unfinished run is used."""
    if unfinished is not None:
        sys.stderr.write(
            f"{folder}: not finished, {unfinished.sentence}; the same thinkfast-eval sample "
            "command goes on\n"
        )


def rate_over_problems(
    problems: Iterable[Sequence[ScoredSample]], value: Callable[[ScoredSample], float]
) -> float:
    """Return the mean over problems of the mean over the samples of each."""
    means = [math.fsum(map(value, samples)) / len(samples) for samples in problems]
    return math.fsum(means) / len(means)


def finish_times(samples: Iterable[SampleRecord], regime: str) -> dict[tuple[str, int], float]:
    """Return when each sample was finished, in seconds on the clock of its regime.

    The clock of a run (saturated) or of a problem (latency) starts at the first submission of a
    session. What a resumed run drew in a later session counts from the end of the earlier one.
    """
    groups: dict[str, dict[int, list[SampleRecord]]] = defaultdict(lambda: defaultdict(list))
    for record in samples:
        clock = record.problem_id if regime == "latency" else ""
        groups[clock][record.session].append(record)
    times: dict[tuple[str, int], float] = {}
    for sessions in groups.values():
        start = 0.0
        for session in sorted(sessions):
            drawn = sessions[session]
            first = min(record.submit_s for record in drawn)
            for record in drawn:
                times[record.key] = start + record.finish_s - first
            start += max(record.finish_s for record in drawn) - first
    return times
