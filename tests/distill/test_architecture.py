import json

import pytest
from transformers import LlamaConfig, MistralConfig, Qwen2Config

from thinkfast_distill.architecture import resolve_folder, student_config, teacher_config
from thinkfast_distill.config import (
    DataConfig,
    RunConfig,
    StageConfig,
    StudentConfig,
    TeacherConfig,
)
from thinkfast_distill.recipe import RecipeError, parse

SIZES = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def run(student, **stage):
    fields = {"kind": "end_to_end", "data": "d", "tokens": 8, "batch_tokens": 8, "seq_len": 8}
    return RunConfig(
        name="n",
        student=parse(StudentConfig, student, "r"),
        data={"d": DataConfig(sources=[])},
        stages=[StageConfig(**{**fields, "lr": 1e-3, **stage})],
        teacher=TeacherConfig(model="m"),
    )


def test_student_follows_a_teacher_with_its_own_head_dim():
    teacher = LlamaConfig(**SIZES, head_dim=8, tie_word_embeddings=True, rms_norm_eps=1e-6)
    hybrid = student_config(
        run({"kind": "mambainllama", "layout": {"mamba_version": "mamba2"}}), teacher
    )
    assert (hybrid.mixer_size, hybrid.xb_size, hybrid.ssm_state_size) == (32, 16, 8)
    assert (hybrid.rms_norm_eps, hybrid.tie_word_embeddings) == (1e-6, True)
    pure = student_config(run({"kind": "llamba", "layout": {"ssm_state_size": None}}), teacher)
    assert (pure.num_heads, pure.n_groups, pure.ssm_state_size) == (4, 4, 8)


def test_student_of_qwen_keeps_its_biases():
    config = student_config(
        run({"kind": "mambainllama", "layout": {"attention_layers": [1], "ssm_state_size": 4}}),
        Qwen2Config(**SIZES),
    )
    assert config.attention_bias


@pytest.mark.parametrize("kind", ["llamba", "mambainllama"])
def test_biases_of_the_projections_follow_the_teacher_s_output(kind):
    """Only a Llama with attention_bias has one there; the recipe may say otherwise."""
    fixed = {"mamba_version": "mamba2"} if kind == "mambainllama" else {}

    def use_bias(teacher, **layout):
        return student_config(run({"kind": kind, "layout": {**fixed, **layout}}), teacher).use_bias

    biased, plain = LlamaConfig(**SIZES, attention_bias=True), LlamaConfig(**SIZES)
    assert (use_bias(biased), use_bias(plain)) == (True, False)
    assert not use_bias(Qwen2Config(**SIZES))  # q, k and v alone, which the convolution holds
    assert (use_bias(biased, use_bias=False), use_bias(plain, use_bias=True)) == (False, True)


def test_mamba1_has_no_biases_of_the_projections():
    layout = {"ssm_state_size": 4}
    biased = LlamaConfig(**SIZES, attention_bias=True)
    assert not student_config(run({"kind": "mambainllama", "layout": layout}), biased).use_bias
    with pytest.raises(RecipeError, match=r"use_bias: Mamba-1.*mamba_version: mamba2"):
        student_config(
            run({"kind": "mambainllama", "layout": {**layout, "use_bias": True}}), biased
        )


def test_student_keeps_the_sliding_window():
    def window(teacher, *kept):
        layout = {"attention_layers": list(kept), "ssm_state_size": 4}
        student = student_config(run({"kind": "mambainllama", "layout": layout}), teacher)
        return student.sliding_window

    assert window(MistralConfig(**SIZES, sliding_window=7), 0, 1) == 7
    assert window(MistralConfig(**SIZES, sliding_window=None), 0) is None
    assert window(MistralConfig(**SIZES, sliding_window=7)) is None  # no attention is kept
    mixed = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=7, max_window_layers=1)
    assert (window(mixed, 0), window(mixed, 1)) == (None, 7)
    with pytest.raises(RecipeError, match=r"different windows \(0: all tokens, 1: 7\)"):
        window(mixed, 0, 1)


