"""Resume, ranks, borders, signals, non-finite steps: with stand-ins for models, stages and data."""

import contextlib
import json
import signal

import pytest
import torch

from tests.distill import processes, stand_ins
from thinkfast_distill import cli, distributed, parts
from thinkfast_distill import config as config_module
from thinkfast_distill.checkpoint import CheckpointError, CheckpointStore
from thinkfast_distill.loop import Interrupted, Trainer, TrainingError
from thinkfast_distill.recipe import RecipeError
from thinkfast_distill.run_log import read_log

PATCHED = (
    "teacher_config",
    "tokenizer",
    "load_teacher",
    "place_teacher",
    "build_student",
    "initialise",
    "build_stage",
    "end_to_end_objective",
    "loader",
    "micro_batches",
    "normalised",
)


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch):
    for name in PATCHED:
        monkeypatch.setattr(parts, name, getattr(parts, name))  # restored after the test
    stand_ins.install()


class Killed(BaseException):
    """Ends the session at once, as a kill would: nothing in the loop catches it."""


def train(path, run, *, kill_at=None, max_steps=None, **changes):
    config = config_module.load(stand_ins.write_recipe(path, **changes))

    def on_step(progress):
        if progress.step == kill_at:
            raise Killed

    trainer = Trainer(
        config,
        run,
        distributed.World(),
        on_step=on_step,
        max_steps=max_steps,
        show_progress=False,
    )
    return trainer.train()


def curve(run):
    """(event, stage, step) -> loss; every key once."""
    found = {}
    for record in read_log(run / "log.jsonl"):
        if record["event"] in ("train", "skip", "eval"):
            key = (record["event"], record["stage"], record["stage_step"])
            assert key not in found, f"{key} logged twice"
            found[key] = record["loss"]
    return found


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    patch = pytest.MonkeyPatch()
    for name in PATCHED:
        patch.setattr(parts, name, getattr(parts, name))
    stand_ins.install()
    progress = train(folder / "r.yaml", folder / "run")
    patch.undo()
    assert progress.step == 12
    return folder


def weights(run):
    student = stand_ins.Model()
    store = CheckpointStore(run, 1, distributed.World())
    store.load_student(store.latest(), student)
    return student.state_dict()


def test_training_learns(uninterrupted):
    records = read_log(uninterrupted / "run/log.jsonl")
    losses = [r["loss"] for r in records if r["event"] == "train" and r["stage_index"] == 0]
    assert losses[-1] < losses[0]
    evals = [r["loss"] for r in records if r["event"] == "eval" and r["stage_index"] == 1]
    assert evals[-1] < evals[0]


@pytest.mark.parametrize("kill_at", range(1, 13))
def test_resume_after_kill_at_any_step(kill_at, uninterrupted, tmp_path):
    with pytest.raises(Killed):
        train(tmp_path / "r.yaml", tmp_path / "run", kill_at=kill_at)
    with (tmp_path / "run/log.jsonl").open("a") as file:
        file.write('{"event": "train", "st')  # a line that the kill tore
    progress = train(tmp_path / "r.yaml", tmp_path / "run")
    assert progress.step == 12
    assert curve(tmp_path / "run") == curve(uninterrupted / "run")  # bit by bit
    expected = weights(uninterrupted / "run")
    for name, value in weights(tmp_path / "run").items():
        assert torch.equal(value, expected[name]), name


def test_resume_after_sigkill_and_sigterm_of_a_process(uninterrupted, tmp_path):
    recipe, run = stand_ins.write_recipe(tmp_path / "r.yaml"), tmp_path / "run"
    killed = start(recipe, run, "kill-at", "5")
    assert killed.returncode == -signal.SIGKILL
    stopped = start(recipe, run, "stop-at", "9")
    assert stopped.returncode == 128 + signal.SIGTERM
    assert stopped.stderr == "thinkfast-distill run: stopped by SIGTERM, state saved\n"
    saved = CheckpointStore(run, 1, distributed.World()).latest()
    assert saved.progress.step == 9  # not a step that is saved anyway
    assert train(recipe, run).step == 12
    found, expected = curve(run), curve(uninterrupted / "run")
    assert found.keys() == expected.keys()
    assert list(found.values()) == pytest.approx(list(expected.values()), rel=1e-6)


def start(recipe, run, *options, ranks=1):
    folder = run.parent
    return processes.start(stand_ins.main, recipe, run, *options, ranks=ranks, folder=folder)


