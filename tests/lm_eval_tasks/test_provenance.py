"""What a report says of how its runs were made: commands, sessions, reward models, changes."""

import json

import pytest
from run_folders import write_run
from synthetic_runs import make_run

from lm_eval_tasks.cli import main
from lm_eval_tasks.provenance import GRADING, commands_of

FAST = ["--no-png", "--draws", "100", "--orders", "8"]


def report(folders, out, *options):
    return main(["report", *map(str, folders), "--out", str(out), *options, *FAST])


def describe(folder, name, command="thinkfast-eval reward RUN --reward org/prm", **fields):
    """Write scores/NAME.json as ``thinkfast-eval reward`` does."""
    reward = {
        "name": name,
        "reward_hash": "r",
        "model_id": "org/prm@main",
        "tokenizer_id": "org/prm@main",
        "protocol": "rlhflow-deepseek",
        "protocol_version": 1,
        "split": "line",
        "backend": "hf",
        "dtype": "auto",
        "max_tokens": None,
        "model": "org/prm",
        "resolved": {"dtype": "float32", "device": "cpu"},
    } | fields
    session = {"started": "2026-01-02T03:04:05+00:00", "command": command, "startup_s": 7.5}
    session |= {"versions": {"vllm": "0.32.0", "torch": "2.13.0"}, "warmup_s": 0.5}
    text = json.dumps({"reward": reward, "sessions": [session]})
    (folder / "scores" / f"{name}.json").write_text(text)


def test_score_keeps_its_command(tmp_path):
    golds = {"gsm8k/0": "18"}
    folder = write_run(tmp_path / "run", golds, {"gsm8k/0": ["\\boxed{18}", "\\boxed{3}"]})
    for _ in range(2):  # the second call has nothing to judge
        assert main(["score", str(folder)]) == 0
    (row,) = [json.loads(line) for line in (folder / GRADING).read_text().splitlines()]
    assert row["command"] == f"thinkfast-eval score {folder}"
    assert row["num_judged"] == 2
    assert "python" in row["versions"]
    assert report([folder], tmp_path / "out") == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert f"\nthinkfast-eval score {folder}\n" in text
    assert "not recorded" not in text


def test_commands_of_all_steps_in_order(tmp_path):
    folder = make_run(tmp_path / "run", num_problems=4, num_samples=4, reward="prm")
    describe(folder, "prm")
    assert report([folder], tmp_path / "out", "--reward", "prm") == 0
    text = (tmp_path / "out" / "report.md").read_text()
    block = text[text.index("### Commands") :].split("```")[1].splitlines()[1:]
    assert block == [
        "thinkfast-eval sample --model run",
        f"thinkfast-eval score {folder}  # not recorded in this run",
        "thinkfast-eval reward RUN --reward org/prm",
    ]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "thinkfast-eval reward RUN --reward org/prm" in page


def test_commands_of_reports_of_earlier_versions():
    run = {"folder": "runs/a", "sessions": [{"command": "x"}, {"command": "x"}, {}], "grading": []}
    assert commands_of([run])[0] == "x"
    assert len(commands_of([run])) == 2


def test_report_describes_the_reward_model(tmp_path):
    folder = make_run(tmp_path / "run", num_problems=4, num_samples=4, reward="prm")
    describe(folder, "prm")
    assert report([folder], tmp_path / "out", "--reward", "prm") == 0
    text = (tmp_path / "out" / "report.md").read_text()
    for line in (
        "### Reward model",
        "| model | org/prm |",
        "| protocol | rlhflow-deepseek |",
        "| split | line |",
        '| resolved | {"dtype": "float32", "device": "cpu"} |',
        "| reward hash | r |",
        "| run | reward prm 1 | 2026-01-02T03:04:05+00:00 |  | 7.5 | 0.5 |",
    ):
        assert line in text, line
    # Without its description the scores still say which they are.
    (folder / "scores" / "prm.json").unlink()
    assert report([folder], tmp_path / "out", "--reward", "prm") == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| reward hash | r |" in text
    assert "scores/NAME.json is missing" in text


def test_report_refuses_different_rewards_of_one_name(tmp_path, capsys):
    for name, value, split in (("a", "r", "line"), ("b", "s", "paragraph")):
        folder = tmp_path / name
        make_run(folder, num_problems=4, num_samples=4, reward="prm", reward_hash=value)
        describe(folder, "prm", split=split, reward_hash=value)
    folders = [tmp_path / "a", tmp_path / "b"]
    assert report(folders, tmp_path / "out", "--reward", "prm") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--reward prm: " in error
    assert "(hashes r and s; split 'line' and 'paragraph')" in error
    assert "--reward SPEC,name=NEW" in error
    # Apart, and without the reward, both are fine.
    assert report(folders, tmp_path / "out") == 0
    assert report(folders[1:], tmp_path / "out", "--reward", "prm") == 0


def test_report_shows_what_changed_between_sessions(tmp_path):
    hardware = {"machine": "x86_64", "processor": "simulated"}
    versions = [{"vllm": "0.31.0"}, {"vllm": "0.32.0"}]
    sessions = [{"versions": one, "hardware": hardware} for one in versions]
    make_run(tmp_path / "a", num_samples=4, slowness=(1.0, 1.0), sessions=sessions)
    make_run(tmp_path / "b", num_samples=4, sessions=[{"versions": versions[1]}])
    assert report([tmp_path / "a", tmp_path / "b"], tmp_path / "out") == 0
    text = (tmp_path / "out" / "report.md").read_text()
    table = text[text.index("### Conditions that changed between the sessions of a run") :]
    assert '| a | versions | sample 1 | {"vllm": "0.31.0"} |' in table
    assert '| a | versions | sample 2 | {"vllm": "0.32.0"} |' in table
    differences = text[text.index("### Settings that differ between the runs") :]
    assert '| versions | a | [{"vllm": "0.31.0"}, {"vllm": "0.32.0"}] |' in differences
    assert '| versions | b | {"vllm": "0.32.0"} |' in differences
    assert "| hardware |" not in differences.split("###")[1]


@pytest.mark.parametrize("change", [{}, {"versions": {"vllm": "0.32.0"}}])
def test_equal_sessions_are_no_change(tmp_path, change):
    sessions = [change, change]
    folder = make_run(tmp_path / "a", num_samples=4, slowness=(1.0, 1.0), sessions=sessions)
    assert report([folder], tmp_path / "out") == 0
    assert "Conditions that changed" not in (tmp_path / "out" / "report.md").read_text()
