"""The plan of a comparison and its resumption; the engines behind it have their own tests."""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from synthetic_runs import make_run

from lm_eval_tasks import compare
from lm_eval_tasks.cli import main
from lm_eval_tasks.commands import reward as reward_command
from lm_eval_tasks.commands import sample as sample_command
from lm_eval_tasks.compare import Plan, parse_model, run_plan, share
from lm_eval_tasks.errors import InputError


def plan(folder, **options):
    values = {
        "models": [parse_model("a/teacher"), parse_model("b/student,max_num_seqs=4")],
        "task": "arith",
        "num_samples": 8,
        "num_problems": {"saturated": 6},
        "rounds": 2,
        "sampling": ["--temperature", "0.7"],
        "engine_args": {"dtype": "float32", "max_num_seqs": "16"},
        "rewards": [],
        "batch_sizes": [1, 4],
        "speed_tokens": (32, 16),
        "folder": folder,
    }
    return Plan(**values | options)


def parsed(step, module):
    """What the step's own command makes of its arguments."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    module.add_arguments(parser)
    return parser.parse_args(step.command[4:])


def test_steps_take_turns(tmp_path):
    titles = [step.title for step in plan(tmp_path).steps()]
    assert titles == [
        "round 1 of 2, saturated: teacher and its speeds",
        "round 1 of 2, saturated: student and its speeds",
        "round 2 of 2, saturated: student and its speeds",
        "round 2 of 2, saturated: teacher and its speeds",
        "grading the answers",
    ]


def test_steps_are_commands_that_exist(tmp_path):
    steps = plan(tmp_path, rewards=["some/prm,protocol=qwen"]).steps()
    first, second, last = (parsed(steps[i], sample_command) for i in (0, 1, 3))
    assert (first.model, first.name, first.task) == ("a/teacher", "teacher", "arith")
    assert (first.num_samples, first.limit, first.temperature) == (4, 6, 0.7)
    assert first.engine_args == ["dtype=float32", "max_num_seqs=16"]
    assert second.engine_args == ["dtype=float32", "max_num_seqs=4"]
    assert (first.batch_sizes, first.speed_tokens, first.speed_round) == ([1, 4], [32, 16], 0)
    assert first.out == last.out == tmp_path / "runs" / "saturated" / "teacher"
    assert (last.num_samples, last.regime, last.speed_round) == (8, "saturated", 1)
    given = parsed(steps[-1], reward_command)
    assert given.reward == ["some/prm,protocol=qwen"]
    assert [path.name for path in given.runs] == ["teacher", "student"]


def test_steps_of_both_regimes(tmp_path):
    """Latency divides the problems, saturated the samples; speeds are measured once per round."""
    chosen = plan(tmp_path, num_problems={"saturated": 6, "latency": 3}, rounds=3)
    steps = chosen.steps()
    drawn = [parsed(step, sample_command) for step in steps[:-1]]
    assert [one.regime for one in drawn] == (["saturated"] * 2 + ["latency"] * 2) * 3
    parts = [(one.num_samples, one.limit) for one in drawn if one.name == "student"]
    assert parts == [(2, 6), (8, 1), (5, 6), (8, 2), (8, 6), (8, 3)]
    assert [one.batch_sizes for one in drawn[:4]] == [[1, 4], [1, 4], [], []]
    assert len(set(chosen.run_folders())) == 4
    assert steps[-1].command[-4:] == [str(folder) for folder in chosen.run_folders()]


def test_share_is_everything_at_the_end():
    for total in (5, 8, 64):
        for rounds in range(1, total + 1):
            shares = [share(total, number, rounds) for number in range(rounds)]
            assert shares == sorted(shares)
            assert shares[0] >= 1
            assert shares[-1] == total


def test_parse_model():
    model = parse_model("some/folder,name=x,tokenizer=other,max_num_seqs=64")
    assert (model.path, model.name, model.tokenizer) == ("some/folder", "x", "other")
    assert model.engine_args == {"max_num_seqs": "64"}
    assert parse_model("some/folder/").name == "folder"


class FakeCommands:
    """Stands in for the processes: notes them, and fails where told."""

    def __init__(self, fail_at=None, code=2):
        self.titles = []
        self.fail_at = fail_at
        self.code = code

    def __call__(self, command):
        self.titles.append(command)
        return self.code if len(self.titles) == self.fail_at else 0


def test_run_plan_resumes(tmp_path, monkeypatch, capsys):
    chosen = plan(tmp_path / "out")
    commands = FakeCommands(fail_at=4)
    monkeypatch.setattr(compare, "_run", commands)
    with pytest.raises(InputError, match="step 4 of 5 failed"):
        run_plan(chosen)
    error = capsys.readouterr().err
    assert re.search(r"\[4/5\] \d+:\d\d round 2 of 2, saturated: teacher and its speeds", error)
    assert "exit code 2: python -m lm_eval_tasks.cli sample" in error

    # Every command is asked again; each knows what it has done.
    again = FakeCommands()
    monkeypatch.setattr(compare, "_run", again)
    run_plan(chosen)
    assert again.titles == [step.command for step in chosen.steps()]


def test_run_plan_is_bound_to_its_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "_run", FakeCommands())
    run_plan(plan(tmp_path))
    begin(tmp_path)
    with pytest.raises(InputError):
        run_plan(plan(tmp_path, rounds=4))
    assert "rounds is 2 there and 4 now" in capsys.readouterr().err


def begin(folder):
    """What the first sample of a step leaves, which binds the folder to its plan."""
    store = folder / "runs" / "saturated" / "teacher" / "samples.jsonl"
    store.parent.mkdir(parents=True)
    store.write_text("{}\n")


def test_plan_that_could_not_begin_binds_nothing(tmp_path, monkeypatch, capsys):
    """A misspelt engine argument ends the first step; the corrected command is another plan."""
    monkeypatch.setattr(compare, "_run", FakeCommands(fail_at=1))
    with pytest.raises(InputError, match="step 1 of 5 failed"):
        run_plan(plan(tmp_path, engine_args={"dtpye": "float32"}))
    monkeypatch.setattr(compare, "_run", FakeCommands())
    chosen = plan(tmp_path)
    run_plan(chosen)
    assert compare.read_plan(tmp_path) is None
    begin(tmp_path)
    assert compare.read_plan(tmp_path) == json.loads(json.dumps(chosen.as_dict()))
    capsys.readouterr()
    with pytest.raises(InputError):
        run_plan(plan(tmp_path, engine_args={"dtype": "bfloat16"}))
    assert "holds another comparison: engine_args is" in capsys.readouterr().err


def test_limits_above_the_problems(tmp_path, capsys):
    """Said with the number that was given, not with a round's share of it."""
    command = ["compare", "--model", "x/a", "--model", "x/b", "--task", "arith"]
    command += ["--out", str(tmp_path / "out"), "--regime", "latency"]
    for given in (["--limit", "1000"], ["--limit", "4", "--latency-limit", "1000"]):
        assert main([*command, *given]) == 2
        error = capsys.readouterr().err
        assert f"{given[-2]} 1000: arith has 300 problems; give 300 or fewer" in error
    assert not (tmp_path / "out").exists()