@pytest.mark.parametrize("stop_at", [3, 8])
def test_resume_on_two_ranks(stop_at, uninterrupted, tmp_path):
    """1 -> 2 ranks in the first stage, with a border and FSDP2 after it, and back to 1."""
    recipe, run = stand_ins.write_recipe(tmp_path / "r.yaml"), tmp_path / "run"
    assert train(recipe, run, max_steps=stop_at).step == stop_at
    two = start(recipe, run, "max-steps", "11", ranks=2)
    assert two.returncode == 0, two.stderr
    assert train(recipe, run).step == 12
    found, expected = curve(run), curve(uninterrupted / "run")
    assert found.keys() == expected.keys()
    assert list(found.values()) == pytest.approx(list(expected.values()), rel=1e-5)
    records = read_log(run / "log.jsonl")
    whole = read_log(uninterrupted / "run/log.jsonl")
    for key in ("grad_norm", "packing_efficiency", "valid_token_fraction"):
        series = [[r[key] for r in log if r["event"] == "train"] for log in (records, whole)]
        assert series[0] == pytest.approx(series[1], rel=1e-5), key
    ranks = [r["hardware"]["num_ranks"] for r in records if r["event"] == "session"]
    assert ranks == [1, 2, 1]


def test_held_out_rows_are_cut_as_those_of_the_stage(tmp_path, monkeypatch):
    """Otherwise stage 1's matrices of a whole batch would not fit where training does."""
    rows = {"hidden_state": set(), "end_to_end": set()}
    for kind, objective in zip(rows, (stand_ins.HiddenState, stand_ins.EndToEnd), strict=True):
        real = objective.evaluate
        monkeypatch.setattr(
            objective,
            "evaluate",
            lambda self, batch, real=real, kind=kind: (
                rows[kind].add(len(batch.input_ids)) or real(self, batch)
            ),
        )
    train(tmp_path / "r.yaml", tmp_path / "run")
    # One row at a time in stage 1, both of a held-out batch in the last one.
    assert rows == {"hidden_state": {1}, "end_to_end": {1, 2}}


def test_recomputation_only_where_the_backward_pass_spans_the_depth(tmp_path, monkeypatch):
    wrapped = []
    monkeypatch.setattr(parts, "checkpoint_blocks", wrapped.append)
    compute = {"activation_checkpointing": True}
    train(tmp_path / "r.yaml", tmp_path / "run", max_steps=6, compute=compute)
    assert wrapped == []
    train(tmp_path / "r.yaml", tmp_path / "run", compute=compute)
    assert len(wrapped) == 1


def test_what_a_stage_read_is_recorded_at_its_end(uninterrupted, tmp_path, capsys):
    """Up to the last batch that was trained on, not the last one that was prepared."""
    records = read_log(uninterrupted / "run/log.jsonl")
    found = [(r["stage"], r["stage_step"], r["data"]) for r in records if r["event"] == "data"]
    assert [(stage, step) for stage, step, _ in found] == [("hidden_state", 6), ("end_to_end", 6)]
    for _, _, data in found:
        assert data["sources"][0]["dropped"]["ngram"] == 6
    recipe = stand_ins.write_recipe(tmp_path / "r.yaml")
    assert cli.main(f"run {recipe} --run-dir {tmp_path / 'run'} --max-steps 6".split()) == 0
    assert "source data: documents left out: 6 ngram" in capsys.readouterr().err


def test_max_steps_stops_saved_and_keeps_the_schedule(uninterrupted, tmp_path):
    train(tmp_path / "r.yaml", tmp_path / "run", max_steps=5)
    assert train(tmp_path / "r.yaml", tmp_path / "run", max_steps=5).step == 5
    train(tmp_path / "r.yaml", tmp_path / "run")
    assert curve(tmp_path / "run") == curve(uninterrupted / "run")


def test_run_that_is_finished_does_nothing(uninterrupted):
    before = (uninterrupted / "run/log.jsonl").read_bytes()
    assert train(uninterrupted / "r.yaml", uninterrupted / "run").step == 12
    assert (uninterrupted / "run/log.jsonl").read_bytes() == before


