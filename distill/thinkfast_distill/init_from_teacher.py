"""First weights of a student, from its teacher.

Embedding, MLPs, norms, head and the attention layers that stay are the teacher's. The mixers are:

``random``
    PyTorch's defaults and the published recurrence parameters (``reset_recurrence``).
``mohawk``
    the published Llamba recipe (goombalab/mohawk ``configs/Llama``): as ``random``, but out_proj is
    divided by the square root of the number of layers, and in Llamba the convolution is the
    identity (last tap 1, bias 0) and the gate is open (z rows 0, z_bias such that SiLU gives 1).
    Hybrids keep the random convolution and gate of their own recipe: SiLU follows their
    convolution, and without a bias in front of the gate z rows of 0 would shut it.
``qkvo``
    as ``mohawk``, but the projections are the teacher's: V -> x, K -> B, Q -> C, O -> out.

What differs from the published conversions with ``qkvo``:

* Grouped keys and values are repeated per head. (mohawk's own option repeats single rows.)
* The attention scale, 1 / sqrt(head_dim), is in C; a scan has no softmax to hold it. The released
  conversions leave it out.
* A hybrid with ``ssm_state_size`` below the attention's head_dim (Mamba-1: 16) cuts each attention
  head into slices. A slice of x and B serves consecutive slices of C, so the rows of Q and the
  columns of O are reordered: slice i of a query head meets slice i of its own key/value head. The
  released conversions keep Q and O in order, which pairs slices of different heads. Each slice
  still sees only its own part of the scalar product of q and k.
* Biases of q, k and v (Qwen2) go through the taps into the bias of the convolution. With
  ``use_bias`` (Llama with ``attention_bias``) all four are those of the projections themselves.

Q and K were trained with RoPE, which mixers do not have: ``qkvo`` is a warm start, no more.

Measured once on a teacher of 3 layers and 128 channels (KL(student || teacher) on 2048 tokens that
the teacher sampled; before and after 40 steps of end-to-end distillation with lr 1e-3; one seed):

* Llamba, ``qkvo``: D = 1, as published, starts lower than D = 0 (6.2 against 7.4; after 1.05 and
  0.91). Decay rows in the direction of the mean input, such that the decay is slow on average
  (a = -3), start higher (8.1) and end lower (0.72): a projection without bias can only do that with
  text at hand, so the rows stay random here, and stage 1 learns them.
* Hybrids, ``qkvo``: with an identity in front of SiLU instead of the random convolution training
  is much slower (2.5 against 1.0 with Mamba-2, 3.2 against 1.1 with Mamba-1).

Shapes: D hidden_size, H heads, N ssm_state_size.
"""

import logging
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from thinkfast_distill.architecture import attention_window, head_dim_of
from thinkfast_distill.students.attention import Attention
from thinkfast_distill.students.common import ShortConv
from thinkfast_distill.students.llamba import DiscreteMamba2
from thinkfast_distill.students.mamba_in_llama import Mamba1, repeat_blocks
from thinkfast_distill.students.model import Mixer, Student

logger = logging.getLogger(__name__)

How = Literal["mohawk", "qkvo", "random"]

OPEN_GATE = 1.278464542761
"""SiLU of this is 1."""