def test_stage_may_keep_more_attention():
    config = run(
        {"kind": "mambainllama", "layout": {"attention_layers": [1], "ssm_state_size": 4}},
    )
    config.stages.insert(0, run({"kind": "llamba"}).stages[0])
    config.stages[0].attention_layers = [0, 1]
    teacher = LlamaConfig(**SIZES)
    kept = [student_config(config, teacher, stage=i).attention_layers for i in (0, 1, None)]
    assert kept == [[0, 1], [1], [1]]


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"kind": "llamba", "layout": {"num_heads": 3}}, "num_heads=3"),
        ({"kind": "mambainllama", "layout": {"ssm_state_size": 16}}, "16 must divide"),
        ({"kind": "mambainllama", "layout": {"attention_layers": [2]}}, r"attention_layers=\[2\]"),
    ],
)
def test_student_that_does_not_fit(student, message):
    if "attention_layers" in str(student):
        student["layout"]["ssm_state_size"] = 4
    with pytest.raises(RecipeError, match=message):
        student_config(run(student), LlamaConfig(**SIZES))


def test_teacher_config_compares_the_sizes_of_the_recipe(tmp_path):
    LlamaConfig(**SIZES).save_pretrained(tmp_path)
    same = TeacherConfig(model=str(tmp_path), sizes=dict(SIZES))
    assert teacher_config(same).hidden_size == 16
    other = TeacherConfig(model=str(tmp_path), sizes={**SIZES, "hidden_size": 32})
    with pytest.raises(RecipeError, match=r"sizes.hidden_size: the recipe says 32, .* has 16"):
        teacher_config(other)
    assert teacher_config(other, allow_sizes=True).hidden_size == 32
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nothing"}))
    with pytest.raises(RecipeError, match=r"teacher\.model"):
        teacher_config(same)


@pytest.mark.parametrize("change", [{"num_attention_heads": 0}, {"num_attention_heads": 3}])
def test_sizes_that_transformers_refuses(change, tmp_path):
    """Its own classes of errors, and divisions by zero, are one line for the user."""
    sizes = {**SIZES, **change}
    with pytest.raises(RecipeError, match=r"teacher\.sizes: .*transformers does not accept"):
        teacher_config(TeacherConfig(model="m", sizes=sizes), allow_sizes=True)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **sizes}))
    with pytest.raises(RecipeError, match=r"transformers does not accept its config\.json"):
        teacher_config(TeacherConfig(model=str(tmp_path)))
    layout = {"hidden_size": 16, "num_attention_heads": 3, "num_key_value_heads": 1}
    student = {"kind": "llama", "layout": layout, "tokenizer": "builtin:arith"}
    with pytest.raises(RecipeError, match=r"student\.layout: .*transformers does not accept"):
        student_config(run(student, kind="pretrain"), None, tokenizer_size=31)


@pytest.mark.parametrize(
    ("kind", "field"),
    [("llamba", "num_heads"), ("mambainllama", "ssm_state_size"), ("llama", "num_key_value_heads")],
)
def test_a_size_of_zero_is_refused(kind, field):
    """It would be divided by, or taken for null."""
    with pytest.raises(RecipeError, match=rf"{field}: 0 must be at least 1"):
        run({"kind": kind, "layout": {field: 0}})


def test_resolve_folder(tmp_path, monkeypatch):
    assert resolve_folder(str(tmp_path), "k") == tmp_path
    assert (resolve_folder("package:thinkfast_distill", "k") / "cli.py").is_file()
    with pytest.raises(RecipeError, match=r"k: package 'no_such' .* pip install no-such"):
        resolve_folder("package:no_such", "k")
    for model in ("./nothing", "a/b/c", "word"):
        with pytest.raises(RecipeError, match=r"no such folder, and not a hub name"):
            resolve_folder(model, "k")