def test_micro_batches_do_not_change_the_curve(uninterrupted, tmp_path):
    stages = [dict(stage) for stage in stand_ins.RECIPE["stages"]]
    stages[0]["micro_batch_rows"], stages[1]["micro_batch_rows"] = 4, 1
    train(tmp_path / "r.yaml", tmp_path / "run", stages=stages)
    found, expected = curve(tmp_path / "run"), curve(uninterrupted / "run")
    assert list(found.values()) == pytest.approx(list(expected.values()), rel=1e-5)


def test_checkpoint_of_another_recipe_names_the_keys(tmp_path):
    train(tmp_path / "r.yaml", tmp_path / "run", max_steps=1)
    before = sorted(tmp_path.rglob("*"))
    stages = [dict(stage) for stage in stand_ins.RECIPE["stages"]]
    stages[1]["lr"] = 0.5
    with pytest.raises(RecipeError) as caught:
        train(tmp_path / "r.yaml", tmp_path / "run", stages=stages, seed=3)
    assert "stages.1.lr (0.02 -> 0.5)" in str(caught.value)
    assert "seed (42 -> 3)" in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before
    # What does not change the result may differ.
    free = {"checkpoint": {"every_steps": 1}, "logging": {"peak_flops_per_s": 1e9}}
    stages = [dict(stage) for stage in stand_ins.RECIPE["stages"]]
    stages[0]["micro_batch_rows"] = 2
    stages[1]["loss"] = {"chunk_tokens": 7}
    free |= {"stages": stages, "teacher": {"model": "none", "placement": "shard"}}
    assert train(tmp_path / "r.yaml", tmp_path / "run", max_steps=2, **free).step == 2


def test_other_rounding_is_said_and_recorded(tmp_path, capsys):
    recipe = stand_ins.write_recipe(tmp_path / "r.yaml")

    def session(steps, *overrides):
        words = ["run", recipe, "--run-dir", tmp_path / "run", "--max-steps", steps, *overrides]
        assert cli.main(list(map(str, words))) == 0
        record = [r for r in read_log(tmp_path / "run/log.jsonl") if r["event"] == "session"][-1]
        shown = capsys.readouterr().err.splitlines()
        return [line for line in shown if "rounding" in line], record

    shown, record = session(1)
    assert shown == []
    assert record["rounding"] == {
        "compute.precision": "float32",
        "compute.kernels": "reference",
        "teacher.dtype": "float32",
    }
    assert record["rounding_before"] == {}
    shown, record = session(2, "compute.precision=bfloat16", "teacher.dtype=bfloat16")
    assert shown == [
        f"{key}: float32 before, bfloat16 now; the curve goes on with other rounding"
        for key in ("compute.precision", "teacher.dtype")
    ]
    assert record["rounding_before"] == {"compute.precision": "float32", "teacher.dtype": "float32"}
    assert record["rounding"]["compute.precision"] == "bfloat16"
    shown, record = session(3, "compute.precision=bfloat16", "teacher.dtype=bfloat16")
    assert (shown, record["rounding_before"]) == ([], {})


def test_data_that_ends_early_saves_and_says_so(tmp_path):
    data = {"text": {"sources": [{"kind": "arith", "num": 3}]}}
    with pytest.raises(ValueError, match=r"data.jsonl: ends after 3 batches"):
        train(tmp_path / "r.yaml", tmp_path / "run", data=data, evaluation={})
    saved = CheckpointStore(tmp_path / "run", 1, distributed.World()).latest()
    assert saved.progress.step == 3


def test_non_finite_step_is_skipped_and_counted(tmp_path, monkeypatch):
    monkeypatch.setenv("STAND_IN_NAN", "1")  # batch 5 of the second stage
    progress = train(tmp_path / "r.yaml", tmp_path / "run", evaluation={})
    assert progress.step == 12
    assert progress.skipped_steps == 1
    assert progress.skipped_in_a_row == 1  # it was the last one
    skips = [r for r in read_log(tmp_path / "run/log.jsonl") if r["event"] == "skip"]
    assert len(skips) == 1
    assert skips[0]["stage_step"] == 6
    assert "data:5" in skips[0]["sample_ids"][0]
    assert all(value.isfinite().all() for value in weights(tmp_path / "run").values())


def test_non_finite_steps_in_a_row_stop_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("STAND_IN_NAN", "1")
    with pytest.raises(TrainingError, match=r"1 steps in a row .*not finite; .*data:5"):
        train(
            tmp_path / "r.yaml",
            tmp_path / "run",
            evaluation={},
            compute={"max_skipped_steps": 1},
        )


