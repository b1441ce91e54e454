"""A tiny teacher and recipe with the real parts, and how to run them."""

import copy

import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from thinkfast_distill import cli
from thinkfast_distill.data.arith_tokenizer import build_tokenizer


def write_teacher(folder, *, more_rows=0, **changes):
    """A random Llama of two layers with the tokenizer of the arith problems."""
    tokenizer = build_tokenizer()
    sizes = {
        "vocab_size": len(tokenizer) + more_rows,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_recipe(folder, teacher, *, kind="llamba", stages=None, layout=None, **more):
    """Three stages of three steps, unless ``stages`` lists (kind, fields) of others."""

    def stage(kind, **fields):
        sizes = {"tokens": 3 * 256, "seq_len": 64, "batch_tokens": 256}
        return {"kind": kind, "data": "train", "lr": 1e-3, **sizes, **fields}

    source = {"kind": "arith", "max_steps": 4}
    default = [stage("matrix_mixing"), stage("hidden_state"), stage("end_to_end")]
    content = {
        "name": "tiny",
        "teacher": {"model": str(teacher)},
        "student": {"kind": kind, "init": "qkvo", "layout": layout or {}},
        "data": {
            "train": {"sources": [source], "loss_on": "completion"},
            "held-out": {"sources": [{**source, "split": "validation"}], "loss_on": "completion"},
        },
        "stages": [stage(k, **f) for k, f in stages] if stages else default,
        "evaluation": {"data": "held-out", "num_batches": 1, "batch_rows": 2, "seq_len": 64},
        "checkpoint": {"every_steps": 2},
        "logging": {"peak_flops_per_s": 1e10},
        **copy.deepcopy(more),
    }
    if kind == "llamba":
        content["student"]["layout"] = {"ssm_state_size": None}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def run(*words):
    """``thinkfast-distill run`` in this process; the exit code."""
    return cli.main(["run", *map(str, words), "--quiet"])
