"""Timing spread over rounds: by hand, and through a report of simulated runs."""

import json

import pytest
from synthetic_runs import make_run

from lm_eval_tasks.analysis import Settings, load_run
from lm_eval_tasks.cli import main
from lm_eval_tasks.samples import SampleStore
from lm_eval_tasks.timing import caches_of, slowness, timing_spread

FAST = ["--draws", "100", "--orders", "8"]


def one_round(busy_s, num_tokens=100):
    return {"sessions": [0], "num_samples": 1, "num_tokens": num_tokens, "busy_s": busy_s}


def test_slowness_is_the_time_at_the_speed_of_a_round():
    assert slowness([one_round(1.0), one_round(3.0)]) == pytest.approx([0.5, 1.5])
    # Rounds of other sizes: it is seconds per token that count.
    assert slowness([one_round(1.0, 100), one_round(2.0, 200)]) == pytest.approx([1.0, 1.0])
    # A reward model that takes as long as all generating halves what the rounds change.
    assert slowness([one_round(1.0), one_round(3.0)], 4.0) == pytest.approx([0.75, 1.25])
    assert slowness([one_round(4.0)]) == [1.0]
    assert slowness([]) == slowness([one_round(1.0, 0)]) == []


def test_timing_spread_by_hand():
    found = timing_spread(10.0, 2.0, own=[0.5, 1.5], baseline=[1.0, 0.9])
    assert (found["round_low_s"], found["round_high_s"]) == (5.0, 15.0)
    # Within a round: the baseline's slowness over the run's.
    speedups = found["round_speedup_low"], found["round_speedup_high"]
    assert speedups == pytest.approx((2.0 * 0.9 / 1.5, 2.0 * 1.0 / 0.5))
    alone = timing_spread(10.0, 2.0, own=[1.0], baseline=[1.0])
    assert alone["rounds"] == 1
    assert {alone[f"round_{end}"] for end in ("low_s", "high_s", "speedup_low")} == {None}
    unpaired = timing_spread(10.0, 2.0, own=[0.5, 1.5], baseline=[1.0])
    assert (unpaired["round_low_s"], unpaired["round_speedup_low"]) == (5.0, None)
    assert timing_spread(None, 0.0, [0.5, 1.5], [1.0, 1.0])["round_low_s"] is None


def test_rounds_are_what_was_drawn_towards_one_number(tmp_path):
    """A kill divides a round into sessions; raising the number of samples begins another."""
    goals = [{"num_samples": 4}, {"num_samples": 4}, {"num_samples": 8}]
    sessions = [goal | {"limit": 12} for goal in goals]
    folder = make_run(tmp_path / "run", slowness=(1.0, 1.0, 2.0), sessions=sessions)
    facts = load_run(folder, Settings()).facts
    first, second = facts["rounds"]
    assert (first["sessions"], second["sessions"]) == ([0, 1], [2])
    assert first["num_samples"] + second["num_samples"] == facts["num_samples"]
    assert first["busy_s"] + second["busy_s"] == pytest.approx(facts["busy_s"])


def test_runs_of_earlier_versions_have_one_round(tmp_path):
    folder = make_run(tmp_path / "run", slowness=(1.0, 2.0))
    path = folder / "sessions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row.pop("num_samples", None)
        row.pop("limit", None)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(load_run(folder, Settings()).facts["rounds"]) == 1


@pytest.fixture
def group(tmp_path):
    """A student whose second round was half again as slow beside a steady teacher."""
    make_run(tmp_path / "teacher", num_samples=16, slowness=(1.0, 1.0, 1.0), seed=1)
    make_run(tmp_path / "student", num_samples=16, slowness=(1.0, 1.5, 1.0), seed=1)
    folders = [str(tmp_path / name) for name in ("teacher", "student")]
    out = tmp_path / "out"
    assert main(["report", *folders, "--out", str(out), "--no-png", *FAST]) == 0
    (found,) = json.loads((out / "results.json").read_text())["groups"]
    return found, (out / "report.md").read_text(), (out / "report.html").read_text()


def test_report_shows_the_spread_beside_the_interval(group):
    found, text, page = group
    targets = [row for row in found["targets"] if row["run"] == "student" and row["seconds"]]
    assert targets
    for row in targets:
        assert row["rounds"] == row["baseline_rounds"] == 3
        # Both drew the same samples: what differs is the time of one round.
        assert row["round_high_s"] / row["round_low_s"] == pytest.approx(1.5, rel=0.1)
        ratio = row["round_speedup_high"] / row["round_speedup_low"]
        assert ratio == pytest.approx(1.5, rel=0.02)
        assert row["round_speedup_low"] < row["speedup"] < row["round_speedup_high"]
        shown = f"{row['round_speedup_low']:.4g} to {row['round_speedup_high']:.4g} (3 rounds)"
        assert shown in text
        assert shown in page
    assert "| timing spread: speed-up |" in text
    assert "| the same by round, least to most (timing spread) |" in text
    assert "know nothing of timing noise" in text