def test_revision_of_a_model(tmp_path, capsys):
    """The prompts are made by what is drawn, so it is no argument of the engine alone."""
    models = [parse_model("org/x,revision=abc,trust_remote_code=true,dtype=float32")]
    models += [parse_model("org/y")]
    chosen = plan(tmp_path, models=models)
    first, second = (parsed(step, sample_command) for step in chosen.steps()[:2])
    assert (first.model, first.revision, first.trust_remote_code) == ("org/x", "abc", True)
    assert (second.model, second.revision, second.trust_remote_code) == ("org/y", None, False)
    assert not any("revision" in pair for pair in first.engine_args)
    # A comparison of an earlier version, whose plan has neither, goes on.
    assert models[1].as_dict() == {
        "path": "org/y",
        "name": "y",
        "engine_args": {},
        "tokenizer": None,
    }


def test_run_plan_passes_an_interruption_on(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "_run", FakeCommands(fail_at=1, code=130))
    with pytest.raises(KeyboardInterrupt):
        run_plan(plan(tmp_path))


def test_steps_end_with_their_parent(tmp_path):
    """A killed comparison leaves no sampler that writes on unseen."""
    marker = tmp_path / "marker"
    child = (
        "import time, pathlib, sys\n"
        f"pathlib.Path({str(marker)!r}).write_text('started')\n"
        "time.sleep(60)\n"
    )
    parent = "from lm_eval_tasks.compare import _run; import sys; "
    parent += f"_run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen([sys.executable, "-c", parent]) as process:
        for _ in range(600):
            if marker.exists():
                break
            time.sleep(0.05)
        found = children(process.pid)
        assert len(found) == 1
        process.kill()
    for _ in range(100):
        if not alive(found[0]):
            break
        time.sleep(0.05)
    assert not alive(found[0])


