"""A process reward model from a recipe to an exported folder, starting from a smaller Llama."""

import json

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.distill.tiny_run import write_teacher
from thinkfast_distill import cli, parts
from thinkfast_distill.llama_student import LlamaStudent
from thinkfast_distill.recipe import RecipeError
from thinkfast_distill.run_log import read_log


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    return write_teacher(folder, num_hidden_layers=1)


def _deeper(teacher, num_layers):
    config = LlamaConfig.from_pretrained(teacher, num_hidden_layers=num_layers)
    student = LlamaStudent(config)
    parts.load_exported(student, str(teacher))
    return student


def test_more_layers_pass_their_input_on(teacher):
    """At the start the deeper model says what the smaller one says."""
    ids = torch.arange(10, 40)[None]
    smaller = LlamaForCausalLM.from_pretrained(teacher)
    student = _deeper(teacher, 3)
    with torch.no_grad():
        expected = smaller(ids).logits
        hidden = student.model(ids).last_hidden_state
        torch.testing.assert_close(hidden @ student.head_weight().T, expected)
    assert student.model.layers[2].self_attn.q_proj.weight.abs().sum() > 0


def test_fewer_layers_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="do not fit the student"):
        _deeper(write_teacher(tmp_path), 1)


def test_run_and_export(teacher, tmp_path):
    labelled = {"kind": "arith", "mistakes": 0.6}
    recipe = {
        "name": "prm",
        "student": {
            "kind": "llama",
            "tokenizer": "builtin:arith",
            "weights": str(teacher),
            "layout": {
                "hidden_size": 64,
                "intermediate_size": 192,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
            },
        },
        "data": {
            "train": {"sources": [{**labelled, "learn_steps": True}]},
            "held-out": {
                "sources": [{**labelled, "split": "validation", "last_step": "first_wrong"}]
            },
        },
        "stages": [
            {
                "kind": "pretrain",
                "data": "train",
                "tokens": 3 * 512,
                "seq_len": 256,
                "batch_tokens": 512,
                "lr": 1e-3,
            }
        ],
        "evaluation": {"data": "held-out", "num_batches": 1, "batch_rows": 8, "seq_len": 256},
        "logging": {"peak_flops_per_s": 1e10},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert cli.main(["run", str(path), "--run-dir", str(tmp_path / "run"), "--quiet"]) == 0
    measured = [r for r in read_log(tmp_path / "run" / "log.jsonl") if r["event"] == "eval"]
    assert len(measured) == 2
    assert measured[-1]["loss"] < measured[0]["loss"]
    for key in ("step_balanced_accuracy", "step_f1", "step_recall_wrong"):
        assert 0 <= measured[-1][key] <= 1, key
    out = tmp_path / "out"
    assert cli.main(["export", str(tmp_path / "run"), str(out)]) == 0
    card = (out / "README.md").read_text()
    assert "process reward model" in card
    assert "softmax over the logits" in card
    assert '`"\\n"` separates them' in card
    assert "| step_f1 | " in card
    facts = json.loads((out / "thinkfast_export.json").read_text())
    assert facts["evaluation"]["step_f1"] == measured[-1]["step_f1"]
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.num_hidden_layers == 2
    assert AutoTokenizer.from_pretrained(out).chat_template
