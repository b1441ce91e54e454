"""Whole runs with the real parts: stages, progressive replacement, ranks, export, messages."""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from torch.distributed.launcher.api import LaunchConfig

from tests.distill import processes, stand_ins
from tests.distill.tiny_run import run
from tests.distill.tiny_run import write_recipe as recipe
from thinkfast_distill import cli
from thinkfast_distill.checkpoint import CheckpointStore, Progress, read
from thinkfast_distill.distributed import World
from thinkfast_distill.run_log import read_log

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "distill" / "recipes"
RECIPES_PAGE = ROOT / "docs" / "recipes.md"


def two_ranks(folder, *words):
    words = ("run", *words, "--run-dir", folder / "run", "--quiet")
    found = processes.start(cli.main, *words, ranks=2, folder=folder)
    assert found.returncode == 0, found.stderr
    return curve(folder / "run")


def curve(folder):
    records = read_log(folder / "log.jsonl")
    return {
        (r["event"], r["stage"], r["stage_step"]): r["loss"]
        for r in records
        if r["event"] in ("train", "eval")
    }


@pytest.fixture(scope="module")
def llamba(tmp_path_factory, teacher):
    folder = tmp_path_factory.mktemp("llamba")
    path = recipe(folder, teacher)
    assert run(path, "--run-dir", folder / "run") == 0
    return folder


def test_three_stages_learn_and_log(llamba):
    records = read_log(llamba / "run" / "log.jsonl")
    trained = [r for r in records if r["event"] == "train"]
    assert [r["stage"] for r in trained] == [
        *["matrix_mixing"] * 3,
        *["hidden_state"] * 3,
        *["end_to_end"] * 3,
    ]
    for record in trained[:6]:
        assert record["baseline_by_layer"].keys() == record["alignment_by_layer"].keys()
    for key in ("reverse_kl", "forward_kl", "cross_entropy", "teacher_cross_entropy"):
        assert trained[-1][key] > 0, key
    for key in ("teacher_entropy", "top1_agreement", "tokens_per_s", "mfu", "peak_memory_bytes"):
        assert trained[-1][key] >= 0, key
    assert trained[-1]["grad_norm"] ** 2 == pytest.approx(
        sum(part**2 for part in trained[-1]["grad_norm_by_part"].values())
    )
    assert 0 < trained[-1]["valid_token_fraction"] < trained[-1]["packing_efficiency"] <= 1
    assert sum(trained[-1]["source_tokens"].values()) <= trained[-1]["tokens"] == 9 * 256
    held_out = [r["reverse_kl"] for r in records if r["event"] == "eval"]
    assert held_out[-1] < held_out[0]


