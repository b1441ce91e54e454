"""RMSNorm with vLLM's own CPU kernel, which vLLM itself does not use.

vLLM 0.32 registers its compiled ``rms_norm`` and ``fused_add_rms_norm`` (csrc/cpu/layernorm.cpp)
for GPUs only (vllm/kernels/vllm_c.py), and computes the norm on CPU in about ten calls of torch.
Those took 26 us for one row and 53 us for 64 rows of 512 float32 elements with a residual, on one
thread; the kernel takes 2.3 and 7.9 us.
"""

import functools

import torch
from vllm.model_executor.layers.layernorm import RMSNorm as VllmRMSNorm

_WIDEST_VECTOR = 16
"""float32 elements; the kernel takes multiples of its vector only."""


class RMSNorm(VllmRMSNorm):
    """vLLM's layer. Where vLLM compiles the model, custom_ops leaves the norm to the compiler."""

    def forward_cpu(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """[T, D] -> norm, or (norm of the sum, sum), which overwrite x and residual, as on GPU."""
        if not self._suits_kernel(x):
            plain: torch.Tensor | tuple[torch.Tensor, torch.Tensor]
            plain = self.forward_native(x, residual)
            return plain
        weight, eps = self.weight.data, self.variance_epsilon
        if residual is None:
            normed = torch.empty_like(x)
            torch.ops._C.rms_norm(normed, x, weight, eps)
            return normed
        torch.ops._C.fused_add_rms_norm(x, residual, weight, eps)
        return x, residual

    def _suits_kernel(self, x: torch.Tensor) -> bool:
        return (
            x.dtype == self.weight.dtype
            and x.is_contiguous()
            and x.shape[-1] % _WIDEST_VECTOR == 0
            and _has_kernel()
        )


@functools.cache
def _has_kernel() -> bool:
    return hasattr(torch.ops._C, "rms_norm") and hasattr(torch.ops._C, "fused_add_rms_norm")
