"""The whole-model oracle against the original code's logits, other formulations, and itself."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.reference.published_models import (
    Mamba1Mixer,
    Mamba2Mixer,
    PublishedModel,
    read_tensors,
    reference_greedy_with_margins,
    reference_logits,
)
from tests.reference.random_checkpoints import (
    ABSENT,
    CONTAINERS,
    FORMATS,
    LLAMA32,
    MISTRAL,
    VARIANTS,
    write_checkpoint,
    write_variant,
)

FIXTURES = Path(os.environ.get("THINKFAST_FIXTURES", Path(__file__).parents[1] / "golden"))
GOLDEN_TOLERANCE = 1e-4
"""Maximum difference of logits; the goldens were computed in float32 by the original code."""


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request, tmp_path_factory):
    return write_variant(tmp_path_factory.mktemp("variant") / request.param, request.param)


def prompt(length: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(3, 150, (length,), generator=generator)


def edit_json(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text())
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(content.get(key), dict):
            value = {**content[key], **value}
        content[key] = value
    path.write_text(json.dumps(content))


@pytest.fixture(params=[f"{f}_plain" for f in FORMATS])
def golden(request):
    folder = FIXTURES / request.param
    if not folder.exists():
        pytest.skip(f"THINKFAST_FIXTURES has no {folder.name}")
    return folder / "ckpt", load_file(folder / "golden.safetensors")


def test_logits_golden(golden):
    folder, tensors = golden
    model = PublishedModel(folder)
    compared = 0
    for name in sorted(name for name in tensors if name.startswith("input_ids_")):
        for ids, expected in zip(
            tensors[name], tensors[name.replace("input_ids", "logits")], strict=True
        ):
            with torch.no_grad():
                error = (model.logits(ids) - expected).abs()
            assert error.max() <= GOLDEN_TOLERANCE, f"{name}: max {error.max()} at {error.argmax()}"
            compared += len(ids)
    assert compared >= 400


def test_greedy_golden(golden):
    folder, tensors = golden
    for ids, expected, margin in zip(
        *(tensors[f"greedy_{name}"] for name in ("prompt", "tokens", "margin")), strict=True
    ):
        tokens, margins = reference_greedy_with_margins(folder, ids, len(expected))
        assert tokens == expected.tolist()
        assert (torch.tensor(margins) - margin).abs().max() <= 2 * GOLDEN_TOLERANCE


def test_logits_variant(variant):
    logits = reference_logits(variant, prompt())
    assert logits.isfinite().all()
    assert 0.5 < (logits - logits.mean(-1, keepdim=True)).std() < 2
    in_float32 = reference_logits(variant, prompt().tolist(), dtype=torch.float32)
    assert in_float32.dtype == torch.float32
    assert (in_float32 - logits).abs().max() < 1e-4


def test_logits_variant_every_element_matters(variant):
    """No element that the prompt can reach is ignored, and no tensor is nearly so."""
    model = PublishedModel(variant)
    for weight in model.weights.values():
        weight.requires_grad_(True)
    ids = prompt()
    logits = model.logits(ids)
    generator = torch.Generator().manual_seed(8)
    (logits * torch.randn(logits.shape, generator=generator, dtype=logits.dtype)).sum().backward()
    for name, weight in model.weights.items():
        if name in model.tied_copies:
            continue
        assert weight.grad is not None, f"{name} is not used"
        effect = weight.grad * weight
        assert effect.abs().max() > 0.1, name
        if "embed" in name:  # other rows are reached through a tied head only
            effect = effect[ids]
        assert (effect != 0).all(), f"{name}: {int((effect == 0).sum())} elements have no effect"


def test_logits_variant_every_tensor_matters(variant):
    model = PublishedModel(variant)
    ids = prompt(12)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        before = model.logits(ids)
        for name, weight in model.weights.items():
            if name in model.tied_copies:
                continue
            original = weight.clone()
            noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
            weight += 0.2 * noise * weight.std(correction=0).clamp(min=0.1 * weight.abs().max())
            assert (model.logits(ids) - before).abs().max() > 1e-3, name
            weight.copy_(original)


def test_logits_variant_causal_with_long_memory(variant):
    ids = prompt(40)
    with torch.no_grad():
        model = PublishedModel(variant)
        before = model.logits(ids)
        for position in (0, 25):
            changed = ids.clone()
            changed[position] = (ids[position] + 1) % 150
            change = (model.logits(changed) - before).abs().amax(-1)
            assert (change[:position] == 0).all()
            assert (change[position:] > 1e-4).all()


def test_logits_variant_continued(variant):
    """Any split of a sequence over calls gives the same logits, and so does greedy decoding."""
    ids = prompt()
    model = PublishedModel(variant)
    with torch.no_grad():
        whole = model.logits(ids)
        state = model.new_state()
        parts = [model.logits(part, state) for part in ids.split([1, 2, 9, 1, 1, 10])]
    assert (torch.cat(parts) - whole).abs().max() < 1e-10
    tokens, margins = reference_greedy_with_margins(variant, ids, 5)
    again = reference_logits(variant, [*ids.tolist(), *tokens])[len(ids) - 1 : -1]
    assert again.argmax(-1).tolist() == tokens
    top = again.topk(2).values
    assert (top[:, 0] - top[:, 1] - torch.tensor(margins, dtype=top.dtype)).abs().max() < 1e-10


def test_write_checkpoint_seed(tmp_path):
    first, same, other = (
        read_tensors(write_variant(tmp_path / name, "llamba_published", seed=seed))
        for name, seed in (("first", 0), ("same", 0), ("other", 1))
    )
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("format", FORMATS)
def test_write_checkpoint_containers(tmp_path, format):
    logits = [
        reference_logits(
            write_checkpoint(tmp_path / container, format, container=container), prompt()
        )
        for container in CONTAINERS
    ]
    assert all(torch.equal(logits[0], other) for other in logits[1:])
    assert (tmp_path / "sharded_bin" / "pytorch_model-00002-of-00002.bin").exists()
    assert PublishedModel(tmp_path / "bin").format == format


def test_write_checkpoint_unknown(tmp_path):
    with pytest.raises(ValueError, match="format 'rwkv'"):
        write_checkpoint(tmp_path, "rwkv")
    with pytest.raises(ValueError, match="container 'gguf'"):
        write_checkpoint(tmp_path, "m1", container="gguf")


@pytest.mark.parametrize(
    ("format", "name"),
    [
        ("llamba", "backbone.layers.1.mixer.z_bias"),
        ("mambainllama_mamba1", "model.layers.2.mamba.dt_proj.bias"),
        ("mambainllama_mamba2", "model.layers.0.mamba.norm.weight"),
        ("m1", "model.layers.1.mha.in_proj.weight"),
    ],
)
def test_published_model_tampered(tmp_path, format, name):
    path = write_checkpoint(tmp_path, format) / "model.safetensors"
    tensors = load_file(path)
    ids = prompt()
    before = reference_logits(tmp_path, ids)

    save_file({**tensors, name: 1.1 * tensors[name]}, path)
    assert (reference_logits(tmp_path, ids) - before).abs().max() > 1e-3
    save_file({**tensors, name: tensors[name].flatten()[1:]}, path)
    with pytest.raises(ValueError, match=f"{name}: shape"):
        reference_logits(tmp_path, ids)
    save_file({**tensors, "model.layers.0.extra": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="surplus"):
        reference_logits(tmp_path, ids)
    save_file({other: tensors[other] for other in tensors if other != name}, path)
    with pytest.raises(KeyError, match=name):
        reference_logits(tmp_path, ids)


def test_published_model_tied_copy_differs(tmp_path):
    write_checkpoint(tmp_path, "mambainllama_mamba2", config=LLAMA32)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = 2 * tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="is not the embedding"):
        reference_logits(tmp_path, prompt())


OPTION_EDITS = [
    ("llamba_published", "config", {"norm_epsilon": 0.1}),
    ("llamba_published", "config", {"ssm_cfg": {"activation": "silu"}}),
    ("llamba_published", "config", {"mlp_cfg": {"act_fn": "gelu"}}),
    ("mamba1_published", "config", {"rms_norm_eps": 0.1}),
    ("mamba1_published", "config", {"rope_theta": 100.0}),
    ("mamba1_published", "config", {"rope_scaling": LLAMA32["rope_scaling"]}),
    ("mamba1_published", "mamba_config", {"rms_norm_eps": 0.1}),
    ("mamba1_tied_llama3_rope", "config", {"rope_scaling": None}),
    ("mamba1_mistral_window", "config", {"sliding_window": 7}),
    ("mamba1_mistral_window", "config", {"sliding_window": None}),
    ("mamba2_published", "mamba_config", {"ssm_cfg": {"norm_before_gate": True}}),
    ("mamba2_published", "mamba_config", {"ssm_cfg": {"dt_limit": [0.2, math.inf]}}),
    ("mamba2_published", "mamba_config", {"ssm_cfg": {"dt_limit": [0.0, 0.2]}}),
    ("mamba2_published", "mamba_config", {"rms_norm_eps": 0.1}),
    ("m1_published", "config", {"rope_theta": 100.0}),
]


@pytest.mark.parametrize(("name", "file", "changes"), OPTION_EDITS)
def test_logits_option_matters(tmp_path, name, file, changes):
    write_variant(tmp_path, name)
    before = reference_logits(tmp_path, prompt())
    edit_json(tmp_path / f"{file}.json", **changes)
    assert (reference_logits(tmp_path, prompt()) - before).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "file", "changes"),
    [
        ("llamba_published", "config", {"ssm_cfg": {"chunk_size": 4}}),
        ("mamba2_published", "mamba_config", {"ssm_cfg": {"chunk_size": 4, "headdim": 32}}),
        ("m1_published", "config", {"rope_scaling": None}),
        ("mamba1_published", "config", {"_name_or_path": "elsewhere"}),
        ("mamba1_published", "config", {"sliding_window": 6}),  # Mistral's, not Llama's
    ],
)
def test_logits_option_does_not_matter(tmp_path, name, file, changes):
    write_variant(tmp_path, name)
    before = reference_logits(tmp_path, prompt())
    edit_json(tmp_path / f"{file}.json", **changes)
    assert torch.equal(reference_logits(tmp_path, prompt()), before)


@pytest.mark.parametrize(
    ("config", "has_other_width"),
    [({}, False), ({**LLAMA32, "head_dim": 64}, True), (MISTRAL, False)],
    ids=["llama", "llama3_rope_head_dim", "mistral_window"],
)
def test_logits_attention_only_is_transformers(tmp_path, config, has_other_width):
    """With every layer in attn_layers the model is the plain Llama or Mistral of its config."""
    write_checkpoint(
        tmp_path, "mambainllama_mamba1", config=config, mamba_config={"attn_layers": [0, 1, 2]}
    )
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float64, attn_implementation="eager"
    )
    assert (model.model.layers[0].self_attn.q_proj.out_features != 128) == has_other_width
    with torch.no_grad():
        expected = model(prompt(40)[None]).logits[0]
    assert (reference_logits(tmp_path, prompt(40)) - expected).abs().max() < 1e-5


def test_logits_m1_is_joined_mamba1(tmp_path):
    """M1 is MambaInLlama's Mamba-1 with joined projections and without rope_scaling."""
    options = {"config": {**LLAMA32, "rope_scaling": None}}
    separate = write_checkpoint(tmp_path / "separate", "mambainllama_mamba1", **options)
    fused = write_checkpoint(tmp_path / "fused", "m1", mamba_config={"d_inner": 128})
    tensors = load_file(separate / "model.safetensors")
    del tensors["lm_head.weight"]
    joins = {
        "mamba.in_proj": [
            f"mamba.{name}"
            for name in ("in_proj_z", "in_proj_x", "B_proj", "C_proj", "dt_proj_down")
        ],
        "mha.in_proj": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "mha.out_proj": ["self_attn.o_proj"],
    }
    for layer in range(3):
        for target, sources in joins.items():
            names = [f"model.layers.{layer}.{source}.weight" for source in sources]
            if names[0] in tensors:
                joined = torch.cat([tensors.pop(name) for name in names])
                tensors[f"model.layers.{layer}.{target}.weight"] = joined
    save_file(tensors, fused / "model.safetensors")
    difference = reference_logits(fused, prompt()) - reference_logits(separate, prompt())
    assert difference.abs().max() < 1e-10