def children(pid):
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_compare_command_reports(tmp_path, monkeypatch, capsys):
    """Everything but the engines: the runs are there when the steps have ended."""
    out = tmp_path / "out"

    def steps(chosen):
        for regime in chosen.num_problems:
            for model in chosen.models:
                folder = chosen.run_folder(model, regime)
                make_run(folder, num_problems=4, num_samples=4, regime=regime)

    monkeypatch.setattr("lm_eval_tasks.commands.compare.run_plan", steps)
    command = ["compare", "--model", "x/a", "--model", "x/b", "--task", "arith", "--limit", "4"]
    command += ["--num-samples", "4", "--out", str(out), "--no-png", "--draws", "100"]
    command += ["--regime", "latency", "saturated"]
    assert main(command) == 0
    text = (out / "report" / "report.md").read_text()
    assert "took turns on one machine; rounds: 3, each with its part" in text
    assert "python -m lm_eval_tasks.cli sample --model x/a --name a" in text
    assert text.count("### Seconds until the accuracy of a") == 2, "one for each regime"
    assert "saturated: of the samples of each problem, latency: of the problems" in text
    assert capsys.readouterr().out.count("report.") == 2


def test_compare_command_dry_run(tmp_path, capsys):
    command = ["compare", "--model", "x/a", "--model", "x/b", "--task", "arith", "--limit", "4"]
    assert main([*command, "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7, "three rounds of two models, and grading"
    assert lines[0].startswith("python -m lm_eval_tasks.cli sample --model x/a --name a")
    assert not (tmp_path / "out").exists()


def test_compare_command_keeps_the_rounds_of_its_folder(tmp_path, monkeypatch, capsys):
    """A comparison that an earlier version began with two rounds goes on with two."""
    command = ["compare", "--model", "x/a", "--model", "x/b", "--task", "arith", "--limit", "4"]
    command += ["--out", str(tmp_path), "--dry-run"]
    (tmp_path / "compare.json").write_text('{"rounds": 2}')
    begin(tmp_path)
    assert main(command) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 * 2 + 1
    assert main([*command, "--rounds", "1"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + 1


def test_compare_command_accepts_equal_memory(tmp_path, capsys):
    command = ["compare", "--model", "x/a,gpu_memory_utilization=0.50", "--model", "x/b"]
    command += ["--engine-args", "gpu-memory-utilization=0.5", "--task", "arith", "--limit", "4"]
    assert main([*command, "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    assert "gpu-memory-utilization=0.5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model", "a", "--model", "b,gpu_memory_utilization=0.5"],
            "--model b: b has gpu_memory_utilization=0.5 and a has no gpu_memory_utilization; all",
        ),
        (
            ["--model", "a,kv_cache_memory_bytes=1000", "--model", "b,kv-cache-memory-bytes=2000"],
            "b has kv_cache_memory_bytes=2000 and a has kv_cache_memory_bytes=1000",
        ),
        (
            [
                *("--model", "a", "--model", "b,num_gpu_blocks_override=9"),
                *("--engine-args", "num_gpu_blocks_override=8"),
            ],
            "give num_gpu_blocks_override=VALUE once, with --engine-args",
        ),
        (["--model", "a"], "need at least two to compare"),
        (["--model", "x/a", "--model", "y/a"], "two models are named a"),
        (["--model", "a", "--model", "b,name"], "'name' is no KEY=VALUE"),
        (["--model", "a", "--model", ",name=x"], "need PATH"),
        (["--model", "a", "--model", "b,name=x/y"], "name 'x/y' is a folder's name"),
        (["--model", "a", "--model", "b,dtype=x,dtype=y"], "dtype is given twice"),
        (["--model", "a", "--model", "b", "--num-samples", "0"], "--num-samples 0"),
        (["--model", "a", "--model", "b", "--num-samples", "3", "--rounds", "4"], "--rounds 4"),
        (["--model", "a", "--model", "b", "--num-samples", "2"], "give --rounds 2 or fewer"),
        (["--model", "a", "--model", "b", "--batch-sizes", "0"], "--batch-sizes 0"),
        (["--model", "a", "--model", "b", "--latency-limit", "3"], "add --regime latency"),
        (["--model", "a", "--model", "b", "--reward-model", "x"], "say how it is read with proto"),
        (
            ["--model", "a", "--model", "b", *["--reward-model", "x/prm-tiny"] * 2],
            "two are named prm-tiny",
        ),
        (
            ["--model", "a", "--model", "b", "--regime", "latency", "--rounds", "10"],
            "more than the 9 problems to divide",
        ),
        (["--model", "a", "--model", "b", "--engine-args", "dtype"], "--engine-args dtype"),
        (
            ["--model", "a", "--model", "b", "--engine-args", "revision=abc"],
            "--engine-args revision=...: not accepted; give --model PATH,revision=VALUE",
        ),
        (
            ["--model", "a", "--model", "b,disable-log-stats=true"],
            "--model b: disable-log-stats=...: not accepted; leave it out",
        ),
        (["--model", "a", "--model", "b,model=c"], "--model b: model=...: not accepted; give"),
        (
            ["--model", "a", "--model", "b,trust_remote_code=maybe"],
            "trust_remote_code=maybe is neither true nor false",
        ),
        (
            [*("--model", "a", "--model", "b", "--reward-model", "x/prm-tiny"), "--reward", "prm"],
            "--reward prm: no --reward-model has this name (there: prm-tiny), and ",
        ),
        (["--model", "a", "--model", "b", "--reward", "prm"], "(there: none), and "),
        (["--model", "a", "--model", "b", "--reward-time"], "--reward-time needs the scores"),
    ],
)
def test_compare_command_bad_input(tmp_path, capsys, arguments, message):
    out = tmp_path / "out"
    assert main(["compare", "--task", "arith", "--limit", "9", "--out", str(out), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_compare_command_takes_scores_that_are_there(tmp_path, capsys):
    """Made with thinkfast-eval reward in the folders of a comparison that is begun."""
    command = ["compare", "--model", "x/a", "--model", "x/b", "--task", "arith", "--limit", "4"]
    command += ["--out", str(tmp_path), "--reward", "prm", "--dry-run"]
    for name in ("a", "b"):
        assert main(command) == 2
        assert f"saturated/{name} has no such scores" in capsys.readouterr().err
        make_run(tmp_path / "runs" / "saturated" / name, num_problems=4, reward="prm")
    assert main(command) == 0


def test_timed_draws_have_no_seeds_unless_asked_for(tmp_path, monkeypatch, capsys):
    """A comparison that an earlier version began goes on with the seeds it began with."""
    out = tmp_path / "out"
    command = ["compare", "--model", "x/a", "--model", "x/b", "--task", "arith", "--limit", "4"]
    command += ["--num-samples", "4", "--out", str(out), "--dry-run"]

    def lines(*more):
        assert main([*command, *more]) == 0
        return [line for line in capsys.readouterr().out.splitlines() if " sample " in line]

    assert all(" --seed -1" in line for line in lines())
    assert all(" --seed 7" in line for line in lines("--seed", "7"))
    monkeypatch.setattr(compare, "_run", FakeCommands())
    run_plan(plan(out, sampling=[]))
    begin(out)
    assert not any("--seed" in line for line in lines())
    assert not any("--seed" in line for line in lines("--seed", "1234")), "which it has"
    run_plan(plan(tmp_path / "new", sampling=["--seed", "-1"]))
    begin(tmp_path / "new")
    command[command.index(str(out))] = str(tmp_path / "new")
    assert all(" --seed -1" in line for line in lines())
    run_plan(plan(tmp_path / "seven", sampling=["--seed", "7"]))
    begin(tmp_path / "seven")
    command[command.index(str(tmp_path / "new"))] = str(tmp_path / "seven")
    assert all(" --seed 7" in line for line in lines())
