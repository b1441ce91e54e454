import copy
import dataclasses
import re
from pathlib import Path

import pytest

from thinkfast_distill import config as config_module
from thinkfast_distill.config import RunConfig
from thinkfast_distill.data.source_config import source_config
from thinkfast_distill.recipe import RecipeError, parse

BASE = {
    "name": "n",
    "teacher": {"model": "m"},
    "student": {"kind": "mambainllama", "layout": {"attention_layers": [1]}},
    "data": {"d": {"sources": []}},
    "stages": [
        {"kind": kind, "data": "d", "tokens": 8, "batch_tokens": 8, "seq_len": 8, "lr": 1e-3}
        for kind in ("hidden_state", "end_to_end")
    ],
}


def changed(**paths):
    raw = copy.deepcopy(BASE)
    for path, value in paths.items():
        *parents, last = path.split("__")
        target = raw
        for key in parents:
            key = int(key) if key.isdigit() else key
            target = target.setdefault(key, {}) if isinstance(target, dict) else target[key]
        target[last] = value
    return raw


def test_base_is_good():
    assert parse(RunConfig, BASE, "r").stages[0].name == "hidden_state"


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ({"stages": []}, "stages: the list is empty"),
        ({"stages__1__kind": "hidden_state"}, "stages.0.name: 'hidden_state' occurs twice"),
        ({"stages__0__data": "x"}, "stages.0.data: 'x' is not defined; accepted: d"),
        ({"stages__0__lr": 0}, "stages.0.lr: 0.0 must be > 0"),
        ({"stages__0__kind": "pretrain"}, "stages.0.kind: 'pretrain' does not fit"),
        ({"stages__0__warmup_fraction": 0.95}, "warm-up and decay together exceed"),
        ({"stages__1__attention_layers": [0, 1]}, r"stages.1.attention_layers: \[0, 1\] must be"),
        ({"stages__1__loss": {"kind": "jsd", "beta": 1}}, "beta: 1.0 must lie between"),
        ({"teacher": None}, "needs a teacher"),
        ({"student": {"kind": "llama"}}, "does not fit student.kind 'llama'"),
        ({"student": {"kind": "llamba", "layout": {"attention_layers": []}}}, "unknown key"),
        ({"checkpoint": {"keep": 0}}, "checkpoint.keep: 0 must be >= 1"),
        ({"compute": {"assumed_mfu": 2}}, "assumed_mfu: 2.0 is not in 0..1"),
        ({"data__d__sources": [{"preset": "web"}]}, "data.d.sources.0.preset: 'web' is not"),
        (
            {"data__e": {"sources": [], "chat_template": "a.jinja"}, "stages__1__data": "e"},
            "data.e.chat_template: 'a.jinja', but data.d has None; the template is fixed",
        ),
    ],
)
def test_mistakes(paths, message):
    with pytest.raises(RecipeError, match=message) as caught:
        parse(RunConfig, changed(**paths), "r")
    assert "\n" not in str(caught.value)


def test_a_preset_is_resolved_when_the_recipe_is_read():
    (source,) = (
        parse(RunConfig, changed(data__d__sources=[{"preset": "finemath-4plus", "skip": 7}]), "r")
        .data["d"]
        .sources
    )
    assert "preset" not in source
    assert (source["kind"], source["dataset"]) == ("hub", "HuggingFaceTB/finemath")
    assert (source["name"], source["skip"]) == ("finemath-4plus", 7)


def test_the_paper_s_ablation_is_an_override():
    """As docs/recipes.md writes it."""
    root = Path(__file__).resolve().parents[2]
    (override,) = re.findall(
        r"'(data\.\S+={preset: openhermes-2\.5.*})'", (root / "docs/recipes.md").read_text()
    )
    path = root / "distill/recipes/llama-3.2-1b-llamba.yaml"
    sources = config_module.load(path, [override]).data["solutions"].sources
    (found,) = map(source_config, sources)
    assert (found.dataset, found.epochs) == ("teknium/OpenHermes-2.5", None)


def test_training_from_scratch_needs_a_tokenizer():
    raw = changed(teacher=None, student={"kind": "llama"})
    raw["stages"] = [{**raw["stages"][0], "kind": "pretrain"}]
    with pytest.raises(RecipeError, match=r"student.tokenizer: missing"):
        parse(RunConfig, raw, "r")


def test_every_field_is_documented():
    """The docstrings under the fields are the reference of the recipe format."""
    import ast
    import inspect

    tree = ast.parse(inspect.getsource(config_module))
    missing = []
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        for at, item in enumerate(node.body):
            if not isinstance(item, ast.AnnAssign) or item.target.id == "UNION_KEYS":
                continue
            after = node.body[at + 1] if at + 1 < len(node.body) else None
            if not (isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)):
                missing.append(f"{node.name}.{item.target.id}")
    assert missing == []
    assert dataclasses.is_dataclass(RunConfig)