def decayed_attention(scores, log_decay):
    """Lower triangle of scores[i, j] * exp(sum of log_decay over j+1..i), [L, L]."""
    total = log_decay.cumsum(0)
    return (scores * torch.exp(total[:, None] - total[None, :])).tril()


def test_llamba_mixer_published_form(tmp_path):
    """x / softplus(a), multiplied back by the step softplus(a) of a Mamba-2 scan with A = -1."""
    write_variant(tmp_path, "llamba_grouped")
    model = PublishedModel(tmp_path)
    mixer = model.blocks[0].mixer
    u = torch.randn(30, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    projected = u @ model.weights["backbone.layers.0.mixer.in_proj.weight"].T
    xbc, z, a = projected[:, :160], projected[:, 160:256], projected[:, 256:]
    weight = model.weights["backbone.layers.0.mixer.conv1d.weight"]
    bias = model.weights["backbone.layers.0.mixer.conv1d.bias"]
    xbc = F.conv1d(xbc.T, weight, bias, padding=3, groups=160)[:, :30].T
    step = F.softplus(a)
    heads = []
    for head in range(4):
        x = xbc[:, 24 * head : 24 * (head + 1)]
        start = 96 + 16 * (head // 2)
        b, c = xbc[:, start : start + 16], xbc[:, start + 32 : start + 48]
        matrix = decayed_attention(c @ b.T, -step[:, head]) * step[:, head]
        skip = model.weights["backbone.layers.0.mixer.D"][head]
        heads.append(matrix @ (x / step[:, head, None]) + skip * x)
    gate = z + model.weights["backbone.layers.0.mixer.z_bias"]
    y = torch.cat(heads, -1) * gate * torch.sigmoid(gate)
    expected = y @ model.weights["backbone.layers.0.mixer.out_proj.weight"].T
    assert (mixer(u, {}) - expected).abs().max() < 1e-10


def test_mamba1_mixer_matrix_form(tmp_path):
    """Channel by channel and state by state, as lower triangular matrices."""
    write_variant(tmp_path, "mamba1_published")
    model = PublishedModel(tmp_path)
    mixer = model.blocks[0].mixer
    assert isinstance(mixer, Mamba1Mixer)
    w = {name.removeprefix("model.layers.0.mamba."): t for name, t in model.weights.items()}
    u = torch.randn(12, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    narrow_x, narrow_b = u @ w["in_proj_x.weight"].T, u @ w["B_proj.weight"].T
    c, z = u @ w["C_proj.weight"].T, u @ w["in_proj_z.weight"].T
    low_rank = u @ w["dt_proj_down.weight"].T
    dt = F.softplus(F.linear(low_rank, w["dt_proj.weight"], 2 * w["dt_proj.bias"]))
    columns = []
    for channel in range(128):
        block, place = divmod(channel, 16)
        source = 16 * (block // 2)  # 8 blocks of 16 read 4: each of them twice
        x = (
            F.pad(narrow_x[:, source + place], (3, 0)).unfold(0, 4, 1)
            @ w["conv1d.weight"][channel, 0]
        )
        x = F.silu(x + w["conv1d.bias"][channel])
        y = w["D"][channel] * x
        for n in range(16):
            scores = torch.outer(c[:, 16 * block + n], narrow_b[:, source + n])
            log_decay = -dt[:, channel] * w["A_log"][channel, n].exp()
            y = y + decayed_attention(scores, log_decay) @ (dt[:, channel] * x)
        columns.append(y * F.silu(z[:, channel]))
    expected = torch.stack(columns, -1) @ w["out_proj.weight"].T
    assert (mixer(u, {}) - expected).abs().max() < 1e-10


def test_mamba2_mixer_matrix_form(tmp_path):
    """Head by head, as lower triangular matrices; two heads share each block of x and B."""
    write_variant(tmp_path, "mamba2_published")
    model = PublishedModel(tmp_path)
    mixer = model.blocks[0].mixer
    assert isinstance(mixer, Mamba2Mixer)
    w = {name.removeprefix("model.layers.0.mamba."): t for name, t in model.weights.items()}
    u = torch.randn(20, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    projected = u @ w["in_proj.weight"].T
    z, xbc, dt = projected[:, :128], projected[:, 128:384], projected[:, 384:]
    xbc = F.conv1d(xbc.T, w["conv1d.weight"], w["conv1d.bias"], padding=3, groups=256)[:, :20].T
    xbc, dt = F.silu(xbc), F.softplus(dt + w["dt_bias"])
    heads = []
    for head in range(4):
        block = slice(32 * (head // 2), 32 * (head // 2) + 32)
        own = slice(32 * head, 32 * head + 32)
        x, b, c = xbc[:, :64][:, block], xbc[:, 64:128][:, block], xbc[:, 128:][:, own]
        log_decay = -dt[:, head] * w["A_log"][head].exp()
        y = decayed_attention(c @ b.T, log_decay) @ (dt[:, head, None] * x) + w["D"][head] * x
        y = y * F.silu(z[:, own])
        heads.append(F.rms_norm(y, (32,), w["norm.weight"][own], eps=1e-5))
    expected = torch.cat(heads, -1) @ w["out_proj.weight"].T
    assert (mixer(u, {}) - expected).abs().max() < 1e-10


@pytest.mark.parametrize(("format", "vocab_size"), [("llamba", 157), ("m1", 160)])
def test_write_checkpoint_tokenizer(tmp_path, format, vocab_size):
    write_checkpoint(tmp_path, format, config={"vocab_size": vocab_size}, has_tokenizer=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert len(tokenizer) == vocab_size
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    text = "Then there are 3 apples:\n{x} \\boxed{42}!"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert len(ids) < len(text)
    messages = [{"role": "user", "content": "Hi"}]
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert chat == "<s><|user|>Hi<|end|><|assistant|>"
    assert tokenizer.encode(chat, add_special_tokens=False)[:2] == [1, 3]


def test_write_checkpoint_absent(tmp_path):
    write_checkpoint(tmp_path, "llamba", config={"architectures": ABSENT})
    assert "architectures" not in json.loads((tmp_path / "config.json").read_text())
