"""Reports of simulated runs: what they must show, and that their numbers are those of the store."""

import csv
import html.parser
import json
import re

import pytest
from run_folders import write_run
from synthetic_runs import make_run

from lm_eval_tasks.analysis import Settings, analyse, load_run
from lm_eval_tasks.cli import main
from lm_eval_tasks.commands.score import evaluate_run
from lm_eval_tasks.estimators import pass_at_k
from lm_eval_tasks.samples import SampledText, SampleStore
from lm_eval_tasks.scored import load_scored
from lm_eval_tasks.tables import tables_of
from lm_eval_tasks.verdicts import score_run

FAST = ["--draws", "100", "--orders", "8"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Teacher and student on a saturated server, and the teacher one problem at a time."""
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "teacher", skill=0.7, tokens_per_s=100, reward="prm", seed=1)
    make_run(folder / "student", skill=0.5, tokens_per_s=300, reward="prm", seed=2)
    make_run(folder / "teacher-alone", regime="latency", reward="prm", num_samples=6, seed=1)
    rows = [
        {
            "round": number,
            "batch_size": batch,
            "num_prompt_tokens": 64,
            "num_tokens": 32,
            "seconds": 1.0 + number,
            "prefill_s": 0.1,
            "tokens_per_s": 32.0 * batch,
            "decode_tokens_per_s": 40.0 * batch,
            "num_preemptions": 0,
            "config_hash": SampleStore(folder / "teacher").config()["config_hash"],
            "started": "2026-01-01T00:00:00+00:00",
        }
        for number in range(3)
        for batch in (1, 4)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "teacher" / "throughput.jsonl").write_text(lines)
    return folder


@pytest.fixture(scope="module")
def report(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    names = ("teacher", "student", "teacher-alone")
    folders = [str(runs / name) for name in names]
    command = ["report", *folders, "--reward", "prm", "--reward-time", "--out", str(out), *FAST]
    assert main([*command, "--no-png"]) == 0
    return out


def test_report_files(report):
    names = sorted(str(path.relative_to(report)) for path in report.rglob("*") if path.is_file())
    assert names == ["points.csv", "report.html", "report.md", "results.json"]
    assert "](figures/" not in (report / "report.md").read_text()


def test_report_shows_what_lets_a_reader_doubt(report):
    text = (report / "report.md").read_text()
    for needed in (
        "thinkfast-eval score",
        "cut at the token limit",
        "no answer found",
        "prompt tokens from the prefix cache",
        "generated tokens per sample",
        "effective batch size",
        "thinkfast-eval sample --model teacher",
        "thinkfast-eval report",
        '"temperature": 0.8',
        '"vllm": "0.32.0"',
        "simulated",
        "start-up and warm-up, excluded",
        "| cache for keys, values and states | unknown | unknown |",
        "| one round: no spread |",
        "| seed of the samples | 1234 | 1234 |",
        "vLLM draws samples that have seeds one by one",
        "per sequence, drawn with seeds.",
        "Reward model seconds are as measured, one run after another",
    ):
        assert needed in text, needed
    page = (report / "report.html").read_text()
    assert "effective batch size" in page


def test_report_facts_are_those_of_the_store(runs, report):
    results = json.loads((report / "results.json").read_text())
    described = results["groups"][0]["runs"][0]
    run = load_run(runs / "teacher", Settings(reward="prm"))
    flat = [one for drawn in run.samples.values() for one in drawn]
    facts = described["facts"]
    assert facts["num_samples"] == 12 * 8 == len(flat)
    assert facts["no_answer"] == pytest.approx(sum(s.answer_class is None for s in flat) / 96)
    assert facts["truncated"] == pytest.approx(sum(s.is_truncated for s in flat) / 96)
    assert facts["prefix_cache_hits"] == pytest.approx(32 * 7 / 8 / 50)
    assert 4 < facts["effective_batch_size"] <= 8
    assert sum(s.cost_s for s in flat) == pytest.approx(facts["busy_s"])
    scored = load_scored(runs / "teacher")
    values = [pass_at_k(8, sum(s.correct for s in drawn), 4) for drawn in scored.values()]
    assert described["metrics"]["pass@4"]["value"] == pytest.approx(sum(values) / len(values))
    assert described["throughput"][1]["seconds"] == {"median": 2.0, "low": 1.0, "high": 3.0}


def test_rates_are_those_of_score(tmp_path):
    """Of an unfinished run too: the third sample of one problem has no counterpart."""
    golds = {"a": "7", "b": "7"}
    run = write_run(
        tmp_path / "run", golds, {"a": ["?", "7"], "b": ["7", SampledText("7", 70, "length"), "?"]}
    )
    score_run(run)
    facts, scores = load_run(run, Settings()).facts, evaluate_run(run)
    assert facts["no_answer"] == scores.no_answer == 1 / 4
    assert facts["truncated"] == scores.truncated == 1 / 4
    assert facts["tokens_per_sample"] == scores.gen_tokens == (10 + 10 + 10 + 70) / 4


def test_report_of_latency_counts_how_each_problem_drains(runs):
    facts = load_run(runs / "teacher-alone", Settings()).facts
    records = SampleStore(runs / "teacher-alone").records()
    by_problem = {}
    for record in records:
        by_problem.setdefault(record.problem_id, []).append(record)
    drained = [
        max(r.finish_s for r in drawn) - max(r.first_token_s for r in drawn)
        for drawn in by_problem.values()
    ]
    assert len(drained) == 12
    assert facts["drain_share"] == pytest.approx(sum(drained) / facts["busy_s"])
    assert 0.5 < facts["drain_share"] < 1


def test_report_groups_do_not_mix_regimes(report):
    groups = json.loads((report / "results.json").read_text())["groups"]
    assert [group["regime"] for group in groups] == ["saturated", "latency"]
    assert [[run["name"] for run in group["runs"]] for group in groups] == [
        ["teacher", "student"],
        ["teacher-alone"],
    ]
    assert (groups[0]["k"], groups[1]["k"]) == (None, 6)
    assert not groups[1]["targets"]  # nothing to compare with


def test_report_curves(report):
    group = json.loads((report / "results.json").read_text())["groups"][0]
    curves = {(c["run"], c["method"]): c for c in group["curves"] if c["axis"] == "seconds"}
    assert {method for _, method in curves} == {"coverage", "maj", "bon", "weighted_bon"}
    for curve in curves.values():
        assert curve["x"][-1] <= curve["limit"]
        assert curve["exhausted"][-1] <= 0.1
        assert curve["with_reward_time"] == (curve["method"] in ("bon", "weighted_bon"))
        assert curve["area"]["low"] <= curve["area"]["value"] <= curve["area"]["high"]
    coverage = curves["teacher", "coverage"]["y"]
    assert coverage == sorted(coverage)
    for name in ("teacher", "student"):
        # Reading takes time, so the same accuracy comes later.
        assert curves[name, "bon"]["limit"] > curves[name, "coverage"]["limit"]
    latency = json.loads((report / "results.json").read_text())["groups"][1]
    kinds = {(c["method"], c["axis"]): c for c in latency["curves"]}
    last = kinds["maj", "seconds"]["y"][-1]
    assert last == pytest.approx(latency["runs"][0]["metrics"]["maj@6"]["value"])
    targets = [row for row in group["targets"] if row["method"] == "coverage"]
    assert [row["run"] for row in targets] == ["teacher", "student"] * 4
    assert all(row["seconds"] <= row["at_s"] for row in targets if row["run"] == "teacher")


def test_report_page_is_complete_and_needs_no_network(report):
    page = (report / "report.html").read_text()
    assert not re.search(r"(src|href)\s*=|https?://|@import|url\(", page)

    class Checker(html.parser.HTMLParser):
        def __init__(self):
            super().__init__()
            self.open_tags = []

        def handle_startendtag(self, tag, attrs):
            pass

        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "br"):
                self.open_tags.append(tag)

        def handle_endtag(self, tag):
            assert self.open_tags.pop() == tag

    checker = Checker()
    checker.feed(page)
    assert checker.open_tags == []
    (block,) = re.findall(r'id="points">(.*?)</script>', page, flags=re.DOTALL)
    figures = json.loads(block)
    assert len(figures) == page.count('<figure class=chart data-figure="')
    for figure in figures:
        for line in figure["series"]:
            assert len(line["px"]) == len(line["x"]) == len(line["y"])


def test_report_points_as_csv(report):
    with (report / "points.csv").open() as opened:
        rows = list(csv.DictReader(opened))
    results = json.loads((report / "results.json").read_text())
    (found,) = [
        row
        for row in rows
        if (row["group"], row["figure"]) == ("arith-saturated", "coverage-vs-k")
        and (row["series"], row["x"]) == ("student", "4")
    ]
    assert found["on_front"] == "", "fronts are over seconds"
    timed = [row for row in rows if row["figure"] == "coverage-vs-seconds"]
    marked = {(r["series"], round(float(r["x"]), 6)) for r in timed if r["on_front"] == "1"}
    front = [p for p in results["groups"][0]["fronts"] if p["method"] == "coverage"]
    assert marked == {(p["run"], round(p["seconds"], 6)) for p in front} != set()
    expected = results["groups"][0]["runs"][1]["metrics"]["pass@4"]
    assert float(found["y"]) == pytest.approx(expected["value"])
    assert float(found["low"]) == pytest.approx(expected["low"])


def test_report_is_reproducible(runs, report, tmp_path):
    names = ("teacher", "student", "teacher-alone")
    folders = [str(runs / name) for name in names]
    command = ["report", *folders, "--reward", "prm", "--reward-time", "--out", str(tmp_path)]
    assert main([*command, "--no-png", *FAST]) == 0
    first, second = (json.loads((f / "results.json").read_text()) for f in (report, tmp_path))
    assert first["groups"] == second["groups"]


def test_report_names_escape_into_html(tmp_path):
    folder = make_run(tmp_path / "x", num_problems=3, num_samples=4, name="<b>&</script>")
    assert main(["report", str(folder), "--out", str(tmp_path / "out"), "--no-png", *FAST]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<b>&</script>" not in page
    assert "&lt;b&gt;&amp;&lt;/script&gt;" in page


def test_report_of_different_problems_and_settings_says_so(tmp_path):
    make_run(tmp_path / "a", num_problems=6, num_samples=4)
    make_run(tmp_path / "b", num_problems=5, num_samples=4, temperature=0.6)
    command = ["report", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "out")]
    assert main([*command, "--no-png", *FAST]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "5 problems" in text
    assert "left out: 1 of a" in text
    assert "Settings that differ" in text
    assert "| temperature | b | 0.6 |" in text


def test_report_bad_input(runs, tmp_path, capsys):
    teacher, student = str(runs / "teacher"), str(runs / "student")
    unscored = make_run(tmp_path / "unscored", num_problems=2, num_samples=2)
    (unscored / "verdicts.jsonl").unlink()
    for arguments, message in (
        ([str(tmp_path / "none")], "config.json: cannot be read"),
        ([str(unscored)], f"run thinkfast-eval score {unscored}"),
        ([teacher, "--reward", "other"], "--reward other: "),
        ([teacher, "--reward-time"], "--reward-time needs the scores"),
        ([teacher, teacher], "two runs are named teacher"),
        ([teacher, "--level", "1.5"], "--level 1.5: need a number between 0 and 1"),
        ([teacher, "--draws", "3"], "--draws 3: need at least 100"),
        ([teacher, "--orders", "1"], "--orders 1: need at least 2"),
        ([teacher, student, "--window", "5", "1"], "--window 5 1: need two ascending times"),
        ([teacher, student, "--window", "0.1", "1e9"], "--window 0.1 1e+09: need two ascending"),
    ):
        code = main(["report", *arguments, "--out", str(tmp_path / "out"), "--no-png"])
        error = capsys.readouterr().err
        assert code == 2, arguments
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["report", "plot"])
def test_reward_that_scored_nothing(tmp_path, capsys, command):
    """Every solution was longer than the reward model takes, or had no step."""
    runs = [make_run(tmp_path / name, num_problems=3, reward="prm") for name in ("a", "b")]
    path = runs[1] / "scores" / "prm.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for number, row in enumerate(rows):
        row |= {"step_scores": [], "unscored": "too_long" if number else "empty"}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    assert main([command, *map(str, runs), "--reward", "prm", "--out", str(out), *FAST]) == 2
    assert capsys.readouterr().err == (
        f"error: --reward prm: none of the 24 samples of {runs[1]} that are compared has a score "
        "(in the file: 23 too long for the reward model, 1 without a step); leave --reward out, "
        "or score with another SPEC\n"
    )
    assert not out.exists()


def test_report_shows_the_front(tmp_path):
    """A fast model that stays behind a slow one: each has its time."""
    make_run(tmp_path / "slow", num_samples=16, skill=0.8, tokens_per_s=60, seed=1)
    make_run(tmp_path / "fast", num_samples=16, skill=0.3, tokens_per_s=600, seed=2)
    folders, out = [str(tmp_path / name) for name in ("slow", "fast")], tmp_path / "out"
    assert main(["report", *folders, "--out", str(out), "--no-png", *FAST]) == 0
    (group,) = json.loads((out / "results.json").read_text())["groups"]
    points = [p for p in group["fronts"] if p["method"] == "maj"]
    assert (points[0]["run"], points[-1]["run"]) == ("fast", "slow")
    text = (out / "report.md").read_text()
    table = text[text.index("### Pareto front") :].split("###")[1]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| majority |")]
    assert (rows[0][1], rows[-1][1]) == ("fast", "slow")
    assert rows[0][2].startswith(f"{points[0]['seconds']:.3g} to ")
    assert rows[-1][2].endswith(f" to {points[-1]['seconds']:.3g}")
    page = (out / "report.html").read_text()
    assert "<h3>Pareto front</h3>" in page
    assert page.count(">Pareto front</text>") == 2, "over the two figures against seconds"
    (block,) = re.findall(r'id="points">(.*?)</script>', page, flags=re.DOTALL)
    fronts = [line["front"] for figure in json.loads(block) for line in figure["series"]]
    assert sum(map(sum, fronts)) == len(group["fronts"])


def test_report_of_runs_without_seeds(tmp_path):
    make_run(tmp_path / "a", seed_of_run=None)
    make_run(tmp_path / "b", seed=2)
    for names, is_equal in ((["a"], True), (["a", "b"], False)):
        folders = [str(tmp_path / name) for name in names]
        assert main(["report", *folders, "--out", str(tmp_path / "r"), *FAST, "--no-png"]) == 0
        text = (tmp_path / "r" / "report.md").read_text()
        assert "| seed of the samples | none: drawn without seeds |" in text
        assert ("vLLM draws samples that have seeds" in text) != is_equal
        assert ("| seed | b | 1234 |" in text) != is_equal, "not made under equal conditions"


def test_reward_seconds_are_one_price_per_token(tmp_path):
    """What the machine did while one run was read is no difference between the runs."""
    for name, slower in (("a", 1.0), ("b", 3.0)):
        make_run(tmp_path / name, reward="prm", num_problems=4)
        path = tmp_path / name / "scores" / "prm.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for j, row in enumerate(rows):
            row |= {"num_tokens": 10 + j, "seconds": slower * (10 + j) / 1000}
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = [load_run(tmp_path / name, Settings(reward="prm")) for name in ("a", "b")]
    (group,) = analyse(runs, Settings(reward="prm", with_reward_time=True, draws=100, num_orders=8))
    facts = [run["facts"] for run in group["runs"]]
    tokens = 10 + 31 / 2
    assert [fact["reward_s_per_sample"] for fact in facts] == pytest.approx([tokens * 0.002] * 2)
    measured = [fact["measured_reward_s_per_sample"] for fact in facts]
    assert measured == pytest.approx([tokens * 0.001, tokens * 0.003])
    curves = [c for c in group["curves"] if c["method"] == "weighted_bon"]
    assert curves[0]["y"] == curves[1]["y"], "equal samples, equal seconds"
    shown = tables_of(group, 0.95)[0].markdown()
    assert "| the same as measured | 0.0255 | 0.0765 |" in shown
    assert "one price per token that it read" in shown
