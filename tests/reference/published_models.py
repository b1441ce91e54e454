"""Reference models that read a folder in a published format and nothing else.

Sequential recurrences (a Python loop over tokens) in plain torch, float64 unless asked otherwise,
written from the published definitions and sharing no code with the plugin:

* Llamba: cartesia-ai/edge, cartesia_pytorch/Llamba (discrete Mamba-2, no attention layer).
* MambaInLlama, Mamba-1 and Mamba-2: jxiw/MambaInLlama, mamba/ and mamba2/ (the training classes).
* M1: jxiw/M1, mamba/ (the Mamba-1 mixer with fused projections; plain RoPE).

What differs from the obvious version is said where it happens. Every tensor of the folder must be
used: a missing, surplus or wrongly shaped one raises.

Shape letters: L tokens, D hidden size, V vocabulary (padded where the format pads), H heads,
G groups sharing B and C, P head width, N state width, K convolution taps, R rank of the dt
projection, di inner width (H * P), dx width of the ungrouped x and B (d_xb).
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

State = dict[str, Tensor]
"""What one layer keeps between calls: "conv" and "ssm", or "k" and "v" (attention)."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
}

# Options that the published constructors know and that change what a loaded model computes (and
# two that do not: headdim is overwritten by d_state, chunk_size only splits the work).
# fmt: off
MAMBA1_DEFAULTS: dict[str, Any] = {
    "d_state": 16, "d_conv": 4, "expand": 2, "dt_rank": "auto",
    "repeat_kv_before_conv": True, "conv_bias": True,
    "proj_x_bias": False, "proj_z_bias": False, "out_proj_bias": False,
}
MAMBA2_DEFAULTS: dict[str, Any] = {
    "d_state": 128, "ngroups": 1, "d_conv": 4, "expand": 2, "headdim": 64, "chunk_size": 256,
    "repeat_kv_before_conv": False, "rmsnorm": True, "norm_before_gate": False,
    "bias": False, "conv_bias": True, "D_has_hdim": False, "dt_limit": (0.0, math.inf),
}
LLAMBA_SSM_DEFAULTS: dict[str, Any] = {
    "d_state": 64, "n_v_heads": 32, "n_qk_heads": 32, "d_conv": 4, "expand": 1,
    "activation": "identity", "bias": False, "conv_bias": True,
}
LLAMBA_DEFAULTS: dict[str, Any] = {
    "pad_vocab_size_multiple": 8, "n_layer": 32, "norm_epsilon": 1e-5,
    "tie_embeddings": False, "lm_head_bias": False,
}
LLAMBA_MLP_DEFAULTS: dict[str, Any] = {"intermediate_size": 14336, "bias": False, "act_fn": "silu"}
# fmt: on


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder as stored: safetensors before .bin, an index before a single file."""
    for stem, load in (
        ("model.safetensors", load_file),
        ("pytorch_model.bin", lambda path: torch.load(path, weights_only=True)),
    ):
        index = folder / f"{stem}.index.json"
        if index.exists():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        elif (folder / stem).exists():
            names = [stem]
        else:
            continue
        tensors: dict[str, Tensor] = {}
        for name in names:
            tensors.update(load(folder / name))
        return tensors
    raise FileNotFoundError(f"{folder}: no model.safetensors, pytorch_model.bin or index of either")


def published_format(folder: Path, names: set[str]) -> str:
    """Tell the four published formats apart, by model_type and then by weight names.

    The config files cannot tell MambaInLlama's Mamba-1 from M1, which treat rope_scaling
    differently; the names of the fused projections can.
    """
    config = json.loads((folder / "config.json").read_text())
    if config.get("model_type") == "llamba":
        return "llamba"
    if not (folder / "mamba_config.json").exists():
        raise ValueError(f"{folder}: neither model_type llamba nor a mamba_config.json")
    endings = {".".join(name.split(".")[3:]) for name in names if name.startswith("model.layers.")}
    if "mamba.dt_bias" in endings:
        return "mambainllama_mamba2"
    if "mamba.in_proj_x.weight" in endings:
        return "mambainllama_mamba1"
    if "mamba.in_proj.weight" in endings or "mha.in_proj.weight" in endings:
        return "m1"
    return "mambainllama_mamba1"  # attention layers only: any MambaInLlama reading is the same


class Weights:
    """The tensors of a folder in the dtype of the computation, each to be taken exactly once."""

    def __init__(self, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
        self.tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        self.taken: set[str] = set()

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor called `name`, which must have this shape."""
        if name not in self.tensors:
            raise KeyError(f"missing tensor {name}, expected shape {shape}")
        tensor = self.tensors[name]
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}, expected {shape}")
        self.taken.add(name)
        return tensor

    def linear(self, name: str, rows: int, columns: int, bias: bool = False) -> "Linear":
        """A projection from `columns` to `rows` features."""
        weight = self.take(f"{name}.weight", rows, columns)
        return Linear(weight, self.take(f"{name}.bias", rows) if bias else None)

    def conv(self, name: str, channels: int, taps: int, bias: bool) -> "Conv":
        """A depthwise causal convolution."""
        weight = self.take(f"{name}.weight", channels, 1, taps)
        return Conv(weight, self.take(f"{name}.bias", channels) if bias else None)

    def check_all_taken(self) -> None:
        """Raise if the folder has a tensor that the model did not ask for."""
        surplus = sorted(set(self.tensors) - self.taken)
        if surplus:
            raise ValueError(f"surplus tensors: {surplus}")