@pytest.mark.slow
def test_two_ranks_with_shards_give_the_same_curve(llamba, teacher, tmp_path):
    """1 -> 2 ranks in a stage; the one test that starts the real torchrun."""
    path = recipe(tmp_path, teacher)
    assert run(path, "--run-dir", tmp_path / "run", "--max-steps", 5) == 0
    two = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node=2", "-m", "thinkfast_distill.cli", "run", str(path)),
            *("--run-dir", str(tmp_path / "run"), "--quiet"),
        ],
        env={**os.environ, "PYTHONPATH": processes.PYTHONPATH, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert two.returncode == 0, two.stderr
    found, expected = curve(tmp_path / "run"), curve(llamba / "run")
    assert found.keys() == expected.keys()
    assert list(found.values()) == pytest.approx(list(expected.values()), rel=2e-4)


def test_two_ranks_with_a_sharded_teacher_and_recomputation(llamba, teacher, tmp_path):
    path = recipe(tmp_path, teacher, compute={"activation_checkpointing": True})
    found = two_ranks(tmp_path, path, "teacher.placement=shard")
    expected = curve(llamba / "run")
    assert list(found.values()) == pytest.approx(list(expected.values()), rel=2e-4)


def test_teacher_that_is_not_finite_on_one_of_two_ranks(teacher, tmp_path):
    """Both learn of it in the sums, save the finished steps and stop; its advice works."""
    stages = [("end_to_end", {"tokens": 4 * 256})]
    more = {"evaluation": {}, "checkpoint": {"every_steps": 50}}
    path = recipe(tmp_path, teacher, stages=stages, **more)
    words = ("run", path, "--run-dir", tmp_path / "run", "--quiet")
    start = functools.partial(
        processes.start, stand_ins.main_with_broken_teacher, ranks=2, folder=tmp_path
    )
    stopped = start(*words, "teacher.dtype=bfloat16")
    assert 2 in stopped.returncodes  # the other may have been ended before its exit
    (line,) = set(stopped.stderr.splitlines())
    assert line.startswith("thinkfast-distill run: teacher: hidden states are not finite for")
    assert "use teacher.dtype: float32 and the same command continues" in line
    saved = CheckpointStore(tmp_path / "run", 1, World()).latest()
    assert (saved.progress.step, saved.environment["num_ranks"]) == (2, 2)
    assert start(*words).returncode == 0
    steps = [r["step"] for r in read_log(tmp_path / "run/log.jsonl") if r["event"] == "train"]
    assert steps == [1, 2, 3, 4]


def test_two_replicas_give_the_same_curve(llamba, teacher, tmp_path):
    found = two_ranks(tmp_path, recipe(tmp_path, teacher, compute={"replicas": 2}))
    expected = curve(llamba / "run")
    assert list(found.values()) == pytest.approx(list(expected.values()), rel=2e-4)


def test_progressive_replacement(teacher, tmp_path):
    path = recipe(
        tmp_path,
        teacher,
        kind="mambainllama",
        layout={"attention_layers": [], "mamba_version": "mamba2"},
        stages=[
            ("end_to_end", {"name": "none", "attention_layers": [0, 1], "tokens": 256}),
            ("hidden_state", {"name": "one", "attention_layers": [0]}),
            ("hidden_state", {"name": "both"}),
        ],
    )
    assert run(path, "--run-dir", tmp_path / "run", "--max-steps", 5) == 0
    assert run(path, "--run-dir", tmp_path / "run") == 0
    kl = {(r["stage"], r["stage_step"]): r["reverse_kl"]
          for r in read_log(tmp_path / "run/log.jsonl") if r["event"] == "eval"}  # fmt: skip
    # Nothing replaced: student and teacher are one model, which tests the harness itself.
    assert abs(kl["none", 0]) < 1e-6
    assert kl["one", 3] < kl["one", 0]
    assert kl["both", 3] < kl["both", 0]
    assert abs(kl["one", 0]) < kl["both", 0]


def test_pretrain_export_distil(tmp_path):
    """From nothing to a served student, as the shipped arith recipes do it."""
    evaluation = ("evaluation.num_batches=1", "evaluation.batch_rows=2")

    def one_step_each(path):
        stages = yaml.safe_load(path.read_text())["stages"]
        return [f"stages.{i}.tokens=2048" for i in range(len(stages))]

    scratch = RECIPES / "arith-teacher-tiny.yaml"
    small = (*one_step_each(scratch), *evaluation)
    assert run(scratch, *small, "--run-dir", tmp_path / "t") == 0
    assert cli.main(["export", str(tmp_path / "t"), str(tmp_path / "teacher")]) == 0
    for name in ("llamba", "mambainllama"):
        path = RECIPES / f"arith-{name}-tiny.yaml"
        options = (f"teacher.model={tmp_path / 'teacher'}", *one_step_each(path), *evaluation)
        assert run(path, *options, "--run-dir", tmp_path / name) == 0
        assert cli.main(["export", str(tmp_path / name), str(tmp_path / f"{name}-out")]) == 0
        exported = json.loads((tmp_path / f"{name}-out" / "config.json").read_text())
        assert exported["model_type"] == name
        assert (tmp_path / f"{name}-out" / "chat_template.jinja").is_file()
        card = (tmp_path / f"{name}-out" / "README.md").read_text()
        assert "arith-train" in card
        assert "end_to_end" in card


def test_log_says_what_each_stage_read(llamba):
    records = read_log(llamba / "run" / "log.jsonl")
    found = [r for r in records if r["event"] == "data"]
    assert [r["stage"] for r in found] == ["matrix_mixing", "hidden_state", "end_to_end"]
    before = 0
    for record in found:
        (source,) = record["data"]["sources"]
        assert source["name"] == "arith-train-4-4"
        trained = max(
            r["source_tokens"]["arith-train-4-4"]
            for r in records
            if r["event"] == "train" and r["stage"] == record["stage"]
        )
        waiting = source["tokens"] - (trained - before)  # documents for the next batch
        assert 0 <= waiting < 2 * 256
        before = trained
        assert source["dropped"] == {"exact": 0, "ngram": 0, "long": 0}
        assert record["data"]["decontamination"] is None


def test_card_has_each_stage_s_own_loss(llamba, tmp_path):
    """In stages 1 and 2 the plain "loss" of the log is the end-to-end one."""
    assert cli.main(["export", str(llamba / "run"), str(tmp_path / "out")]) == 0
    measured = {
        (r["stage"], r["stage_step"]): r
        for r in read_log(llamba / "run" / "log.jsonl")
        if r["event"] == "eval"
    }
    facts = json.loads((tmp_path / "out" / "thinkfast_export.json").read_text())
    start, *stages = facts["stages"]
    first = measured["matrix_mixing", 0]
    assert start["name"] == "start"
    assert start["tokens"] == 0
    assert start["metrics"]["reverse_kl"] == pytest.approx(first["reverse_kl"])
    assert "loss" not in start["metrics"]
    for stage in stages:
        before, after = (measured[stage["name"], step] for step in (0, 3))
        is_last = stage["name"] == "end_to_end"
        for key, record in (("loss before", before), ("loss", after), ("baseline", after)):
            name = key.split()[0]
            expected = record.get(name if is_last else f"{stage['kind']}_{name}")
            assert stage["metrics"].get(key) == pytest.approx(expected), (stage["name"], key)
        assert ("baseline" in stage["metrics"]) != is_last
        assert stage["metrics"]["reverse_kl"] == pytest.approx(after["reverse_kl"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| tokens | steps | loss before | loss | baseline | reverse_kl |" in card
    assert "| start |" in card


def test_card_without_held_out_data_has_training_losses(teacher, tmp_path):
    """Of each stage's first and last step up to the checkpoint, and named as what they are."""
    stages = [("hidden_state", {}), ("end_to_end", {})]
    path = recipe(tmp_path, teacher, stages=stages, evaluation={"data": None})
    assert run(path, "--run-dir", tmp_path / "run", "--max-steps", 5) == 0
    log = tmp_path / "run" / "log.jsonl"
    trained = [r for r in read_log(log) if r["event"] == "train"]
    after = {**trained[-1], "stage_step": 3, "step": 6, "loss": 99.0}  # not in the checkpoint
    log.write_text(log.read_text() + json.dumps(after) + "\n")
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    facts = json.loads((tmp_path / "out" / "thinkfast_export.json").read_text())
    assert [stage["metrics"] for stage in facts["stages"]] == [
        {"first training loss": trained[first]["loss"], "last training loss": trained[last]["loss"]}
        for first, last in ((0, 2), (3, 4))
    ]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| tokens | steps | first training loss | last training loss |" in card
    assert "Nothing was measured on held-out text." in card
    assert "Measured on held-out text." not in card


def test_slurm_job_has_time_to_save(monkeypatch):
    """Between SIGTERM and the time limit; torchrun's own default is 30 s."""
    text = (ROOT / "distill" / "slurm" / "run.sbatch").read_text()
    ((name, timeout),) = re.findall(r"^export (TORCH\w+TIMEOUT)=(\d+)$", text, re.M)
    (lead,) = re.findall(r"--signal=TERM@(\d+)", text)
    assert 90 <= int(timeout) < int(lead)
    monkeypatch.setenv(name, timeout)
    assert LaunchConfig(1, 1, 1).shutdown_timeout == int(timeout)


def test_hub_data_without_decontamination_is_named(tmp_path, capsys, monkeypatch):
    """In the dry run and at the start of a run; trained mixtures only."""
    path = RECIPES / "llama-3.2-1b-llamba.yaml"
    mixture = yaml.safe_load(path.read_text())["stages"][0]["data"]
    note = (
        f"mixture {mixture}: nothing is decontaminated; name the problems you will evaluate on in "
        f"data.{mixture}.decontaminate"
    )
    named = f"data.{mixture}.decontaminate=[problems.jsonl]"

    class Trainer:
        def __init__(self, *given, **options):
            pass

        def train(self):
            return Progress()

    monkeypatch.setattr("thinkfast_distill.loop.Trainer", Trainer)
    monkeypatch.setattr("thinkfast_distill.distributed.start", lambda compute: World())
    start = ("--run-dir", str(tmp_path))
    for words, is_noted in ((("--dry-run",), True), (start, True), ((named, "--dry-run"), False),
                            ((named, *start), False), (("--quiet", *start), False)):  # fmt: skip
        assert cli.main(["run", str(path), *words]) == 0
        lines = "".join(capsys.readouterr()).splitlines()
        assert lines.count(note) == is_noted, words
    assert cli.main(["run", str(RECIPES / "arith-teacher-tiny.yaml"), "--dry-run"]) == 0
    assert "nothing is decontaminated" not in capsys.readouterr().out


def test_commands_in_recipes_and_help_name_files_that_exist(capsys):
    """As typed in the root of the checkout, where models like thinkfast/llama-tiny are found."""
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    for path in (*RECIPES.glob("*.yaml"), *(ROOT / "distill" / "slurm").iterdir()):
        lines += path.read_text().splitlines()
    commands = [line for line in lines if "thinkfast" in line or "sbatch" in line]
    named = [word for line in commands for word in line.split() if word.endswith(".yaml")]
    assert len(named) >= 8
    for word in named:
        assert (ROOT / word).is_file(), word


def test_status(llamba, capsys):
    assert cli.main(["status", str(llamba / "run"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["is_finished"]
    assert found["step"] == found["total_steps"] == 9
    assert found["left_s"] == 0
    assert [stage["step"] for stage in found["stages"]] == [3, 3, 3]
    assert cli.main(["status", str(llamba / "run")]) == 0
    assert "tiny: finished, 2,304 tokens" in capsys.readouterr().out


def test_checkpoint_states_its_origin(llamba):
    checkpoint = read(llamba / "run" / "checkpoints" / "step_00000009_end")
    assert checkpoint.config["name"] == "tiny"
    assert checkpoint.environment["num_ranks"] == 1


@pytest.mark.parametrize("name", sorted(path.name for path in RECIPES.glob("*.yaml")))
def test_dry_run_of_every_recipe_without_its_teacher(name, teacher, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    needs_teacher = name == "sft.yaml" or (name.startswith("arith") and "teacher" not in name)
    options = [f"teacher.model={teacher}"] if needs_teacher else []
    code = cli.main(["run", str(RECIPES / name), *options, "--dry-run", "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    found = json.loads(captured.out)
    assert found["device_hours"] > 0
    assert all(stage["trainable_parameters"] > 0 for stage in found["stages"])
    hours = re.findall(rf"^\| `{name[:-5]}` \| (\d+) \|$", RECIPES_PAGE.read_text(), re.M)
    assert len(hours) == name.startswith("llama-3.2")
    assert all(f"{found['device_hours']:.0f}" == h for h in hours), "docs/recipes.md"
    # Held-out batches included; the large recipes are for 8 GPUs with 80 GB.
    assert all(stage["memory_bytes_per_device"]["all"] < 72e9 for stage in found["stages"])


@pytest.mark.parametrize("words", [["status", "nowhere"], ["export", "nowhere", "out"]])
def test_no_run_folder(words, capsys):
    assert cli.main(words) == 2
    assert "no run folder" in capsys.readouterr().err


def test_help_does_not_import_torch():
    code = (
        "import sys; from thinkfast_distill import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": processes.PYTHONPATH}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)


def test_progressive_replacement_from_an_exported_student(teacher, tmp_path):
    """``student.weights`` is the first stage's student; later new mixers are the teacher's."""
    layout = {"attention_layers": [0, 1], "mamba_version": "mamba2"}
    fields = {"kind": "mambainllama", "layout": layout}
    path = recipe(tmp_path, teacher, stages=[("end_to_end", {"tokens": 256})], **fields)
    assert run(path, "--run-dir", tmp_path / "first") == 0
    assert cli.main(["export", str(tmp_path / "first"), str(tmp_path / "out")]) == 0
    fields["layout"] = {**layout, "attention_layers": [0]}
    stages = [
        ("end_to_end", {"name": "none", "attention_layers": [0, 1], "tokens": 256}),
        ("hidden_state", {"name": "one", "tokens": 256}),
    ]
    path = recipe(tmp_path, teacher, stages=stages, **fields)
    words = (path, f"student.weights={tmp_path / 'out'}", "--run-dir", tmp_path / "run")
    assert run(*words) == 0
