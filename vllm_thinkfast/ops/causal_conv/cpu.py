"""Short causal convolution on CPU; same functions and arguments as ``reference.py``.

The packed tokens of a batch are convolved in blocks that stay in the caches, as if they were one
sequence; the few tokens whose window crosses a border are computed again with the cached tails.
Decode steps use a compiled kernel (``cpu_kernels.py``) where the dtypes suit it.
"""

import torch
import torch.nn.functional as F

from vllm_thinkfast.ops import compiled
from vllm_thinkfast.ops.causal_conv.reference import Activation
from vllm_thinkfast.ops.packing import row_blocks

_CHANNELS = 512
"""Channels of a sequence that one thread computes in a row."""


def prefill(
    u: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: Activation,
    state: torch.Tensor,
    state_indices: torch.Tensor,
    has_initial_state: torch.Tensor,
    cu_seqlens: torch.Tensor,
) -> torch.Tensor:
    """See ``reference.prefill``."""
    C, K = weight.shape
    taps = weight.float().T.contiguous()  # [K, C]
    biases = None if bias is None else bias.float()
    y = torch.empty(u.shape, dtype=torch.float32, device=u.device)
    for rows in row_blocks(len(u), 4 * C):
        # Reads across the borders of sequences; _convolve_heads mends the rows behind a border.
        first = max(rows.start - (K - 1), 0)
        window = u[first : rows.stop].float()
        missing = K - 1 - (rows.start - first)
        if missing:  # nothing is before the batch
            window = F.pad(window, (0, 0, missing, 0))
        block = _sum_taps(window, taps, out=y[rows])
        _finish(block, biases, activation)
    _convolve_heads(
        y, u, taps, biases, activation, state, state_indices, has_initial_state, cu_seqlens
    )
    return y.to(u.dtype)


def _convolve_heads(
    y: torch.Tensor,
    u: torch.Tensor,
    taps: torch.Tensor,
    bias: torch.Tensor | None,
    activation: Activation,
    state: torch.Tensor,
    state_indices: torch.Tensor,
    has_initial_state: torch.Tensor,
    cu_seqlens: torch.Tensor,
) -> None:
    """The first K - 1 tokens of each sequence, whose windows reach into the cached tails.

    Writes their rows of ``y`` and the new tails. ``taps`` is [K, C], float32; the rest is that of
    ``prefill``.
    """
    K = len(taps)
    if K == 1:
        return
    begins, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    has_tokens = ends > begins
    begins, ends, slots = begins[has_tokens], ends[has_tokens], state_indices[has_tokens]
    is_fresh = ~has_initial_state[has_tokens]
    # A slot without a valid state may hold anything, NaN too: mask, do not multiply.
    tails = state[slots].float().masked_fill_(is_fresh[:, None, None], 0.0)
    offsets = torch.arange(K - 1, device=u.device)
    tokens = begins[:, None] + offsets  # [S, K - 1]
    is_real = tokens < ends[:, None]
    # A short sequence's window ends in repetitions of its last token, which no result reads.
    heads = u[tokens.minimum(ends[:, None] - 1)].float()
    window = torch.cat([tails, heads], dim=1)  # [S, 2 (K - 1), C]
    convolved = _sum_taps(window, taps)
    _finish(convolved, bias, activation)
    y[tokens[is_real]] = convolved[is_real]
    # The last K - 1 inputs, counted from the end of tails and tokens together.
    wanted = ends[:, None] - (K - 1) + offsets  # [S, K - 1], before the first token in a tail
    from_tail = wanted < begins[:, None]
    new_tails = u[wanted.maximum(begins[:, None])].to(state.dtype)
    in_tail = (wanted - begins[:, None] + K - 1).clamp_(max=K - 2)
    old = tails.gather(1, in_tail[..., None].expand_as(tails)).to(state.dtype)
    state[slots] = torch.where(from_tail[..., None], old, new_tails)


def _sum_taps(
    window: torch.Tensor, taps: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Convolves ``window`` [..., n + K - 1, C] with ``taps`` [K, C]; returns [..., n, C]."""
    last = len(taps) - 1
    n = window.shape[-2] - last
    total = torch.mul(window.narrow(-2, last, n), taps[last], out=out)
    for k in range(last):
        total.addcmul_(window.narrow(-2, k, n), taps[k])
    return total


def _finish(y: torch.Tensor, bias: torch.Tensor | None, activation: Activation) -> None:
    """Bias and activation, in place."""
    if bias is not None:
        y += bias
    if activation == "silu":
        F.silu(y, inplace=True)


def decode(
    state: torch.Tensor,
    state_indices: torch.Tensor,
    u: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: Activation,
) -> torch.Tensor:
    """See ``reference.decode``."""
    kernel = compiled.find_for("causal_conv", state)
    if kernel is not None and state.dtype == u.dtype == weight.dtype:
        return decode_compiled(kernel, state, state_indices, u, weight, bias, activation)
    tails = state.index_select(0, state_indices).float()
    window = torch.cat([tails, u.float()[:, None]], dim=1)  # [S, K, C]
    state[state_indices] = window[:, 1:].to(state.dtype)
    # Taps outermost, so that every product walks contiguous channels.
    y = window.mul_(weight.float().T.contiguous()).sum(1)
    _finish(y, None if bias is None else bias.float(), activation)
    return y.to(u.dtype)


def decode_compiled(
    kernel: compiled.Kernel,
    state: torch.Tensor,
    state_indices: torch.Tensor,
    u: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: Activation,
) -> torch.Tensor:
    """``reference.decode`` by the kernel; all of one dtype, the state with any strides."""
    C, K = weight.shape
    S = len(u)
    assert u.shape == (S, C), (u.shape, weight.shape)
    assert state.shape[1:] == (K - 1, C), (state.shape, weight.shape)
    u = u if compiled.has_packed_rows(u) else u.contiguous()
    weight = weight.contiguous()
    if bias is not None:
        assert bias.shape == (C,), bias.shape
        bias = bias.to(u.dtype).contiguous()
    slots = state_indices.to(torch.int32)
    assert len(slots) == S, (slots.shape, u.shape)
    y = torch.empty(S, C, dtype=u.dtype, device=u.device)
    blocks = -(-C // _CHANNELS)
    kernel(
        S * blocks, S * C * K, C, K, blocks,
        state.data_ptr(), *state.stride(), compiled.DTYPES[state.dtype],
        *compiled.address_and_stride(slots), u.data_ptr(), u.stride(0),
        weight.data_ptr(), compiled.address(bias), activation == "silu",
        y.data_ptr(),
    )  # fmt: skip
    return y