def initialise(student: Student, teacher: Any, how: How = "mohawk", seed: int = 0) -> None:
    """Sets all weights of a student.

    Args:
        student: changed in place; on any device, not sharded.
        teacher: a Hugging Face causal language model of Llama's architecture (Llama, Mistral,
            Qwen2), or a ``teacher.Teacher`` around one; not sharded.
        how: what the mixers start from, see above.
        seed: of the random parts.

    Raises:
        ValueError: the sizes of student and teacher do not fit, or the teacher has weights that
            the student has no place for. The student may be changed in part then.
    """
    if how not in get_args(How):
        raise ValueError(f"init={how!r}; accepted: {', '.join(get_args(How))}.")
    model = teacher if hasattr(teacher, "lm_head") else teacher.model
    source: dict[str, torch.Tensor] = model.state_dict()
    _check_sizes(student, model.config)
    _check_rope(student, model)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _copy_shared(student, source)
        for i, block in enumerate(student.blocks()):
            mixer = block.token_mixer
            if isinstance(mixer, Attention):
                continue
            _reset(mixer)
            if how == "random":
                continue
            mixer.out_proj.weight.div_(student.num_layers**0.5)
            if isinstance(mixer, DiscreteMamba2):
                _identity_convolution(mixer.conv1d)
                _open_gate(mixer)
            if how == "qkvo":
                attention = {
                    name: source[f"model.layers.{i}.self_attn.{name}"]
                    for name in _ATTENTION
                    if f"model.layers.{i}.self_attn.{name}" in source
                }
                _copy_attention(mixer, attention, model.config)
    logger.info("student initialised from %s, init=%s", type(model).__name__, how)


_ATTENTION = tuple(f"{p}_proj.{part}" for part in ("weight", "bias") for p in "qkvo")


