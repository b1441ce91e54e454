"""Attributed costs and the effective batch size, by hand and against a slow integral."""

import numpy as np
import pytest

from lm_eval_tasks.costs import overlap_costs, token_throughput
from lm_eval_tasks.samples import SampleRecord


def record(name, submit, first, finish, session=0, num_tokens=10):
    return SampleRecord(
        problem_id=name,
        sample_index=0,
        seed=0,
        text="",
        num_tokens=num_tokens,
        num_prompt_tokens=5,
        num_cached_tokens=None,
        finish_reason="stop",
        session=session,
        submit_s=submit,
        first_token_s=first,
        finish_s=finish,
        config_hash="x",
    )


def test_samples_pay_equal_shares_of_the_time_in_which_they_run():
    records = [record("a", 0, 1, 3), record("b", 0, 1, 5), record("c", 2, 4, 5)]
    costs, used = overlap_costs(records)
    # 0-1: prefill of a and b. 1-3: a and b. 3-4: b alone, c waits. 4-5: b and c.
    assert costs == {
        ("a", 0): pytest.approx(0.5 + 1.0),
        ("b", 0): pytest.approx(0.5 + 1.0 + 1.0 + 0.5),
        ("c", 0): pytest.approx(0.5),
    }
    assert used.busy_s == 5
    assert used.generating_s == 4
    assert used.effective_batch_size == pytest.approx((2 + 4 + 1) / 4)
    assert used.drain_s == 1
    assert used.has_first_tokens
    assert token_throughput(records, used) == 6


def test_in_the_regime_latency_every_problem_empties_its_own_batch():
    records = [record("a", 0, 1, 3), record("a", 0, 2, 6), record("b", 6, 7, 9)]
    records += [record("b", 6, 7, 8), record("c", 0, 1, 2, session=1)]
    assert overlap_costs(records, "latency")[1].drain_s == (6 - 2) + (9 - 7) + (2 - 1)
    assert overlap_costs(records)[1].drain_s == (9 - 7) + (2 - 1)


def test_pauses_are_nobodys_and_sessions_have_their_own_clocks():
    records = [record("a", 0, 1, 2), record("b", 5, 6, 7), record("c", 0, 0, 4, session=1)]
    costs, used = overlap_costs(records)
    assert costs == {("a", 0): 2, ("b", 0): 2, ("c", 0): 4}
    assert used.busy_s == 8  # without the pause from 2 to 5


def test_without_first_tokens_a_sample_runs_from_its_submission():
    costs, used = overlap_costs([record("a", 0, None, 4), record("b", 2, None, 4)])
    assert costs == {("a", 0): 3, ("b", 0): 1}
    assert not used.has_first_tokens


def test_costs_add_up_and_equal_a_numerical_integral():
    generator = np.random.default_rng(0)
    records = []
    for i in range(30):
        submit = round(generator.uniform(0, 10), 2)
        first = submit + round(generator.uniform(0, 2), 2)
        finish = first + round(generator.uniform(0, 5), 2)
        records.append(record(f"p{i}", submit, first, finish))
    costs, used = overlap_costs(records)
    assert sum(costs.values()) == pytest.approx(used.busy_s)
    step = 0.001
    expected = dict.fromkeys(costs, 0.0)
    for now in np.arange(step / 2, 20, step):
        running = [r for r in records if r.first_token_s <= now < r.finish_s]
        waiting = [r for r in records if r.submit_s <= now < r.first_token_s]
        payers = running or waiting
        for r in payers:
            expected[r.key] += step / len(payers)
    for key, cost in costs.items():
        assert cost == pytest.approx(expected[key], abs=0.02)