class Linear:
    """y = x W^T + b."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Conv:
    """Depthwise causal convolution over tokens; the last tap multiplies the current token."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor, state: State) -> Tensor:
        """x [L, C]; state["conv"] holds the previous K - 1 inputs."""
        taps = self.weight.shape[-1]
        past = state.get("conv", x.new_zeros(taps - 1, x.shape[1]))
        padded = torch.cat([past, x])
        state["conv"] = padded[len(padded) - (taps - 1) :]
        y = torch.zeros_like(x)
        for tap in range(taps):
            y = y + padded[tap : tap + len(x)] * self.weight[:, 0, tap]
        return y if self.bias is None else y + self.bias


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis."""
    return weight * x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps)


def repeat_blocks(x: Tensor, width: int, times: int) -> Tensor:
    """Repeat each consecutive block of `width` channels `times` times in place (never tiled)."""
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // width, width)
    return blocks.repeat_interleave(times, dim=-2).flatten(-2)


class LlambaMixer:
    """Discrete Mamba-2: the decay is sigmoid(-a) per token and head, the input is not scaled.

    The published code divides x by softplus(a) and lets a Mamba-2 kernel with A = -1 multiply it
    back; here the factor is cancelled.
    """

    def __init__(self, weights: Weights, prefix: str, width: int, options: dict[str, Any]) -> None:
        self.heads, self.groups = options["n_v_heads"], options["n_qk_heads"]
        self.d_state = options["d_state"]
        self.inner = options["expand"] * width
        if self.inner % self.heads or self.heads % self.groups:
            raise ValueError(f"{self.inner} channels, {self.heads} heads, {self.groups} groups")
        self.group_width = self.groups * self.d_state
        conv_width = self.inner + 2 * self.group_width
        rows = conv_width + self.inner + self.heads
        self.in_proj = weights.linear(f"{prefix}.in_proj", rows, width, options["bias"])
        # With projection biases the published class has no z_bias parameter.
        self.z_bias = None if options["bias"] else weights.take(f"{prefix}.z_bias", self.inner)
        self.conv = weights.conv(
            f"{prefix}.conv1d", conv_width, options["d_conv"], options["conv_bias"]
        )
        self.activation = ACTIVATIONS[options["activation"]]
        self.skip = weights.take(f"{prefix}.D", self.heads)
        self.out_proj = weights.linear(f"{prefix}.out_proj", width, self.inner, options["bias"])

    def __call__(self, u: Tensor, state: State) -> Tensor:
        # rows of in_proj: [x di | B G*N | C G*N (these three convolved) | z di | a H]
        sizes = [self.inner + 2 * self.group_width, self.inner, self.heads]
        xbc, z, a = self.in_proj(u).split(sizes, dim=-1)
        xbc = self.activation(self.conv(xbc, state))
        x, b, c = xbc.split([self.inner, self.group_width, self.group_width], dim=-1)
        x = x.unflatten(-1, (self.heads, -1))
        per_group = self.heads // self.groups
        b = repeat_blocks(b, self.d_state, per_group).unflatten(-1, (self.heads, -1))
        c = repeat_blocks(c, self.d_state, per_group).unflatten(-1, (self.heads, -1))
        decay = torch.sigmoid(-a)
        memory = state.get("ssm", x.new_zeros(self.heads, x.shape[-1], self.d_state))
        outputs = []
        for t in range(len(u)):
            memory = decay[t, :, None, None] * memory + x[t, :, :, None] * b[t, :, None, :]
            outputs.append((memory * c[t, :, None, :]).sum(-1) + self.skip[:, None] * x[t])
        state["ssm"] = memory
        gate = z if self.z_bias is None else z + self.z_bias
        return self.out_proj(torch.stack(outputs).flatten(1) * F.silu(gate))


class Mamba1Mixer:
    """MambaInLlama's Mamba-1, with separate (MambaInLlama) or fused (M1) projections.

    dt_proj.bias counts twice: in the projection and again as the scan's delta bias. x and B have
    dx channels and are repeated in blocks of d_state channels (not of head_dim).
    """

    def __init__(
        self,
        weights: Weights,
        prefix: str,
        width: int,
        mamba: dict[str, Any],
        is_fused: bool,
    ) -> None:
        options = merged(MAMBA1_DEFAULTS, mamba["ssm_cfg"], f"{prefix}: ssm_cfg")
        self.d_state, self.narrow = options["d_state"], mamba["d_xb"]
        given_inner = mamba.get("d_inner")
        self.inner = options["expand"] * width if given_inner is None else given_inner
        rank = options["dt_rank"]
        self.rank = math.ceil(width / 16) if rank == "auto" else rank
        self.repeats = (self.inner // self.d_state) // (self.narrow // self.d_state)
        self.repeat_first = options["repeat_kv_before_conv"]
        if is_fused:
            if options["proj_x_bias"] or options["proj_z_bias"]:
                raise ValueError(f"{prefix}: the fused projection of M1 has no bias")
            rows = 2 * self.inner + 2 * self.narrow + self.rank
            self.in_proj: Linear | None = weights.linear(f"{prefix}.in_proj", rows, width)
        else:
            self.in_proj = None
            self.z_proj = weights.linear(
                f"{prefix}.in_proj_z", self.inner, width, options["proj_z_bias"]
            )
            self.x_proj = weights.linear(
                f"{prefix}.in_proj_x", self.narrow, width, options["proj_x_bias"]
            )
            self.b_proj = weights.linear(f"{prefix}.B_proj", self.narrow, width)
            self.c_proj = weights.linear(f"{prefix}.C_proj", self.inner, width)
            self.dt_down = weights.linear(f"{prefix}.dt_proj_down", self.rank, width)
        self.dt_proj = weights.linear(f"{prefix}.dt_proj", self.inner, self.rank, bias=True)
        conv_width = self.inner if self.repeat_first else self.narrow
        self.conv = weights.conv(
            f"{prefix}.conv1d", conv_width, options["d_conv"], options["conv_bias"]
        )
        self.log_a = weights.take(f"{prefix}.A_log", self.inner, self.d_state)
        self.skip = weights.take(f"{prefix}.D", self.inner)
        self.out_proj = weights.linear(
            f"{prefix}.out_proj", width, self.inner, options["out_proj_bias"]
        )

    def __call__(self, u: Tensor, state: State) -> Tensor:
        if self.in_proj is not None:
            # rows of the fused projection: [z di | x dx | B dx | C di | dt R]
            sizes = [self.inner, self.narrow, self.narrow, self.inner, self.rank]
            z, x, b, c, dt = self.in_proj(u).split(sizes, dim=-1)
        else:
            z, x, b, c, dt = (
                project(u)
                for project in (self.z_proj, self.x_proj, self.b_proj, self.c_proj, self.dt_down)
            )
        if self.repeat_first:
            x = F.silu(self.conv(repeat_blocks(x, self.d_state, self.repeats), state))
        else:
            x = repeat_blocks(F.silu(self.conv(x, state)), self.d_state, self.repeats)
        heads = self.inner // self.d_state
        b = repeat_blocks(b, self.d_state, self.repeats).unflatten(-1, (heads, -1))
        c = c.unflatten(-1, (heads, -1))
        # Channel i reads the B and C of block i // d_state.
        b = b.repeat_interleave(self.d_state, dim=-2)
        c = c.repeat_interleave(self.d_state, dim=-2)
        assert self.dt_proj.bias is not None
        dt = softplus(self.dt_proj(dt) + self.dt_proj.bias)
        a = -torch.exp(self.log_a)
        memory = state.get("ssm", x.new_zeros(self.inner, self.d_state))
        outputs = []
        for t in range(len(u)):
            memory = torch.exp(dt[t, :, None] * a) * memory + (dt[t] * x[t])[:, None] * b[t]
            outputs.append((memory * c[t]).sum(-1) + self.skip * x[t])
        state["ssm"] = memory
        return self.out_proj(torch.stack(outputs) * F.silu(z))


class Mamba2Mixer:
    """MambaInLlama's Mamba-2: ngroups heads of width d_state, one decay per head.

    x and B have dx channels, repeated per head; dt_bias counts once; the gated norm works per head
    with eps 1e-5 whatever rms_norm_eps says.
    """

    def __init__(self, weights: Weights, prefix: str, width: int, mamba: dict[str, Any]) -> None:
        options = merged(MAMBA2_DEFAULTS, mamba["ssm_cfg"], f"{prefix}: ssm_cfg")
        self.heads, self.d_state = options["ngroups"], options["d_state"]
        self.narrow = mamba["d_xb"]
        given_inner = mamba.get("d_inner")
        self.inner = options["expand"] * width if given_inner is None else given_inner
        if self.inner != self.heads * self.d_state:
            raise ValueError(f"d_inner {self.inner} is not {self.heads} heads of {self.d_state}")
        self.repeats = self.inner // self.narrow
        self.repeat_first = options["repeat_kv_before_conv"]
        self.norm_first = options["norm_before_gate"]
        self.dt_limits = tuple(options["dt_limit"])
        rows = 2 * self.inner + 2 * self.narrow + self.heads
        conv_width = 3 * self.inner if self.repeat_first else self.inner + 2 * self.narrow
        self.in_proj = weights.linear(f"{prefix}.in_proj", rows, width, options["bias"])
        self.conv = weights.conv(
            f"{prefix}.conv1d", conv_width, options["d_conv"], options["conv_bias"]
        )
        self.dt_bias = weights.take(f"{prefix}.dt_bias", self.heads)
        self.log_a = weights.take(f"{prefix}.A_log", self.heads)
        self.has_wide_skip = options["D_has_hdim"]
        self.skip = weights.take(f"{prefix}.D", self.inner if self.has_wide_skip else self.heads)
        self.norm = (
            weights.take(f"{prefix}.norm.weight", self.inner) if options["rmsnorm"] else None
        )
        self.out_proj = weights.linear(f"{prefix}.out_proj", width, self.inner, options["bias"])

    def __call__(self, u: Tensor, state: State) -> Tensor:
        # rows of in_proj: [z di | x dx | B dx | C di (these three convolved) | dt H]
        sizes = [self.inner, self.narrow, self.narrow, self.inner, self.heads]
        z, x, b, c, dt = self.in_proj(u).split(sizes, dim=-1)
        if self.repeat_first:
            x, b = (repeat_blocks(part, self.d_state, self.repeats) for part in (x, b))
        widths = [x.shape[-1], b.shape[-1], self.inner]
        x, b, c = F.silu(self.conv(torch.cat([x, b, c], -1), state)).split(widths, dim=-1)
        if not self.repeat_first:
            x, b = (repeat_blocks(part, self.d_state, self.repeats) for part in (x, b))
        x, b, c = (part.unflatten(-1, (self.heads, self.d_state)) for part in (x, b, c))
        dt = softplus(dt + self.dt_bias).clamp(*self.dt_limits)
        decay = torch.exp(-dt * torch.exp(self.log_a))
        skip = self.skip.reshape(self.heads, -1)  # [H, 1], or [H, P] if D_has_hdim
        memory = state.get("ssm", x.new_zeros(self.heads, self.d_state, self.d_state))
        outputs = []
        for t in range(len(u)):
            scaled = dt[t, :, None] * x[t]
            memory = decay[t, :, None, None] * memory + scaled[:, :, None] * b[t, :, None, :]
            outputs.append((memory * c[t, :, None, :]).sum(-1) + skip * x[t])
        state["ssm"] = memory
        y = torch.stack(outputs)
        gate = F.silu(z).unflatten(-1, (self.heads, self.d_state))
        if self.norm is None:
            y = y * gate
        else:
            norm = self.norm.reshape(self.heads, self.d_state)
            if self.norm_first:
                y = rms_norm(y, norm, 1e-5) * gate
            else:
                y = rms_norm(y * gate, norm, 1e-5)
        return self.out_proj(y.flatten(1))


class Attention:
    """Causal grouped-query attention with half-split RoPE, as Llama or Mistral.

    M1 stores q, k, v as one matrix and never scales the rotary frequencies.
    """

    def __init__(
        self, weights: Weights, layer: str, config: dict[str, Any], is_fused: bool
    ) -> None:
        width = config["hidden_size"]
        self.heads = config["num_attention_heads"]
        self.kv_heads = config.get("num_key_value_heads") or self.heads
        self.head_dim = config.get("head_dim") or width // self.heads
        has_window = config["model_type"] == "mistral" and not is_fused  # M1 passes none on
        self.window = config.get("sliding_window") if has_window else None
        self.frequencies = rotary_frequencies(config, self.head_dim, ignore_scaling=is_fused)
        q_rows, kv_rows = self.heads * self.head_dim, self.kv_heads * self.head_dim
        if is_fused:
            rows = q_rows + 2 * kv_rows
            self.in_proj: Linear | None = weights.linear(f"{layer}.mha.in_proj", rows, width)
            self.out_proj = weights.linear(f"{layer}.mha.out_proj", width, q_rows)
        else:
            self.in_proj = None
            self.q_proj = weights.linear(f"{layer}.self_attn.q_proj", q_rows, width)
            self.k_proj = weights.linear(f"{layer}.self_attn.k_proj", kv_rows, width)
            self.v_proj = weights.linear(f"{layer}.self_attn.v_proj", kv_rows, width)
            self.out_proj = weights.linear(f"{layer}.self_attn.o_proj", width, q_rows)

    def __call__(self, u: Tensor, state: State) -> Tensor:
        if self.in_proj is not None:
            rows = [n * self.head_dim for n in (self.heads, self.kv_heads, self.kv_heads)]
            q, k, v = self.in_proj(u).split(rows, dim=-1)
        else:
            q, k, v = self.q_proj(u), self.k_proj(u), self.v_proj(u)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in (q, k, v))
        start = len(state["k"]) if "k" in state else 0
        positions = torch.arange(start, start + len(u))
        q, k = self.rotate(q, positions), self.rotate(k, positions)
        if start:
            k, v = torch.cat([state["k"], k]), torch.cat([state["v"], v])
        state["k"], state["v"] = k, v
        keys = torch.arange(len(k))
        is_visible = keys[None, :] <= positions[:, None]
        if self.window is not None:  # the window counts the token itself
            is_visible &= keys[None, :] > positions[:, None] - self.window
        per_group = self.heads // self.kv_heads
        k, v = k.repeat_interleave(per_group, dim=1), v.repeat_interleave(per_group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(self.head_dim)
        scores = scores.masked_fill(~is_visible, -math.inf)
        return self.out_proj(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1))

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate channel i against channel i + head_dim / 2. x [L, heads, head_dim]."""
        angles = (positions[:, None].double() * self.frequencies).to(x.dtype)[:, None, :]
        first, second = x.chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def rotary_frequencies(config: dict[str, Any], head_dim: int, *, ignore_scaling: bool) -> Tensor:
    """Radians per token of each channel pair, [head_dim / 2], float64."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    theta = float(config.get("rope_theta", 10000.0))
    frequencies: Tensor = 1.0 / theta**exponents
    scaling = config.get("rope_scaling")
    if scaling is None or ignore_scaling:
        return frequencies
    kind = scaling.get("rope_type", scaling.get("type"))  # the key was renamed
    if kind != "llama3":
        raise ValueError(f"rope_scaling of type {kind}: only llama3 is published")
    factor = scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    # Full turns in the original context: few (<= low) scale by 1 / factor, many (>= high) stay.
    blend: Tensor = ((turns - low) / (high - low)).clamp(0, 1)
    scaled: Tensor = (1 - blend) * frequencies / factor + blend * frequencies
    return scaled


class Block:
    """h += mix(norm(h)); h += mlp(norm(h))."""

    def __init__(
        self,
        weights: Weights,
        layer: str,
        width: int,
        mixer: Callable[[Tensor, State], Tensor],
        eps: float,
        mlp_width: int,
        activation: str,
        mlp_bias: bool,
    ) -> None:
        self.mixer, self.eps = mixer, eps
        self.mixer_norm = weights.take(f"{layer}.input_layernorm.weight", width)
        self.mlp_norm = weights.take(f"{layer}.post_attention_layernorm.weight", width)
        self.gate = weights.linear(f"{layer}.mlp.gate_proj", mlp_width, width, mlp_bias)
        self.up = weights.linear(f"{layer}.mlp.up_proj", mlp_width, width, mlp_bias)
        self.down = weights.linear(f"{layer}.mlp.down_proj", width, mlp_width, mlp_bias)
        self.activation = ACTIVATIONS[activation]

    def __call__(self, h: Tensor, state: State) -> Tensor:
        h = h + self.mixer(rms_norm(h, self.mixer_norm, self.eps), state)
        v = rms_norm(h, self.mlp_norm, self.eps)
        return h + self.down(self.activation(self.gate(v)) * self.up(v))


class PublishedModel:
    """A model read from a folder in a published format.

    `weights` maps published names to the very tensors the computation uses, so that a test can
    change one in place or ask for its gradient; `tied_copies` are names whose tensor repeats the
    embedding and is not used itself.
    """

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float64) -> None:
        tensors = read_tensors(folder)
        self.format = published_format(folder, set(tensors))
        self.tied_copies: set[str] = set()
        self.blocks: list[Block] = []
        weights = Weights(tensors, dtype)
        self.weights = weights.tensors
        config = json.loads((folder / "config.json").read_text())
        if self.format == "llamba":
            self._build_llamba(weights, config)
        else:
            self._build_hybrid(
                weights, config, json.loads((folder / "mamba_config.json").read_text())
            )
        weights.check_all_taken()

    def _build_llamba(self, weights: Weights, config: dict[str, Any]) -> None:
        config = {**LLAMBA_DEFAULTS, **config}
        ssm = {**LLAMBA_SSM_DEFAULTS, **config.get("ssm_cfg", {})}
        mlp = config.get("mlp_cfg") or LLAMBA_MLP_DEFAULTS
        width, multiple = config["d_model"], config["pad_vocab_size_multiple"]
        vocabulary = math.ceil(config["vocab_size"] / multiple) * multiple
        self.embedding = weights.take("backbone.embedding.weight", vocabulary, width)
        for index in range(config["n_layer"]):
            layer = f"backbone.layers.{index}"
            mixer = LlambaMixer(weights, f"{layer}.mixer", width, ssm)
            # The block norms have a fixed eps; norm_epsilon is the final norm's.
            mlp_options = mlp["intermediate_size"], mlp["act_fn"], mlp["bias"]
            self.blocks.append(Block(weights, layer, width, mixer, 1e-5, *mlp_options))
        self.final_norm = weights.take("backbone.final_layernorm.weight", width)
        self.final_eps = config["norm_epsilon"]
        if config["tie_embeddings"]:
            self.head = Linear(self.embedding, None)
        else:
            self.head = weights.linear("lm_head", vocabulary, width, config["lm_head_bias"])

    def _build_hybrid(
        self, weights: Weights, config: dict[str, Any], mamba: dict[str, Any]
    ) -> None:
        if config.get("attention_bias") or config.get("mlp_bias"):
            raise ValueError("attention_bias and mlp_bias are false in every published model")
        width, vocabulary = config["hidden_size"], config["vocab_size"]
        eps = config.get("rms_norm_eps", 1e-6)
        self.embedding = weights.take("model.embed_tokens.weight", vocabulary, width)
        is_m1 = self.format == "m1"
        mixer: Callable[[Tensor, State], Tensor]
        for index in range(config["num_hidden_layers"]):
            layer = f"model.layers.{index}"
            if index in mamba["attn_layers"]:
                mixer = Attention(weights, layer, config, is_fused=is_m1)
                block_eps, activation = eps, config.get("hidden_act", "silu")
            else:
                prefix = f"{layer}.mamba"
                if self.format == "mambainllama_mamba2":
                    mixer = Mamba2Mixer(weights, prefix, width, mamba)
                else:
                    mixer = Mamba1Mixer(weights, prefix, width, mamba, is_fused=is_m1)
                block_eps, activation = mamba["rms_norm_eps"], mamba["hidden_act"]
            mlp_width = config["intermediate_size"]
            self.blocks.append(
                Block(weights, layer, width, mixer, block_eps, mlp_width, activation, False)
            )
        self.final_norm = weights.take("model.norm.weight", width)
        self.final_eps = eps
        if not config.get("tie_word_embeddings", False):
            self.head = weights.linear("lm_head", vocabulary, width)
            return
        self.head = Linear(self.embedding, None)
        if "lm_head.weight" in weights.tensors:  # MambaInLlama's .bin files repeat the embedding
            copy = weights.take("lm_head.weight", vocabulary, width)
            if not torch.equal(copy, self.embedding):
                raise ValueError("tie_word_embeddings, but lm_head.weight is not the embedding")
            self.tied_copies.add("lm_head.weight")

    def new_state(self) -> list[State]:
        """The empty state before the first token."""
        return [{} for _ in self.blocks]

    def logits(self, input_ids: Sequence[int] | Tensor, state: list[State] | None = None) -> Tensor:
        """Logits [L, V] at each of these tokens, which continue `state` and update it."""
        state = self.new_state() if state is None else state
        h = self.embedding[torch.as_tensor(input_ids, dtype=torch.long)]
        for block, block_state in zip(self.blocks, state, strict=True):
            h = block(h, block_state)
        return self.head(rms_norm(h, self.final_norm, self.final_eps))


def reference_logits(
    folder: Path, input_ids: Sequence[int] | Tensor, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Logits of one sequence at all positions.

    Args:
        folder: a folder in a published format.
        input_ids: token ids of one sequence, [L].
        dtype: of the weights and of the computation.

    Returns:
        Logits [L, V]; V is the padded vocabulary where the format pads.
    """
    with torch.no_grad():
        return PublishedModel(Path(folder), dtype).logits(input_ids)