def test_report_of_one_round_says_so(tmp_path):
    for name in ("a", "b"):
        make_run(tmp_path / name, num_problems=6, num_samples=8)
    row = {
        "round": 0,
        "batch_size": 4,
        "num_prompt_tokens": 64,
        "num_tokens": 32,
        "seconds": 1.25,
        "prefill_s": 0.1,
        "tokens_per_s": 128.0,
        "decode_tokens_per_s": 160.0,
        "num_preemptions": 0,
        "config_hash": "",
        "started": "2026-01-01T00:00:00+00:00",
    }
    hashes = {name: SampleStore(tmp_path / name).config()["config_hash"] for name in "ab"}
    row["config_hash"] = hashes["a"]
    (tmp_path / "a" / "throughput.jsonl").write_text(json.dumps(row) + "\n")
    row["config_hash"] = hashes["b"]
    rows = [row | {"round": i, "tokens_per_s": 100.0 + i} for i in range(3)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "b" / "throughput.jsonl").write_text(lines)
    folders, out = [str(tmp_path / name) for name in "ab"], tmp_path / "out"
    assert main(["report", *folders, "--out", str(out), "--no-png", *FAST]) == 0
    text = (out / "report.md").read_text()
    assert "by round, least to most (timing spread) | one round: no spread | one round" in text
    assert "| a | 4 | one round: no spread | 1.25 | 128 | 160 | 0 |" in text
    assert "| b | 4 | 3 | 1.25 (1.25 to 1.25) | 101 (100 to 102) | 160 (160 to 160) | 0 |" in text
    targets = text[text.index("### Seconds until") :]
    assert "| one round: no spread |" in targets[: targets.index("Target:")]


def test_caches_are_those_of_the_sessions():
    engine = {"num_cache_blocks": 8, "block_size": 32, "cache_bytes": 2**20}
    old = {"num_cache_blocks": 8, "block_size": 32}
    sessions = [{"session": 0, "engine": engine}, {"session": 1, "engine": engine}]
    assert caches_of(sessions) == [{"num_blocks": 8, "block_size": 32, "bytes": 2**20}]
    assert [one["bytes"] for one in caches_of([*sessions, {"engine": old}])] == [2**20, None]
    assert caches_of([{"session": 0}, {"engine": {"api": "chat"}}]) == []


@pytest.mark.parametrize("size", [2**20, 2**21])
def test_report_shows_the_memory_of_each_run(tmp_path, size):
    for name, blocks, own in (("a", 64, 2**20), ("b", 4096, size)):
        engine = {"num_cache_blocks": blocks, "block_size": 16, "cache_bytes": own}
        sessions = [{"engine": engine}]
        make_run(tmp_path / name, num_problems=4, num_samples=4, sessions=sessions)
    folders, out = [str(tmp_path / name) for name in "ab"], tmp_path / "out"
    assert main(["report", *folders, "--out", str(out), "--no-png", *FAST]) == 0
    text = (out / "report.md").read_text()
    cells = f"64 blocks of 16 tokens, 1.0 MiB | 4,096 blocks of 16 tokens, {size / 2**20:.1f} MiB"
    assert f"| cache for keys, values and states | {cells} |" in text
    assert ("did not have the same memory" in text) == (size > 2**20)


def test_latency_is_labelled_by_the_load_of_each_run(tmp_path):
    for name, num_samples in (("a", 4), ("b", 16)):
        make_run(tmp_path / name, num_samples=num_samples, regime="latency")
    folders, out = [str(tmp_path / name) for name in "ab"], tmp_path / "out"
    assert main(["report", *folders, "--out", str(out), "--no-png", *FAST]) == 0
    text, page = (out / "report.md").read_text(), (out / "report.html").read_text()
    assert "4 samples in flight" not in text
    label = "4 samples of each problem, in flight together: 4 (a), 16 (b)"
    assert label in text
    assert page.count(label) > 2
    assert "b (16 in flight)" in page
    assert "| num_samples | b | 16 |" in text
    alone = tmp_path / "alone"
    assert main(["report", folders[1], "--out", str(alone), "--no-png", *FAST]) == 0
    assert "submission; 16 samples in flight" in (alone / "report.md").read_text()


def test_latency_of_a_raised_run_ran_at_the_loads_of_its_sessions(tmp_path):
    folder = make_run(tmp_path / "run", num_problems=4, num_samples=8, regime="latency")
    path = folder / "samples.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["session"] = int(row["sample_index"] >= 2)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_run(folder, Settings()).facts["load"] == (2, 6)
