"""What each sample cost the server, and how full its batch was, from stored start and finish times.

While n samples are being generated, each of them pays 1/n of the passing time (fair shares). A
sample is generated from its first token to its finish. Before its first token it is prefilled or
waits in the queue: where others are being generated, the time is theirs; where none is, the samples
waiting at that moment share it, so that the first prefill is paid too. The costs of a session add
up to the time in which anything was submitted and unfinished. docs/metrics.md says what this
leaves out.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lm_eval_tasks.samples import SampleRecord

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Occupancy:
    """How the server was used in the sessions of a run."""

    busy_s: float
    """Time in which something was submitted and unfinished."""
    generating_s: float
    """Time in which at least one sample was being generated."""
    effective_batch_size: float
    """Samples being generated at the same time, averaged over `generating_s`."""
    drain_s: float
    """Time after the last sample of each session began, in which the batch empties. In the regime
    "latency" it does so for every problem, and these times add up."""
    has_first_tokens: bool
    """False: the server did not stamp first tokens, so queueing counts as being generated."""


def overlap_costs(
    records: Iterable[SampleRecord],
    regime: str = "saturated",
) -> tuple[dict[tuple[str, int], float], Occupancy]:
    """Return each sample's share of the server's time, and how the server was used.

    Args:
        records: the samples of one run; sessions are treated apart, each has its own clock.
        regime: of the run.

    Returns:
        (problem_id, sample_index) to seconds, and the totals over sessions.
    """
    sessions: dict[int, list[SampleRecord]] = defaultdict(list)
    for record in records:
        sessions[record.session].append(record)
    costs: dict[tuple[str, int], float] = {}
    busy_s = generating_s = sample_s = drain_s = 0.0
    has_first = True
    for drawn in sessions.values():
        submit = np.array([r.submit_s for r in drawn])
        firsts = [r.submit_s if r.first_token_s is None else r.first_token_s for r in drawn]
        has_first = has_first and all(r.first_token_s is not None for r in drawn)
        start, finish = np.array(firsts), np.array([r.finish_s for r in drawn])
        shares, generating, busy = _fair_shares(submit, start, finish)
        costs.update(zip((r.key for r in drawn), shares.tolist(), strict=True))
        busy_s += busy
        generating_s += generating
        sample_s += float((finish - start).sum())
        batches = [r.problem_id if regime == "latency" else "" for r in drawn]
        drain_s += _drain_s(batches, start, finish)
    batch = sample_s / generating_s if generating_s else 0.0
    return costs, Occupancy(busy_s, generating_s, batch, drain_s, has_first)


def _drain_s(batches: Sequence[str], start: Floats, finish: Floats) -> float:
    """Return for how long batches, named for each sample, only emptied, added up."""
    last: dict[str, tuple[float, float]] = {}
    for batch, begun, ended in zip(batches, start.tolist(), finish.tolist(), strict=True):
        latest = last.get(batch, (begun, ended))
        last[batch] = max(latest[0], begun), max(latest[1], ended)
    return sum(ended - begun for begun, ended in last.values())


def _fair_shares(submit: Floats, start: Floats, finish: Floats) -> tuple[Floats, float, float]:
    """Return the cost of each sample of a session, its generating and its busy seconds.

    Args:
        submit: (n,) submission times.
        start: (n,) first-token times.
        finish: (n,) finish times.
    """
    edges = np.unique(np.concatenate([submit, start, finish]))
    length = np.diff(edges)
    running = _inside(edges, start, finish)
    waiting = _inside(edges, submit, start)
    is_running = running > 0
    is_waiting = ~is_running & (waiting > 0)
    paid_running = _integral(length * is_running / np.maximum(running, 1))
    paid_waiting = _integral(length * is_waiting / np.maximum(waiting, 1))
    at_submit, at_start, at_finish = (np.searchsorted(edges, t) for t in (submit, start, finish))
    costs = paid_running[at_finish] - paid_running[at_start]
    costs += paid_waiting[at_start] - paid_waiting[at_submit]
    generating = float(length[is_running].sum())
    return costs, generating, generating + float(length[is_waiting].sum())


def _inside(edges: Floats, begin: Floats, end: Floats) -> NDArray[np.int64]:
    """Return for each segment between edges in how many of the intervals [begin, end) it lies."""
    change = np.zeros(len(edges), dtype=np.int64)
    np.add.at(change, np.searchsorted(edges, begin), 1)
    np.add.at(change, np.searchsorted(edges, end), -1)
    return np.cumsum(change)[:-1]


def _integral(pieces: Floats) -> Floats:
    return np.concatenate(([0.0], np.cumsum(pieces)))


def token_throughput(records: Sequence[SampleRecord], occupancy: Occupancy) -> float:
    """Return the generated tokens per busy second of a run; 0 where nothing took time."""
    tokens = sum(record.num_tokens for record in records)
    return tokens / occupancy.busy_s if occupancy.busy_s else 0.0