def expand_heads(rows: torch.Tensor, head_dim: int, num_heads: int) -> torch.Tensor:
    """Rows of key/value heads, each head repeated for the query heads that share it.

    Args:
        rows: [KV * head_dim, ...] of a projection, or its bias.
        head_dim: rows of one head.
        num_heads: H, a multiple of KV.

    Returns:
        [H * head_dim, ...]; head h is the given head h // (H / KV).
    """
    heads: torch.Tensor = rows.unflatten(0, (-1, head_dim))
    return heads.repeat_interleave(num_heads // heads.shape[0], dim=0).flatten(0, 1)


def slice_order(num_heads: int, kv_heads: int, head_dim: int, width: int) -> torch.Tensor:
    """Order of query channels in which consecutive slices share a slice of keys and values.

    Args:
        num_heads: query heads of the attention.
        kv_heads: key/value heads.
        head_dim: width of an attention head.
        width: width of a slice, a divisor of ``head_dim``.

    Returns:
        [num_heads * head_dim] indices: place -> query channel. In order (key/value head, slice,
        query head of the group, channel); the identity if ``width`` is ``head_dim``.
    """
    channels = torch.arange(num_heads * head_dim)
    return (
        channels.view(kv_heads, num_heads // kv_heads, head_dim // width, width)
        .transpose(1, 2)
        .flatten()
    )


def _check_sizes(student: Student, teacher: Any) -> None:
    """Raises ValueError naming the first size in which the two differ."""
    names = ["hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size"]
    if any(student.is_attention(i) for i in range(student.num_layers)):
        names += ["num_attention_heads", "num_key_value_heads"]
        if student.config.head_dim != head_dim_of(teacher):
            raise ValueError(
                f"head_dim: the student's attention layers have {student.config.head_dim}, the "
                f"teacher's {head_dim_of(teacher)}; set the teacher's."
            )
    for name in names:
        ours, theirs = getattr(student.config, name), getattr(teacher, name)
        if ours != theirs:
            raise ValueError(
                f"{name}: the student has {ours}, the teacher {theirs}; a student keeps all of its "
                "teacher's sizes but those of the mixers."
            )
    if student.config.tie_word_embeddings and not teacher.tie_word_embeddings:
        raise ValueError(
            "tie_word_embeddings: the teacher has a head of its own, which a student with tied "
            "weights cannot hold; set false."
        )


def _check_rope(student: Student, model: Any) -> None:
    """Raises ValueError if attention layers that stay would see other positions."""
    kept = [m for m in student.modules() if isinstance(m, Attention)]
    if not kept:
        return
    theirs = LlamaRotaryEmbedding(model.config)
    ours = kept[0].rotary
    same = torch.equal(ours.inv_freq.cpu(), theirs.inv_freq.cpu())
    if not same or ours.attention_scaling != theirs.attention_scaling:
        raise ValueError(
            f"rope_parameters: the student has {student.config.rope_parameters!r}, the teacher "
            f"{model.config.rope_parameters!r}; attention layers that stay need the teacher's."
        )
    for i in (i for i in range(student.num_layers) if student.is_attention(i)):
        window = attention_window(model.config, i)
        if student.config.sliding_window != window:
            raise ValueError(
                f"sliding_window: the student has {student.config.sliding_window}, layer {i} of "
                f"the teacher {window}; attention layers that stay need the teacher's."
            )


def _copy_shared(student: Student, source: Mapping[str, torch.Tensor]) -> None:
    """Copies everything outside of the mixers; nothing may be left over on either side."""
    mixers = tuple(
        f"model.layers.{i}.{block.mixer_name}."
        for i, block in enumerate(student.blocks())
        if block.mixer_name != "self_attn"
    )
    replaced = tuple(f"{name.rsplit('.', 2)[0]}.self_attn." for name in mixers)
    wanted = {n: p for n, p in student.named_parameters() if not n.startswith(mixers)}
    for name, parameter in wanted.items():
        given = source.get(name)
        if given is None and name == "lm_head.weight":
            given = source["model.embed_tokens.weight"]  # tied teacher, untied student
        if given is None and name.endswith(".bias"):
            parameter.zero_()  # Qwen2 has biases on q, k and v, but not on o
            continue
        if given is None or given.shape != parameter.shape:
            found = "nothing" if given is None else list(given.shape)
            raise ValueError(
                f"{name}: the student expects {list(parameter.shape)}, the teacher has {found}; "
                "accepted: teachers of Llama's architecture with the student's sizes."
            )
        parameter.copy_(given)
    # A tied head has two names in the teacher's state dict.
    ignored = ("lm_head.weight", "rotary_emb.inv_freq")
    lost = [
        name
        for name, tensor in source.items()
        if name not in wanted
        and not name.startswith(replaced)
        and not name.endswith(ignored)
        and bool(tensor.any())
    ]
    if lost:
        raise ValueError(
            f"{lost[0]}: the teacher has {len(lost)} tensors that the student has no place for; "
            "accepted: teachers of Llama's architecture; biases of attention and MLP need "
            "attention_bias and mlp_bias in the student's configuration."
        )


def _reset(mixer: Mixer) -> None:
    for module in mixer.children():
        if isinstance(module, nn.Linear | ShortConv):
            module.reset_parameters()
    for name, parameter in mixer.named_parameters(recurse=False):
        if name in ("x_bias", "z_bias"):
            parameter.zero_()
    mixer.reset_recurrence()


def _identity_convolution(conv: ShortConv) -> None:
    conv.weight.zero_()
    conv.weight[:, 0, -1] = 1.0
    if conv.bias is not None:
        conv.bias.zero_()


def _open_gate(mixer: DiscreteMamba2) -> None:
    rows = mixer.rows()["z"]
    mixer.in_proj.weight[rows] = 0.0
    if mixer.z_bias is not None:
        mixer.z_bias.fill_(OPEN_GATE)
    else:  # a model with projection biases has no z_bias
        mixer.in_proj.bias[rows] = OPEN_GATE


def _copy_attention(mixer: Mixer, source: Mapping[str, torch.Tensor], teacher: Any) -> None:
    """Copies one layer's projections and, where there are any, their biases."""
    heads, head_dim = teacher.num_attention_heads, head_dim_of(teacher)
    kv_heads = teacher.num_key_value_heads
    groups = _check_mixer(mixer, heads, kv_heads, head_dim)
    width = mixer.ssm_state_size
    order = slice_order(heads, groups, head_dim, width)
    parts = {
        "x": expand_heads(source["v_proj.weight"], head_dim, groups),
        "B": expand_heads(source["k_proj.weight"], head_dim, groups),
        "C": source["q_proj.weight"][order] * head_dim**-0.5,
    }
    for part, rows in mixer.rows().items():
        if part in parts:
            mixer.in_proj.weight[rows] = parts[part].to(mixer.in_proj.weight)
    mixer.out_proj.weight.copy_(source["o_proj.weight"][:, order])
    _copy_biases(mixer, source, groups, order, head_dim)


def _check_mixer(mixer: Mixer, heads: int, kv_heads: int, head_dim: int) -> int:
    """Heads of keys and values that x and B hold: the attention's, or as many as queries.

    Raises:
        ValueError: the mixer cannot take the teacher's projections.
    """
    size, width = heads * head_dim, mixer.ssm_state_size
    if isinstance(mixer, DiscreteMamba2):
        found = (mixer.num_heads, mixer.n_groups, width, mixer.mixer_size)
        if found != (heads, heads, head_dim, size):
            raise ValueError(
                "init='qkvo' needs a Llamba mixer with the teacher's heads: (num_heads, n_groups, "
                f"ssm_state_size, mixer width) = {(heads, heads, head_dim, size)}, the student has "
                f"{found}; change the layout, or use init='mohawk'."
            )
        return heads
    accepted = [kv_heads * head_dim, size]
    if mixer.mixer_size != size or mixer.xb_size not in accepted or head_dim % width:
        raise ValueError(
            f"init='qkvo' needs a mixer {size} wide, x and B {' or '.join(map(str, accepted))} "
            f"wide, and an ssm_state_size that divides head_dim={head_dim}; the student has "
            f"{mixer.mixer_size}, {mixer.xb_size} and {width}; change the layout, or use "
            "init='mohawk'."
        )
    return mixer.xb_size // head_dim


def _copy_biases(
    mixer: Mixer,
    source: Mapping[str, torch.Tensor],
    groups: int,
    order: torch.Tensor,
    head_dim: int,
) -> None:
    """Puts biases of q, k, v and o where the mixer has a place for them.

    Raises:
        ValueError: a bias that is not zero has no place.
    """
    given = {n.split("_")[0]: t for n, t in source.items() if n.endswith(".bias") and t.any()}
    in_bias: torch.Tensor | None = mixer.in_proj.bias
    out_bias: torch.Tensor | None = mixer.out_proj.bias
    if out_bias is not None:
        out_bias.copy_(given.get("o", torch.zeros_like(out_bias)))
    elif "o" in given:
        is_mamba1 = isinstance(mixer, Mamba1)
        fix = "mamba_version: mamba2" if is_mamba1 else "use_bias: true in student.layout"
        raise ValueError(_no_place("o_proj.bias", "out_proj", fix))
    parts = {}
    for part, name in (("x", "v"), ("B", "k")):
        if name in given:
            parts[part] = expand_heads(given[name], head_dim, groups)
    if "q" in given:
        parts["C"] = given["q"][order] * head_dim**-0.5
    if in_bias is not None:
        for part, rows in mixer.rows().items():
            if part in ("x", "B", "C"):
                in_bias[rows] = parts[part].to(in_bias) if part in parts else 0.0
        return
    if not parts:
        return
    convolved = ("x",) if isinstance(mixer, Mamba1) else ("x", "B", "C")
    lost = sorted(set(parts) - set(convolved))
    if lost or mixer.conv1d.bias is None:
        raise ValueError(_no_place("q_proj, k_proj or v_proj bias", "convolution"))
    full: list[torch.Tensor] = []
    rows_of = mixer.rows()
    for part in convolved:
        rows = rows_of[part]
        bias = parts.get(part, torch.zeros(rows.stop - rows.start))
        if not isinstance(mixer, DiscreteMamba2) and mixer.repeat_kv_before_conv and part != "C":
            times = mixer.num_heads // mixer.n_groups
            bias = repeat_blocks(bias, mixer.ssm_state_size, times)
        full.append(bias)
    # A constant input c adds c times the sum of the taps.
    mixer.conv1d.bias.add_(torch.cat(full).to(mixer.conv1d.bias) * mixer.conv1d.weight.sum((1, 2)))


def _no_place(what: str, where: str, fix: str = "another layout") -> str:
    return (
        f"init='qkvo': the teacher's {what} has no place in a mixer whose {where} has no bias for "
        f"it; use init='mohawk', or {fix}."
    )
