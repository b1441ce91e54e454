"""Who computes the recurrences: our chunked reference, or a GPU package, chosen by name.

``reference`` runs everywhere. ``fla`` (flash-linear-attention, Triton) serves Llamba and Mamba-2:
its ``chunk_simple_gla`` takes log decays directly, so nothing is divided by a vanishing step size,
and packed documents as ``cu_seqlens``; its default scale is 1 / sqrt(N), so 1.0 is passed.
``mamba_ssm`` serves Mamba-1, whose ``selective_scan_fn`` knows no document borders: documents are
laid out as rows of their own. There is no silent fallback from one to another.
"""

import importlib
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch

from thinkfast_distill.students.borders import Boundaries
from thinkfast_distill.students.recurrence import discrete_ssd, selective_scan

Backend = Literal["reference", "fla", "mamba_ssm"]

_INSTALL = {
    "fla": "pip install 'thinkfast-distill[fla]'",
    "mamba_ssm": "pip install --no-build-isolation 'thinkfast-distill[mamba-ssm]'",
}

Ssd = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Boundaries], torch.Tensor]
"""(x, log_decay, B, C, boundaries) -> y; see ``recurrence.discrete_ssd``."""

SelectiveScan = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Boundaries],
    torch.Tensor,
]
"""(x, dt, A, B, C, boundaries) -> y; see ``recurrence.selective_scan``."""


def ssd_backend(backend: Backend) -> Ssd:
    """The scan with one decay per head.

    Raises:
        ValueError: unknown, or the package has no such scan.
        ImportError: the package is not installed; the message has the install line.
    """
    _check(backend, "a scan with one decay per head (Llamba, Mamba-2)", ("reference", "fla"))
    if backend == "reference":
        return lambda x, log_decay, B, C, b: discrete_ssd(x, log_decay, B, C, b.segments)
    chunk_simple_gla = _imported("fla", "fla.ops.simple_gla", "chunk_simple_gla")

    def ssd(
        x: torch.Tensor,
        log_decay: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        boundaries: Boundaries,
    ) -> torch.Tensor:
        y, _ = chunk_simple_gla(
            q=_one_row(C),
            k=_one_row(B.to(C.dtype)),
            v=_one_row(x.to(C.dtype)),
            g=_one_row(log_decay.float()),
            scale=1.0,
            cu_seqlens=_cu_seqlens(boundaries),
        )
        result: torch.Tensor = y.view(x.shape).float()
        return result

    return ssd


def selective_scan_backend(backend: Backend) -> SelectiveScan:
    """The scan with a decay per channel and state.

    Raises:
        ValueError: unknown, or the package has no such scan.
        ImportError: the package is not installed; the message has the install line.
    """
    _check(backend, "the selective scan of Mamba-1", ("reference", "mamba_ssm"))
    if backend == "reference":
        return lambda x, dt, A, B, C, b: selective_scan(x, dt, A, B, C, b.starts)
    name = "mamba_ssm.ops.selective_scan_interface"
    selective_scan_fn = _imported("mamba_ssm", name, "selective_scan_fn")

    def scan(
        x: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        boundaries: Boundaries,
    ) -> torch.Tensor:
        layout = _DocumentRows(boundaries)
        B = B.repeat_interleave(C.shape[2] // B.shape[2], dim=2)
        x, dt, B, C = (layout.spread(t.float()) for t in (x, dt, B, C))
        # The package's layout: channels before tokens, [B, E, L] and [B, H, N, L].
        y = selective_scan_fn(
            x.transpose(1, 2).contiguous(),
            dt.transpose(1, 2).contiguous(),
            A.float(),
            B.permute(0, 2, 3, 1).contiguous(),
            C.permute(0, 2, 3, 1).contiguous(),
        )
        return layout.gather(y.transpose(1, 2))

    return scan


class _DocumentRows:
    """Documents of packed rows as rows of their own, padded to the longest."""

    def __init__(self, boundaries: Boundaries) -> None:
        self.shape = boundaries.starts.shape
        self.row = boundaries.starts.flatten().long().cumsum(0) - 1
        self.column = boundaries.tokens_before.flatten()
        self.size = (int(self.row[-1]) + 1, int(self.column.max()) + 1)

    def spread(self, t: torch.Tensor) -> torch.Tensor:
        """[B, L, ...] -> [documents, longest, ...]."""
        rows = t.new_zeros(*self.size, *t.shape[2:])
        return rows.index_put((self.row, self.column), t.flatten(0, 1))

    def gather(self, t: torch.Tensor) -> torch.Tensor:
        """The inverse of ``spread``."""
        gathered: torch.Tensor = t[self.row, self.column].unflatten(0, self.shape)
        return gathered


def _one_row(t: torch.Tensor) -> torch.Tensor:
    return t.flatten(0, 1)[None].contiguous()


def _cu_seqlens(boundaries: Boundaries) -> torch.Tensor:
    """Offsets of all documents of all rows, [documents + 1]; a row always begins one."""
    starts = boundaries.starts.flatten()
    end = starts.new_ones(1)
    return torch.cat([starts, end]).nonzero()[:, 0]


def _check(backend: str, what: str, accepted: tuple[str, ...]) -> None:
    if backend in accepted:
        return
    if backend in get_args(Backend):
        raise ValueError(
            f"backend={backend!r} does not have {what}; accepted: {', '.join(accepted)}."
        )
    raise ValueError(f"backend={backend!r}; accepted: {', '.join(get_args(Backend))}.")


def _imported(backend: str, module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise ImportError(
            f"backend={backend!r} is not installed ({error}); install it with: {_INSTALL[backend]}"
        ) from error