def reference_greedy_with_margins(
    folder: Path, prompt: Sequence[int] | Tensor, num_tokens: int
) -> tuple[list[int], list[float]]:
    """Greedy continuation, token by token from the state, and by how much each token won.

    Returns:
        The `num_tokens` tokens, and the logit of each minus the second largest logit. Tokens after
        a margin of the order of the compared implementation's error are not comparable.
    """
    model = PublishedModel(Path(folder))
    tokens: list[int] = []
    margins: list[float] = []
    with torch.no_grad():
        state = model.new_state()
        last = model.logits(prompt, state)[-1]
        while len(tokens) < num_tokens:
            best = last.topk(2)
            tokens.append(int(best.indices[0]))
            margins.append(float(best.values[0] - best.values[1]))
            last = model.logits(tokens[-1:], state)[-1]
    return tokens, margins


def reference_greedy(folder: Path, prompt: Sequence[int] | Tensor, num_tokens: int) -> list[int]:
    """Greedy continuation of `num_tokens` tokens; see `reference_greedy_with_margins`."""
    return reference_greedy_with_margins(folder, prompt, num_tokens)[0]


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)) without the cut-off at 20 of torch's own softplus."""
    return torch.logaddexp(x, torch.zeros_like(x))


def merged(defaults: dict[str, Any], given: dict[str, Any], where: str) -> dict[str, Any]:
    """`defaults` updated by `given`, which may not name an option that is not among them."""
    unknown = sorted(set(given) - set(defaults))
    if unknown:
        raise ValueError(f"{where}: unknown options {unknown}; known: {sorted(defaults)}")
    return {**defaults, **given}