def test_steps_without_targets_are_no_failure_of_the_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(stand_ins.Objective, "count", lambda self, batch: 0)
    with pytest.raises(TrainingError, match=r"2 steps in a row .*nothing in the batch counts"):
        train(tmp_path / "r.yaml", tmp_path / "run", compute={"max_skipped_steps": 2})
    skips = [r for r in read_log(tmp_path / "run/log.jsonl") if r["event"] == "skip"]
    assert [r["reason"] for r in skips] == ["nothing in the batch counts for the loss"] * 2


def test_freeze_table_is_shown_at_the_start_and_after_a_resume(tmp_path, capsys):
    recipe = stand_ins.write_recipe(tmp_path / "r.yaml")
    for steps in (1, 2):
        assert (
            cli.main(f"run {recipe} --run-dir {tmp_path / 'run'} --max-steps {steps}".split()) == 0
        )
        shown = capsys.readouterr().err
        assert "stage hidden_state (hidden_state), 6 steps" in shown
        # Three blocks of an 8 x 8 mixer with bias; matrices decay, biases do not.
        assert " ".join(shown.split()).count("ssm 216 0 192") == 1
        assert "mlp 0 216 0" in " ".join(shown.split())
        assert "tok/s | MFU" in shown


def test_two_processes_in_one_folder(tmp_path):
    config = config_module.load(stand_ins.write_recipe(tmp_path / "r.yaml"))
    first = Trainer(config, tmp_path / "run", distributed.World(), show_progress=False)
    with pytest.raises(RecipeError, match="another process trains in this folder"):
        Trainer(config, tmp_path / "run", distributed.World(), show_progress=False)
    first.train()


def test_sigint_is_a_stop(tmp_path):
    config = config_module.load(stand_ins.write_recipe(tmp_path / "r.yaml"))
    trainer = Trainer(
        config,
        tmp_path / "run",
        distributed.World(),
        show_progress=False,
        on_step=lambda progress: signal.raise_signal(signal.SIGINT),
    )
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="SIGINT"):
        trainer.train()
    assert signal.getsignal(signal.SIGINT) is handler
    saved = CheckpointStore(tmp_path / "run", 1, distributed.World()).latest()
    assert saved.progress.step == 1


def test_ranks_must_share_the_rows_evenly(tmp_path):
    config = config_module.load(stand_ins.write_recipe(tmp_path / "r.yaml"))
    with pytest.raises(RecipeError, match=r"stages.0.batch_tokens: 32 are 4 rows .* 3 ranks"):
        Trainer(config, tmp_path / "run", distributed.World(size=3))
    assert not (tmp_path / "run").exists()


def test_checkpoint_without_room_keeps_the_previous(uninterrupted, tmp_path):
    """A file size limit makes a real write fail half-way, as a full disk does."""
    recipe, run = stand_ins.write_recipe(tmp_path / "r.yaml"), tmp_path / "run"
    train(recipe, run, max_steps=2)
    before = CheckpointStore(run, 2, distributed.World()).latest_folder()
    failed = start(recipe, run, "file-bytes", "8000")
    assert failed.returncode == 2
    assert failed.stderr.startswith(f"thinkfast-distill run: {run / 'checkpoints'}/step_")
    assert f"the previous checkpoint {before} is unchanged" in failed.stderr
    assert failed.stderr.count("\n") == 1
    store = CheckpointStore(run, 2, distributed.World())
    assert store.latest_folder() == before
    assert not list(store.folder.glob(".partial-*"))
    assert train(recipe, run).step == 12
    assert curve(run) == curve(uninterrupted / "run")


def test_checkpoint_that_cannot_fit_is_not_begun(tmp_path, monkeypatch):
    from thinkfast_distill import checkpoint

    class Usage:
        free = 10

    train(tmp_path / "r.yaml", tmp_path / "run", max_steps=2)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda folder: Usage)
    with pytest.raises(CheckpointError, match=r"No space left|needed, 0.00 GB free"):
        train(tmp_path / "r.yaml", tmp_path / "run")
    assert CheckpointStore(tmp_path / "run", 2, distributed.World()).latest().progress.step == 2


def test_progress_is_json(uninterrupted):
    folder = CheckpointStore(uninterrupted / "run", 1, distributed.World()).latest_folder()
    state = json.loads((folder / "state.json").read_text())
    assert state["progress"]["stage"] == 2
    assert state["config"]["seed"] == 42
    assert state["environment"]["torch"] == torch.__version__


