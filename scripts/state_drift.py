"""How far a state that is rounded after every token drifts from one that is not.

The recurrence of ``ops/discrete_ssd/reference.py`` is run token by token with its state kept in
float64, and once more for every way to store it: computed in float32, rounded, and read back for
the next token, as a decode step does. Outputs are computed before the rounding, as there.

Shapes: T tokens, L layers, H heads, P head_dim, N ssm_state_size.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vllm_thinkfast.ops.state_codec import reference as codec

CHECKPOINTS = (64, 256, 1024, 4096, 16384)
TIME_CONSTANTS = (64, 256, 1024, 4096, 16384)
"""Tokens after which a state of the slow case has decayed to 1/e."""


@dataclass(frozen=True)
class Inputs:
    """What the recurrence of L layers gets."""

    x: torch.Tensor
    """[T, L, H, P], float32."""
    log_decay: torch.Tensor
    """[T, L, H], float32, <= 0."""
    B: torch.Tensor
    """[T, L, H, N], float32."""
    C: torch.Tensor
    """[T, L, H, N], float32."""


def to_nearest(state: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """[S, ..., N] in 8 bits with the scales of the codec, but rounded to nearest."""
    _, scales = codec.quantise(state, torch.full((len(state),), num_tokens))
    steps = torch.where(scales > 0, 1 / scales, 0.0)[..., None]
    return codec.dequantise((state * steps).round().clamp(-127, 127).to(torch.int8), scales)


def to_random(state: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """[S, ..., N] in 8 bits, as in the cache."""
    return codec.dequantise(*codec.quantise(state, torch.full((len(state),), num_tokens)))


STORES: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "float32": lambda state, _: state,
    "bfloat16": lambda state, _: state.bfloat16().float(),
    "float16": lambda state, _: state.half().float(),
    "int8, to nearest": to_nearest,
    "int8": to_random,
}
"""How states [L, H, P, N] (float32) of so many tokens are stored -> what is read back."""


def slow_inputs(num_tokens: int, seed: int = 0, size: int = 32) -> Inputs:
    """Random inputs, one head for each of TIME_CONSTANTS."""
    generator = torch.Generator().manual_seed(seed)
    heads = len(TIME_CONSTANTS)

    def normal() -> torch.Tensor:
        return torch.randn(num_tokens, 1, heads, size, generator=generator)

    decays = -1 / torch.tensor(TIME_CONSTANTS, dtype=torch.float32)
    return Inputs(normal(), decays.expand(num_tokens, 1, heads), normal(), normal())


def time_constants(inputs: Inputs) -> torch.Tensor:
    """[L, H] tokens after which a state has decayed to 1/e, on average over the tokens."""
    return -1 / inputs.log_decay.double().mean(0)


def drift(inputs: Inputs, checkpoints: Sequence[int] = CHECKPOINTS) -> list[dict[str, Any]]:
    """Relative errors of every way to store the state.

    Args:
        inputs: at least as many tokens as the last checkpoint.
        checkpoints: numbers of tokens, rising.

    Returns:
        One entry for each way and checkpoint: ``store``, ``tokens``, ``state`` ([L][H], norm of the
        error over norm of the state, of what is stored then) and ``output`` ([L][H], the same of
        the outputs since the checkpoint before).
    """
    _, L, H, P = inputs.x.shape
    N = inputs.B.shape[-1]
    exact = torch.zeros(L, H, P, N, dtype=torch.float64)
    stored = torch.zeros(len(STORES), L, H, P, N)
    found: list[dict[str, Any]] = []
    for start, end in itertools.pairwise((0, *checkpoints)):
        squares = torch.zeros(len(STORES), L, H, dtype=torch.float64)
        norm = torch.zeros(L, H, dtype=torch.float64)
        for t in range(start, end):
            x, B, C = inputs.x[t, ..., None], inputs.B[t, ..., None, :], inputs.C[t, ..., None, :]
            decay = inputs.log_decay[t, ..., None, None]
            exact.mul_(decay.double().exp()).add_(x.double() * B.double())
            stored.mul_(decay.exp()).add_(x * B)
            y = (exact * C).sum(-1)
            errors = (stored * C).sum(-1).double() - y
            squares += errors.square().sum(-1)
            norm += y.square().sum(-1)
            for i, store in enumerate(STORES.values()):
                stored[i] = store(stored[i], t + 1)
        state_norm = exact.flatten(2).norm(dim=-1)
        state = (stored - exact).flatten(3).norm(dim=-1) / state_norm
        output = (squares / norm).sqrt()
        found += [
            {
                "store": name,
                "tokens": end,
                "state": state[i].tolist(),
                "output": output[i].tolist(),
            }
            for i, name in enumerate(STORES)
        ]
    return found
