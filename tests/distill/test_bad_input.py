"""What a user can get wrong, through the command line: one line, exit code 2, nothing lost."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.distill.tiny_run import run, write_recipe, write_teacher
from thinkfast_distill import cli, parts
from thinkfast_distill.checkpoint import CheckpointStore
from thinkfast_distill.data.arith_tokenizer import build_tokenizer
from thinkfast_distill.data.order import Permutation
from thinkfast_distill.distributed import World
from thinkfast_distill.run_log import read_log
from thinkfast_distill.status import read_run_config


@pytest.fixture
def fails(capsys):
    """Runs words, expects failure, and returns the one line."""

    def check(*words):
        capsys.readouterr()
        assert run(*words) == 2
        text = capsys.readouterr().err
        assert text.startswith("thinkfast-distill run: ")
        assert text.count("\n") == 1, text
        return text

    return check


def saved_step(folder):
    checkpoint = CheckpointStore(folder, 1, World()).latest()
    return None if checkpoint is None else checkpoint.progress.step


def write_lines(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def jsonl(path, **more):
    return {"train": {"sources": [{"kind": "jsonl", "path": str(path), **more}]}}


def text_recipe(folder, teacher, data, **more):
    """One stage of six steps over a text file, saved every two steps."""
    stages = [("end_to_end", {"tokens": 6 * 256})]
    more = {"data": data, "evaluation": {}, "compute": {"prefetch_batches": 0}, **more}
    return write_recipe(folder, teacher, stages=stages, **more)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=x", "seed: 'x' is not of type int"),
        ("stages.hidden_state.learning_rate=1", "unknown key; accepted: kind, data, tokens"),
        ("stages.0.batch_tokens=100", "batch_tokens: 100 must be a multiple of seq_len=64"),
        ("teacher.model=/no/such/folder", "no such folder"),
        ("student.layout.num_heads=3", "must be a multiple of num_heads=3"),
        ("student.layout={ssm_state_size: 16}", "ssm_state_size"),
        ("data.train.sources=[{kind: arith, steps: 3}]", "unknown key; accepted: kind, name"),
        ("data.train.sources=[{kind: jsonl, path: /no/x.jsonl}]", "/no/x.jsonl"),
        ("evaluation.data=other", "'other' is not defined; accepted: held-out, train"),
        ("logging.tracker=wandb", "pip install 'thinkfast-distill[wandb]'"),
        ("stages.1.freeze=['*']", "stages.1: hidden_state: nothing is trained: train=default"),
        ("data.train.sources=[{preset: web}]", "sources.0.preset: 'web' is not accepted"),
    ],
)
def test_mistakes_in_the_recipe(override, message, teacher, tmp_path, fails):
    assert message in fails(write_recipe(tmp_path, teacher), override, "--run-dir", tmp_path / "r")


def test_kernels_that_are_not_installed(teacher, tmp_path, monkeypatch, fails):
    """Said with the install line before anything large is loaded."""
    monkeypatch.setitem(sys.modules, "fla.ops.simple_gla", None)
    monkeypatch.setattr(parts, "load_teacher", lambda config: pytest.fail("loaded"))
    options = ("compute.kernels=fla", "--run-dir", tmp_path / "run")
    text = fails(write_recipe(tmp_path, teacher), *options)
    assert "backend='fla' is not installed" in text
    assert "pip install 'thinkfast-distill[fla]'" in text


def test_nothing_to_train_is_found_by_a_dry_run(teacher, tmp_path, fails):
    path = write_recipe(tmp_path, teacher)
    assert "stages.2: end_to_end: nothing is trained" in fails(
        path, "--dry-run", "stages.2.freeze=['*']"
    )


# -- teacher and student --------------------------------------------------------------------------


def test_tokenizer_with_more_tokens_than_the_teacher(tmp_path, fails):
    """A token without a row would be an index error deep inside of the teacher."""
    small = write_teacher(tmp_path / "small", more_rows=-40)
    text = fails(write_recipe(tmp_path, small), "--run-dir", tmp_path / "run")
    assert "teacher.tokenizer: its largest token id is" in text
    assert "but the teacher's vocabulary has" in text


def test_teacher_whose_head_does_not_fit_its_configuration(teacher, tmp_path, fails):
    other = shutil.copytree(teacher, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "vocab_size": 2000}))
    text = fails(write_recipe(tmp_path, other), "--run-dir", tmp_path / "run")
    assert "mismatched keys, for example" in text
    assert "embed_tokens.weight" in text


def test_teacher_file_that_is_torn(teacher, tmp_path, fails):
    other = shutil.copytree(teacher, tmp_path / "other")
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    text = fails(write_recipe(tmp_path, other), "--run-dir", tmp_path / "run")
    assert f"teacher.model: {other}: cannot be loaded" in text


def test_student_weights_of_another_vocabulary(teacher, tmp_path, capsys, fails):
    larger = write_teacher(tmp_path / "larger", more_rows=8)
    path = write_recipe(tmp_path, larger, stages=[("end_to_end", {"tokens": 256})])
    assert run(path, "--run-dir", tmp_path / "one") == 0
    assert cli.main(["export", str(tmp_path / "one"), str(tmp_path / "student")]) == 0
    path = write_recipe(tmp_path, teacher)
    text = fails(path, f"student.weights={tmp_path / 'student'}", "--run-dir", tmp_path / "two")
    assert "tensors do not fit the student, for example lm_head.weight (there [" in text


def test_heads_that_do_not_fit_are_found_before_earlier_stages_run(teacher, tmp_path, fails):
    path = write_recipe(tmp_path, teacher, stages=[("hidden_state", {}), ("matrix_mixing", {})])
    options = ("student.init=mohawk", "student.layout.num_heads=4")
    text = fails(path, *options, "--run-dir", tmp_path / "run")
    assert "matrix_mixing: the student's mixers have 4 heads, the teacher's attention 2" in text
    assert all(r["event"] == "session" for r in read_log(tmp_path / "run/log.jsonl"))


def test_teacher_weight_that_is_not_finite(teacher, tmp_path, fails):
    broken = shutil.copytree(teacher, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    text = fails(write_recipe(tmp_path, broken), "--run-dir", tmp_path / "run")
    assert "model.layers.1.mlp.up_proj.weight holds values that are not finite" in text


@pytest.mark.parametrize("kind", ["matrix_mixing", "end_to_end"])
def test_teacher_that_overflows_on_some_text(kind, tmp_path, monkeypatch, fails):
    """Finite weights, but one token whose states are not: its samples are named, all is saved."""
    untied = write_teacher(tmp_path / "untied", tie_word_embeddings=False)
    (*_, token) = build_tokenizer().encode("99", add_special_tokens=False)
    load = parts.load_teacher

    def overflowing(config):
        teacher = load(config)
        teacher.model.model.embed_tokens.weight[token] = float("inf")
        return teacher

    monkeypatch.setattr(parts, "load_teacher", overflowing)
    lines = write_lines(tmp_path / "a.jsonl", ["1 + 1 = 2"] * 600)
    path = text_recipe(tmp_path, untied, jsonl(lines))
    options = (path, f"stages.0.kind={kind}", "--run-dir", tmp_path / "run")
    assert run(*options, "--max-steps", 3) == 0
    lines.write_text(lines.read_text().replace("1 + 1 = 2", "1 + 98 = 99"))
    text = fails(*options)
    assert "teacher: hidden states are not finite for samples a:" in text
    assert saved_step(tmp_path / "run") == 3
    lines.write_text(lines.read_text().replace("1 + 98 = 99", "1 + 1 = 2"))
    assert run(*options) == 0


# -- the run folder -------------------------------------------------------------------------------


def test_checkpoint_of_another_recipe(teacher, tmp_path, fails):
    path = write_recipe(tmp_path, teacher)
    options = (path, "--run-dir", tmp_path / "run")
    assert run(*options, "--max-steps", 1) == 0
    before = {f: f.read_bytes() for f in (tmp_path / "run").rglob("*") if f.is_file()}
    text = fails(*options, "stages.end_to_end.lr=0.5", "seed=3")
    assert "made by another recipe; differing keys: " in text
    assert "stages.2.lr (0.001 -> 0.5)" in text
    assert "seed (42 -> 3)" in text
    assert {f: f.read_bytes() for f in (tmp_path / "run").rglob("*") if f.is_file()} == before


def test_no_room_for_a_checkpoint(teacher, tmp_path, monkeypatch, fails):
    """A real write that fails half-way is in test_loop; here the disk says that it is full."""
    from thinkfast_distill import checkpoint

    class Usage:
        free = 10

    options = (write_recipe(tmp_path, teacher), "--run-dir", tmp_path / "run")
    assert run(*options, "--max-steps", 2) == 0
    with monkeypatch.context() as full:
        full.setattr(checkpoint.shutil, "disk_usage", lambda folder: Usage)
        text = fails(*options)
    assert "the checkpoint cannot be written: " in text
    assert "the previous checkpoint" in text
    assert saved_step(tmp_path / "run") == 2
    assert run(*options, "--max-steps", 3) == 0


# -- data -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "x.jsonl: the file is empty"),
        ('{"text": "1"\n', "x.jsonl:1: not JSON"),
        ('\n{"txt": "1"}\n', "x.jsonl:2: no field 'text'"),
    ],
)
def test_data_file_that_is_empty_or_malformed(content, message, teacher, tmp_path, fails):
    (tmp_path / "x.jsonl").write_text(content)
    path = text_recipe(tmp_path, teacher, jsonl(tmp_path / "x.jsonl"))
    assert message in fails(path, "--run-dir", tmp_path / "run")


def test_data_of_a_later_stage_is_opened_before_the_first(teacher, tmp_path, fails):
    (tmp_path / "x.jsonl").write_text("")
    path = write_recipe(tmp_path, teacher)
    later = f"data.later.sources=[{{kind: jsonl, path: {tmp_path / 'x.jsonl'}}}]"
    options = (later, "stages.end_to_end.data=later", "--run-dir", tmp_path / "run")
    assert "source x: " in fails(path, *options)
    assert all(r["event"] == "session" for r in read_log(tmp_path / "run/log.jsonl"))


def test_malformed_line_in_the_middle(teacher, tmp_path, fails):
    """The finished steps are saved; with the line mended the run goes on from there."""
    path = text_recipe(tmp_path, teacher, jsonl(tmp_path / "a.jsonl"), checkpoint={})
    options = (path, "--run-dir", tmp_path / "run")
    lines = write_lines(tmp_path / "a.jsonl", ["1 + 1 = 2"] * 300)
    good = lines.read_text()
    bad = good.split("\n")
    order = Permutation(300, parts.seed_for(42, "data/end_to_end"), "a", 0)
    bad[order[120]] = '{"text": 1}'
    lines.write_text("\n".join(bad))
    text = fails(*options)
    assert f"a.jsonl:{order[120] + 1}: field 'text' must be text, got int" in text
    step = saved_step(tmp_path / "run")
    assert 0 < step < 6
    lines.write_text(good)
    assert run(*options) == 0
    steps = [r["step"] for r in read_log(tmp_path / "run/log.jsonl") if r["event"] == "train"]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_source_that_ends_before_its_budget(teacher, tmp_path, fails):
    lines = write_lines(tmp_path / "a.jsonl", ["1 + 1 = 2"] * 60)
    data = jsonl(lines, tokens=5000)
    path = text_recipe(tmp_path, teacher, data, checkpoint={})
    options = ("--run-dir", tmp_path / "run")
    text = fails(path, *options)
    assert "source a ended before its budget of 5000 tokens: 60 documents" in text
    assert "raise its epochs (null: any number of passes) and the same command continues" in text
    step = saved_step(tmp_path / "run")
    assert 1 <= step < 6
    # What the message says: with more passes the run goes on, as if it had had them all along.
    more = "data.train.sources.0.epochs=20"
    assert run(path, *options, more) == 0
    assert run(path, "--run-dir", tmp_path / "whole", more) == 0
    found, whole = (
        [r["loss"] for r in read_log(tmp_path / name / "log.jsonl") if r["event"] == "train"]
        for name in ("run", "whole")
    )
    assert len(found) == 6
    assert found == whole
    one, other = (last_weights(tmp_path / name) for name in ("run", "whole"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def last_weights(folder):
    store = CheckpointStore(folder, 1, World())
    config = read_run_config(folder)
    sizes = parts.student_config(config, parts.teacher_config(config), parts.tokenizer(config), 0)
    student = parts.build_student(sizes)
    store.load_student(store.latest(), student)
    return student.state_dict()


def test_fewer_tokens_after_a_source_ended(teacher, tmp_path, fails):
    """In the run's folder they are refused; the way over an export that the message names works."""
    data = jsonl(write_lines(tmp_path / "a.jsonl", ["1 + 1 = 2"] * 60))
    path = text_recipe(tmp_path, teacher, data, checkpoint={})
    options = ("--run-dir", tmp_path / "run")
    text = fails(path, *options)
    assert "(thinkfast-distill export RUN OUT, then student.weights=OUT)" in text
    fewer = "stages.0.tokens=256"
    assert "stages.0.tokens (1536 -> 256)" in fails(path, *options, fewer)
    out = tmp_path / "out"
    assert cli.main(["export", str(tmp_path / "run"), str(out)]) == 0
    words = (f"student.weights={out}", fewer, "stages.0.lr=1e-30")
    assert run(path, "--run-dir", tmp_path / "next", *words) == 0
    one, other = (last_weights(tmp_path / name) for name in ("run", "next"))
    assert all(torch.allclose(one[name], other[name], rtol=0, atol=1e-12) for name in one)


