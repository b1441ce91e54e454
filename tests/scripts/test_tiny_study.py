"""The recipes of the study are valid and change one thing each; tables and figure."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts import tiny_models, tiny_study
from scripts.tiny_models import RECIPES
from scripts.tiny_study import BATCH_TOKENS, STAGES, Variant, draw, tables, variants
from thinkfast_distill.config import load

VARIANTS = variants(1.0)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_recipe_is_valid(variant: Variant, tmp_path: Path) -> None:
    path = tmp_path / "one.yaml"
    names = variant.write(path, seed=7)
    assert names == [stage for stage in STAGES if stage in variant.tokens]
    config = load(path)
    assert (config.name, config.seed, config.student.init) == ("one", 7, variant.init)
    assert [stage.name for stage in config.stages] == names
    assert [stage.tokens for stage in config.stages] == [variant.tokens[name] for name in names]
    assert {stage.batch_tokens for stage in config.stages} == {BATCH_TOKENS}
    for stage in config.stages:
        shipped = load(RECIPES / variant.recipe)
        (same,) = (s for s in shipped.stages if s.name == stage.name)
        expected = variant.losses.get(str(stage.name), same.loss.kind)
        assert stage.loss.kind == expected


@pytest.mark.parametrize("kind", ["Llamba", "hybrid"])
def test_variants_have_the_same_budget(kind: str) -> None:
    of_kind = [v for v in VARIANTS if v.name.split(",")[0] == kind]
    assert len(of_kind) >= 2
    assert len({sum(v.tokens.values()) for v in of_kind}) == 1
    assert [v.name for v in of_kind if v.with_stages] == [kind]


def test_whole_budgets_are_the_recipes() -> None:
    """In whole batches, which is what the trainer does with any budget."""
    for variant in VARIANTS:
        shipped = {stage.name: stage.tokens for stage in load(RECIPES / variant.recipe).stages}
        if set(shipped) == set(variant.tokens):
            for name, tokens in variant.tokens.items():
                assert 0 <= tokens - shipped[name] < BATCH_TOKENS


@pytest.mark.parametrize("share", [1e-9, 0.25])
def test_share_of_the_budgets(share: float) -> None:
    for variant, whole in zip(variants(share), VARIANTS, strict=True):
        for name, tokens in variant.tokens.items():
            assert tokens % BATCH_TOKENS == 0
            assert tokens >= max(BATCH_TOKENS, share * whole.tokens[name])
            assert tokens <= share * whole.tokens[name] + 3 * BATCH_TOKENS


@pytest.mark.parametrize("share", ["0", "-1", "1.5", "nan"])
def test_bad_share_is_refused(share: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny_study.main(["--share", share]) == 2
    assert capsys.readouterr().err.startswith(f"error: --share {float(share)}: give a number")


def test_unknown_variant_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny_study.main(["--only", "hybrid", "--only", "Llama"]) == 2
    assert capsys.readouterr().err.startswith("error: --only 'Llama': the variants are Llamba; ")


def test_chosen_variants(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run(variant: Variant, runs: Path, seed: int) -> dict[str, Any]:
        assert runs.name == "share-0.5"
        return _result(variant.name, seed, 0.5, 0.4, whole=variant.with_stages)

    passk = {"pass@1": 0.6, "pass@1_stderr": 0.03, "pass@16": 0.9, "pass@16_stderr": 0.01}
    monkeypatch.setattr(tiny_study, "run_variant", run)
    monkeypatch.setattr(tiny_study, "sample", lambda *arguments: passk)
    words = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--share", "0.5"]
    assert tiny_study.main([*words, "--only", "hybrid", "--only", "Llamba"]) == 0
    study = json.loads((tmp_path / "out" / "study.json").read_text())
    assert [result["name"] for result in study["variants"]] == ["Llamba", "hybrid"]
    assert study["share"] == 0.5


def _result(name: str, seed: int, kl: float, pass_1: float, *, whole: bool) -> dict[str, Any]:
    metrics = {"reverse_kl": kl, "forward_kl": kl / 2, "top1_agreement": 1 - kl / 10}
    passk = {"pass@1": pass_1, "pass@1_stderr": 0.01, "pass@16": 0.75, "pass@16_stderr": 0.02}
    return {
        "name": name,
        "seed": seed,
        "start": {key: 10 * value for key, value in metrics.items()},
        "stages": [
            {"name": "hidden_state", "tokens": 1000, "passk": passk if whole else None, **metrics},
            {"name": "end_to_end", "tokens": 2000, "passk": passk, **metrics},
        ],
        "curve": [[0, 9.0, 9.0, 0.1], [3000, *metrics.values()]],
    }


def test_tables_and_figure(tmp_path: Path) -> None:
    study = {
        "teacher": {"pass@1": 0.6, "pass@1_stderr": 0.03, "pass@16": 0.9, "pass@16_stderr": 0.01},
        "variants": [
            _result("Llamba", 0, 0.5, 0.4, whole=True),
            _result("Llamba, init random", 0, 1.5, 0.1, whole=False),
            _result("Llamba, init random", 1, 2.5, 0.3, whole=False),
            _result("hybrid", 0, 0.25, 0.5, whole=True),
        ],
    }
    text = tables(study)
    assert "| Llamba, seed 0 | start | 0 | 5 | 2.5 |" in text
    assert "| | hidden_state | 1,000 | 0.5 | 0.25 | 0.9500 | 0.400 ± 0.010 |" in text
    assert "| Llamba, init random | 2 | 2 (1.5 to 2.5) |" in text
    assert "0.200 (0.100 to 0.300) | 0.750 (0.750 to 0.750) |" in text
    draw(study, tmp_path / "study.png")
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")


def _model(folder: Path, weights: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def test_samples_of_another_model_in_the_same_folder_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []

    def lm_eval(command: list[str], log: Path, name: str) -> None:
        calls.append(command)
        found = tmp_path / "work" / "lm_eval" / f"results_{len(calls)}.json"
        found.parent.mkdir(exist_ok=True)
        metrics = {"alias": "arith_passk", "pass@1,all": len(calls) / 10}
        found.write_text(json.dumps({"results": {"arith_passk": metrics}}))
        os.utime(found, (len(calls), len(calls)))

    monkeypatch.setattr(tiny_study, "call", lm_eval)

    def pass_at_1(weights: bytes) -> float:
        model = _model(tmp_path / "model", weights)
        return tiny_study.sample(model, tmp_path / "work", 5, 2)["pass@1"]

    assert [pass_at_1(weights) for weights in (b"a", b"a", b"b", b"a")] == [0.1, 0.1, 0.2, 0.1]
    (tmp_path / "model" / "chat_template.jinja").write_text("another template")
    assert pass_at_1(b"a") == 0.3
    monkeypatch.setattr(tiny_study, "code_hash", lambda: "another task")
    assert [pass_at_1(b"a") for _ in range(2)] == [0.4, 0.4]


def test_samples_that_were_not_written_whole_are_drawn_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lm_eval(command: list[str], log: Path, name: str) -> None:
        found = tmp_path / "work" / "lm_eval" / "results_1.json"
        found.parent.mkdir(exist_ok=True)
        found.write_text(json.dumps({"results": {"arith_passk": {"pass@1,all": 0.5}}}))

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny_study, "call", lm_eval)
    model = _model(tmp_path / "model", b"a")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", kill)
        patch.setattr(Path, "replace", kill)
        with pytest.raises(KeyboardInterrupt):
            tiny_study.sample(model, tmp_path / "work", 5, 2)
    assert not list((tmp_path / "work").glob("passk-*.json"))
    assert tiny_study.sample(model, tmp_path / "work", 5, 2) == {"pass@1": 0.5}


def test_runs_of_another_teacher_or_recipe_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[tuple[Path, int]] = []

    def train(recipe: Path, run: Path, overrides: list[str], max_steps: int) -> None:
        trained.append((run, max_steps))
        run.mkdir(parents=True, exist_ok=True)
        record = {"event": "eval", "tokens": 0, "reverse_kl": 1, "forward_kl": 1}
        record["top1_agreement"] = 0.5
        lines = [json.dumps({**record, "stage": stage}) for stage in STAGES]
        (run / "log.jsonl").write_text("\n".join(lines))

    monkeypatch.setattr(tiny_study, "train", train)
    monkeypatch.setattr(tiny_study, "export", lambda run, out: _model(out, b"w"))
    monkeypatch.setattr(tiny_study, "sample", lambda *arguments: {"pass@1": 0.5})
    teacher = _model(tmp_path / "teacher", b"one")
    monkeypatch.setattr(tiny_study, "TEACHER", teacher)
    (variant,) = (v for v in VARIANTS if v.name == "hybrid, reverse KL only")
    for _ in range(2):  # the trainer is asked each time: it alone knows whether the run is this one
        tiny_study.run_variant(variant, tmp_path / "runs", 0)
    _model(teacher, b"two")
    tiny_study.run_variant(variant, tmp_path / "runs", 0)
    runs = [run for run, _ in trained]
    assert runs[0] == runs[1] != runs[2]


def test_students_of_another_teacher_are_trained_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = [b"one", b"one", b"two"]
    runs: list[dict[str, Path]] = []

    def train(recipe: Path, run: Path, overrides: list[str]) -> None:
        runs[-1][recipe.name] = run

    def export(run: Path, out: Path) -> None:
        assert run in runs[-1].values()
        _model(out, weights[len(runs) - 1])

    monkeypatch.setattr(tiny_models, "train", train)
    monkeypatch.setattr(tiny_models, "export", export)
    for _ in weights:
        runs.append({})
        tiny_models.make(tmp_path / "out", tmp_path / "runs")
    assert runs[0] == runs[1]
    changed = {recipe for recipe, run in runs[2].items() if run != runs[0][recipe]}
    assert changed == {recipe for _, recipe, _ in tiny_models.FROM_TEACHER}


def test_failure_has_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(command: list[str], log: Path, name: str) -> None:
        raise tiny_models.TrainingError(f"{name}: ended with code 2")

    monkeypatch.setattr(tiny_models, "call", fail)
    words = ["--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs")]
    assert tiny_models.main(words) == 2
    assert capsys.readouterr().err == "error: llama-tiny: ended with code 2\n"


def test_write_leaves_the_shipped_recipe_as_it_is(tmp_path: Path) -> None:
    before = (RECIPES / VARIANTS[0].recipe).read_bytes()
    VARIANTS[0].write(tmp_path / "one.yaml", 0)
    assert (RECIPES / VARIANTS[0].recipe).read_bytes() == before
    assert yaml.safe_load((tmp_path / "one.yaml").read_text())["name"] == "one"
