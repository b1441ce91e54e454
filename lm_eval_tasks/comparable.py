"""What must hold before numbers of runs stand beside each other.

They are of the same problems, their rewards are those of one model, and there are scores to choose
by. `report`, `score` and `prm-study` refuse the rest in the same words.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval_tasks.errors import stop
from lm_eval_tasks.provenance import read_reward
from lm_eval_tasks.rewards.scores import read_scores, reward_names
from lm_eval_tasks.samples import SampleStore

#: Of a reward's description: what does not tell its scores apart, or is their hash.
_NOT_IDENTITY = ("name", "reward_hash", "model", "resolved")


def check_problems(folders: Sequence[Path], names: Sequence[str]) -> None:
    """Refuse runs in which one name stands for different problems.

    Without an id of its own a problem is named by its place in the data set, so other data, or the
    same in another order, has the same names.

    Args:
        folders: run folders that are paired problem by problem.
        names: of the problems that are paired.

    Raises:
        InputError: question or gold answer of a problem differ.
    """
    known = {problem.problem_id: problem for problem in SampleStore(folders[0]).problems()}
    for folder in folders[1:]:
        here = {problem.problem_id: problem for problem in SampleStore(folder).problems()}
        for name in names:
            for field in ("question", "gold"):
                values = getattr(known[name], field), getattr(here[name], field)
                if values[0] != values[1]:
                    stop(
                        f"{folders[0]} and {folder}: {name} is another problem in each ({field} "
                        f"{_short(values[0])} and {_short(values[1])}), so they cannot be compared "
                        "problem by problem; give runs of the same data, or report each alone"
                    )


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def check_rewards(rewards: Sequence[tuple[Path, Mapping[str, Any] | None]]) -> None:
    """Refuse Best-of-N by different reward models that happen to have one name.

    Args:
        rewards: run folders with what `lm_eval_tasks.provenance.read_reward` says of their scores,
            None without any.

    Raises:
        InputError: two runs have scores of different rewards.
    """
    first_folder, first = rewards[0]
    for folder, reward in rewards[1:]:
        if first is None or reward is None:
            continue
        hashes = first["reward_hash"], reward["reward_hash"]
        if hashes[0] == hashes[1]:
            continue
        there, here = first["description"], reward["description"]
        keys = [key for key in {**there, **here} if key not in _NOT_IDENTITY]
        what = "".join(
            f"; {key} {there.get(key)!r} and {here.get(key)!r}"
            for key in keys
            if there.get(key) != here.get(key)
        )
        name = reward["name"]
        stop(
            f"--reward {name}: {first_folder} and {folder} have scores of different reward "
            f"models under this name (hashes {hashes[0]} and {hashes[1]}{what}); score both with "
            f"one model under a new name: thinkfast-eval reward {first_folder} {folder} "
            "--reward SPEC,name=NEW"
        )


def check_rewards_by_task(folders: Sequence[Path], reward: str) -> None:
    """Refuse scores of different reward models under one name in runs of one task.

    Args:
        folders: run folders, of any tasks; those without such scores are left to their readers.
        reward: name of the scores.

    Raises:
        InputError: see `check_rewards`.
    """
    of_task: dict[str, list[tuple[Path, Mapping[str, Any]]]] = {}
    for folder in folders:
        if reward in reward_names(folder):
            task = SampleStore(folder).config()["task"]
            of_task.setdefault(task, []).append((folder, read_reward(folder, reward)))
    for found in of_task.values():
        check_rewards(found)


def check_scored(folder: Path, reward: str, scores: Sequence[float | None]) -> None:
    """Refuse Best-of-N where there is nothing to choose by.

    Args:
        folder: the run folder.
        reward: name of its scores.
        scores: of the samples that are compared.

    Raises:
        InputError: none of them has a score.
    """
    if any(score is not None for score in scores):
        return
    reasons = Counter(record.unscored for record in read_scores(folder, reward))
    stop(
        f"--reward {reward}: none of the {len(scores)} samples of {folder} that are compared has a "
        f"score (in the file: {reasons['too_long']} too long for the reward model, "
        f"{reasons['empty']} without a step); leave --reward out, or score with another SPEC"
    )
