"""What made the numbers of a run: its sessions of drawing, grading and reading, as recorded.

config.json keeps what the first session found; sessions.jsonl, grading.jsonl and scores/NAME.json
have a line or entry for each start, with the command, the versions and the machine of that start.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lm_eval_tasks.jsonl import JsonLines, read_object
from lm_eval_tasks.rewards.scores import read_scores, score_path
from lm_eval_tasks.sampling import environment

GRADING = "grading.jsonl"
#: Facts that a session may have found changed.
CONDITIONS = ("versions", "hardware", "git_commit")


def record_grading(folder: Path, command: str | None, num_judged: int | None) -> None:
    """Append to grading.jsonl that a command begins to judge a run; the caller holds the lock.

    Args:
        folder: the run folder.
        command: the command line.
        num_judged: samples without a verdict when it began; a killed command left some of them.
            None: samples are judged as they are drawn.

    Raises:
        InputError: the file cannot be written.
    """
    row = {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "num_judged": num_judged,
        "versions": environment.versions(),
        "git_commit": environment.git_commit(),
    }
    with JsonLines(folder / GRADING) as lines:
        lines.append(row)


def read_grading(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of grading.jsonl; empty for runs graded by versions that wrote none.

    Raises:
        InputError: a line is malformed.
    """
    return list(JsonLines(folder / GRADING).read(lambda row: row))


def read_reward(folder: Path, reward: str) -> dict[str, Any]:
    """Return which reward model made the scores of a run.

    Args:
        folder: the run folder.
        reward: name of its scores.

    Returns:
        ``name``, ``reward_hash`` as it stands beside every score, ``description`` (model, protocol,
        split, dtype, ...; empty where scores/NAME.json is missing), ``sessions``.

    Raises:
        InputError: the score file or its description is damaged.
    """
    first = next(read_scores(folder, reward), None)
    path = score_path(folder, reward).with_suffix(".json")
    stored = read_object(path) if path.is_file() else {}
    return {
        "name": reward,
        "reward_hash": first.reward_hash if first else None,
        "description": stored.get("reward", {}),
        "sessions": stored.get("sessions", []),
    }


def commands_of(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return every command that drew, graded and read the samples of runs, each once.

    Args:
        runs: as `lm_eval_tasks.analysis` describes them.
    """
    found: dict[str, None] = {}
    for field in ("sessions", "grading"):
        for run in runs:
            rows = run.get(field, [])
            found |= dict.fromkeys(row["command"] for row in rows if row.get("command"))
            if field == "grading" and not rows:
                # Verdicts are there, or the run would have been refused.
                found[f"thinkfast-eval score {run['folder']}  # not recorded in this run"] = None
    for run in runs:
        rows = (run.get("reward") or {}).get("sessions", [])
        found |= dict.fromkeys(row["command"] for row in rows if row.get("command"))
    return list(found)


def session_rows(run: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Return all sessions of a run under the name of their step, in the order of the steps."""
    reward = run.get("reward") or {}
    parts = (
        ("sample", run["sessions"]),
        ("score", run.get("grading", [])),
        (f"reward {reward.get('name')}", reward.get("sessions", [])),
    )
    return [(f"{name} {i}", row) for name, rows in parts for i, row in enumerate(rows, start=1)]


def settings_markdown(name: str, run: Mapping[str, Any]) -> list[str]:
    """Return the lines of a report that show a run's settings.

    Args:
        name: of the run.
        run: ``folder`` and ``config``.
    """
    config = json.dumps(run["config"], indent=1, ensure_ascii=False)
    return [f"{name} (`{run['folder']}`):\n", "```json", config, "```\n"]


def changes_of(run: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
    """Return the conditions of a run's sessions that are not the same in all of them.

    Returns:
        Name of the condition, session and value, for every session that recorded it.
    """
    rows = session_rows(run)
    found = []
    for field in CONDITIONS:
        known = [(session, row[field]) for session, row in rows if row.get(field) is not None]
        if len({_key(value) for _, value in known}) > 1:
            found += [(field, session, value) for session, value in known]
    return found


def values_of(sessions: Sequence[Mapping[str, Any]], config: Mapping[str, Any], field: str) -> Any:
    """Return what sampling sessions found: one value, or the list of different ones.

    Args:
        sessions: of sessions.jsonl.
        config: config.json, for sessions that did not record it.
        field: of `CONDITIONS`.
    """
    values = [session.get(field, config.get(field)) for session in sessions]
    distinct = list({_key(value): value for value in values}.values())
    if not distinct:
        return config.get(field)
    return distinct[0] if len(distinct) == 1 else distinct


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