def test_held_out_data_that_cannot_be_read_costs_no_step(tmp_path, monkeypatch):
    """After a resume the first measurement may be many steps away."""
    train(tmp_path / "r.yaml", tmp_path / "run", max_steps=1)
    real = stand_ins.Loader.next

    def fails(self, rank, world_size):
        if self.seed == parts.seed_for(42, "evaluation"):
            raise ValueError("held-out.jsonl:7: not JSON")
        return real(self, rank, world_size)

    monkeypatch.setattr(stand_ins.Loader, "next", fails)
    with pytest.raises(ValueError, match="held-out"):
        train(tmp_path / "r.yaml", tmp_path / "run")
    steps = [r["step"] for r in read_log(tmp_path / "run/log.jsonl") if r["event"] == "train"]
    assert steps == [1]


@pytest.mark.parametrize("at", [3, 6])  # in the middle and at the end of a stage
def test_evaluation_that_fails_is_saved_and_repeated(at, uninterrupted, tmp_path, monkeypatch):
    """A teacher that is not finite on held-out text must not cost the steps before."""
    options = {"checkpoint": {"every_steps": 100}}
    with monkeypatch.context() as patch:
        evaluate = stand_ins.HiddenState.evaluate
        found = []

        def overflow(self, batch):
            if self.student.training is False and trainers[0].progress.stage_step == at:
                found.append("held-out:7")
            return evaluate(self, batch)

        trainers = []
        init = Trainer.__init__
        patch.setattr(
            Trainer, "__init__", lambda self, *a, **k: trainers.append(self) or init(self, *a, **k)
        )
        patch.setattr(stand_ins.HiddenState, "evaluate", overflow)
        patch.setattr(
            stand_ins.Model, "noting_not_finite", lambda self: contextlib.nullcontext(found)
        )
        with pytest.raises(TrainingError, match="not finite for samples held-out:7"):
            train(tmp_path / "r.yaml", tmp_path / "run", **options)
    saved = CheckpointStore(tmp_path / "run", 1, distributed.World()).latest()
    assert saved.progress.step == at
    assert train(tmp_path / "r.yaml", tmp_path / "run", **options).step == 12
    assert curve(tmp_path / "run") == curve(uninterrupted / "run")


def test_data_file_that_cannot_be_read_any_more_saves(tmp_path, monkeypatch):
    real = stand_ins.Loader.next

    def fails(self, rank, world_size):
        if self.step == 3:
            raise OSError("stale file handle")
        return real(self, rank, world_size)

    monkeypatch.setattr(stand_ins.Loader, "next", fails)
    with pytest.raises(OSError, match="stale file handle"):
        train(tmp_path / "r.yaml", tmp_path / "run", evaluation={}, checkpoint={"every_steps": 9})
    saved = CheckpointStore(tmp_path / "run", 1, distributed.World()).latest()
    assert saved.progress.step == 3


def test_nothing_is_saved_before_the_first_step(tmp_path):
    """It would hold the run to a recipe that could not even begin."""
    data = {"text": {"sources": [{"kind": "arith", "num": 0}]}}
    with pytest.raises(ValueError, match=r"data.jsonl: ends"):
        train(tmp_path / "r.yaml", tmp_path / "run", data=data, evaluation={})
    assert CheckpointStore(tmp_path / "run", 1, distributed.World()).latest() is None
    assert train(tmp_path / "r.yaml", tmp_path / "run", max_steps=1, seed=3).step == 1


def test_checkpoint_is_read_once_and_behind_the_lock(tmp_path, monkeypatch):
    """Another process that trains in the folder may publish one at any time."""
    config = config_module.load(stand_ins.write_recipe(tmp_path / "r.yaml"))
    train(tmp_path / "r.yaml", tmp_path / "run", max_steps=3)
    latest, found = CheckpointStore.latest, []

    def read(self):
        found.append(self)
        return latest(self)

    monkeypatch.setattr(CheckpointStore, "latest", read)
    first = Trainer(config, tmp_path / "run", distributed.World(), show_progress=False)
    with pytest.raises(RecipeError, match="another process trains in this folder"):
        Trainer(config, tmp_path / "run", distributed.World(), show_progress=False)
    assert first.train().step == 12
    assert len(found) == 1
