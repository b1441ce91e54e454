"""Take out what was said of samples that are gone: their verdicts and their reward scores.

A sample that was deleted by hand or lost in a power cut is drawn again under the same name. Without
a seed it is another text, which must not inherit the verdict of the old one, so ``thinkfast-eval
sample`` calls this before it draws.
"""

from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any

from lm_eval_tasks.jsonl import JsonLines, write_rows
from lm_eval_tasks.locks import exclusive
from lm_eval_tasks.rewards.scores import ScoreRecord, reward_names, score_path
from lm_eval_tasks.verdicts import SCORE_LOCK, VERDICTS, Verdict

_Row = Verdict | ScoreRecord


def forget_missing(folder: Path, have: Mapping[str, Set[int]]) -> int:
    """Drop verdicts and scores of samples that a run does not have.

    Args:
        folder: the run folder, locked for sampling.
        have: problem id -> indices of its stored samples.

    Returns:
        The number of dropped lines.

    Raises:
        InputError: a file is damaged, or is being written and has such lines.
    """

    def is_stored(row: _Row) -> bool:
        return row.sample_index in have.get(row.problem_id, ())

    num_dropped = _keep(folder / VERDICTS, folder / SCORE_LOCK, Verdict.from_dict, is_stored)
    for name in reward_names(folder):
        path = score_path(folder, name)
        num_dropped += _keep(path, path.with_suffix(".lock"), ScoreRecord.from_dict, is_stored)
    return num_dropped


def _keep(
    path: Path,
    lock: Path,
    parse: Callable[[Mapping[str, Any]], _Row],
    is_stored: Callable[[_Row], bool],
) -> int:
    """Drop the other rows of a file; return how many these are."""
    rows = list(JsonLines(path).read(parse))
    if all(map(is_stored, rows)):
        return 0
    with exclusive(lock, path):
        rows = list(JsonLines(path).read(parse))  # nobody adds to them any more
        kept = [row for row in rows if is_stored(row)]
        write_rows(path, [row.as_dict() for row in kept])
    return len(rows) - len(kept)
