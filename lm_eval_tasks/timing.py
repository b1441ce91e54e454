"""Timing noise: how far the speed of a run differs between its rounds, and what ran beside what.

The bootstrap over problems says how much the choice of problems matters; it knows nothing of a
machine that is slower in one hour than in the next. `thinkfast-eval compare` therefore draws in
rounds. A *round* is all that a run drew towards the same number of samples and problems: sessions
that a kill divided are one round, a run that was raised later has one more. docs/metrics.md,
"Timing spread", says what is made of it.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval_tasks.samples import SampleRecord


def rounds_of(
    sessions: Sequence[Mapping[str, Any]],
    records: Sequence[SampleRecord],
    costs: Mapping[tuple[str, int], float],
) -> list[dict[str, Any]]:
    """Return the rounds of a run in their order, without those that drew nothing.

    Args:
        sessions: lines of sessions.jsonl; those of one round have the same ``num_samples`` and
            ``limit``.
        records: the samples of the run.
        costs: server seconds of each sample, by problem and index.

    Returns:
        For each round its ``sessions``, ``num_samples``, ``num_tokens`` and ``busy_s``: what its
        samples cost together.
    """
    targets = {row["session"]: (row.get("num_samples"), row.get("limit")) for row in sessions}
    found: dict[Any, dict[str, Any]] = {}
    for record in sorted(records, key=lambda record: record.session):
        one = found.setdefault(
            targets.get(record.session, (None, None)),
            {"sessions": [], "num_samples": 0, "num_tokens": 0, "busy_s": 0.0},
        )
        if record.session not in one["sessions"]:
            one["sessions"].append(record.session)
        one["num_samples"] += 1
        one["num_tokens"] += record.num_tokens
        one["busy_s"] += costs[record.key]
    return list(found.values())


def slowness(
    rounds: Sequence[Mapping[str, Any]], reward_s: float = 0.0, busy_s: float | None = None
) -> list[float]:
    """Return for each round how many times as long the run would have taken at its speed.

    The speed is that of generating: server seconds per generated token, over that of all rounds.

    Args:
        rounds: of `rounds_of`.
        reward_s: the reward model's seconds, if they are counted; no round changes them.
        busy_s: the server seconds that ``reward_s`` comes on top of; default: those of the rounds.

    Returns:
        One factor per round; around 1. Empty where a round has no time or no tokens.
    """
    total_s = sum(one["busy_s"] for one in rounds)
    total_tokens = sum(one["num_tokens"] for one in rounds)
    if not all(one["busy_s"] and one["num_tokens"] for one in rounds):
        return []
    generating_s = total_s if busy_s is None else busy_s
    factors = []
    for one in rounds:
        factor = one["busy_s"] / one["num_tokens"] * total_tokens / total_s
        factors.append((factor * generating_s + reward_s) / (generating_s + reward_s))
    return factors


def timing_spread(
    seconds: float | None,
    speedup: float | None,
    own: Sequence[float],
    baseline: Sequence[float],
) -> dict[str, Any]:
    """Return the least and most of a time and a speed-up, had each round's speed held throughout.

    Args:
        seconds: of the run until its target; None: not reached.
        speedup: of the run over the baseline; None: undefined.
        own: `slowness` of the run.
        baseline: `slowness` of the baseline, whose rounds took turns with the run's.

    Returns:
        ``rounds`` and ``baseline_rounds``; ``round_low_s``, ``round_high_s``,
        ``round_speedup_low`` and ``round_speedup_high``, which are None with fewer than two rounds
        and where there is nothing to spread; the speed-up also where the rounds are not as many.
    """
    times: list[float] = []
    ratios: list[float] = []
    if seconds is not None and len(own) > 1:
        times = [seconds * factor for factor in own]
        if speedup is not None and len(own) == len(baseline):
            ratios = [speedup * base / factor for base, factor in zip(baseline, own, strict=True)]
    return {
        "rounds": len(own),
        "baseline_rounds": len(baseline),
        "round_low_s": min(times, default=None),
        "round_high_s": max(times, default=None),
        "round_speedup_low": min(ratios, default=None),
        "round_speedup_high": max(ratios, default=None),
    }


def loads_of(records: Sequence[SampleRecord]) -> tuple[int, int]:
    """Return the fewest and most samples of a problem that were drawn together, in one session.

    In the regime "latency" this is the load under which the times of a run hold: its samples of a
    problem are submitted at once.
    """
    counts = Counter((record.problem_id, record.session) for record in records)
    return min(counts.values()), max(counts.values())


def caches_of(sessions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the different caches that the engines of a run resolved; empty for servers.

    Returns:
        ``num_blocks``, ``block_size`` (tokens) and ``bytes``, which is None where it was not
        recorded.
    """
    found: list[dict[str, Any]] = []
    for session in sessions:
        engine = session.get("engine", {})
        if engine.get("num_cache_blocks") is None:
            continue
        one = {
            "num_blocks": engine["num_cache_blocks"],
            "block_size": engine.get("block_size"),
            "bytes": engine.get("cache_bytes"),
        }
        if one not in found:
            found.append(one)
    return found