# -- numbers --------------------------------------------------------------------------------------


def test_loss_that_is_not_finite(teacher, tmp_path, monkeypatch, fails):
    """Skipped and counted, with the weights as they were; after m in a row the run stops."""
    from thinkfast_distill.stages import EndToEnd

    path = text_recipe(
        tmp_path,
        teacher,
        jsonl(write_lines(tmp_path / "a.jsonl", ["1 + 1 = 2"] * 600)),
        compute={"max_skipped_steps": 3},
    )
    options = (path, "--run-dir", tmp_path / "run")
    assert run(*options, "--max-steps", 2) == 0
    backward = EndToEnd.backward

    def not_finite(self, batch, number):
        sums = backward(self, batch, number)
        return {**sums, "loss": float("nan")}

    with monkeypatch.context() as broken:
        broken.setattr(EndToEnd, "backward", not_finite)
        text = fails(*options)
    assert "step 5: 3 steps in a row were skipped, the last because: loss or gradient" in text
    assert "samples of the last one: a:" in text
    skips = [r for r in read_log(tmp_path / "run/log.jsonl") if r["event"] == "skip"]
    assert [r["step"] for r in skips] == [3, 4, 5]
    assert all(r["sample_ids"] for r in skips)
    assert saved_step(tmp_path / "run") < 5
    assert run(*options) == 0
