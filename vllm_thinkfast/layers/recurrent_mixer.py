"""What all mixers share: state binding, the split into decode and prefill, and the custom op.

A mixer's projections are ordinary vLLM linear layers outside the op, so that LoRA, quantisation and
compilation see them. Convolution and recurrence are one opaque op: they read and write vLLM's state
cache, and their control flow depends on the batch.

vLLM puts the decoding sequences (one token each) first in a batch, then the prefills, packed.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from vllm_thinkfast import compat, state_cache
from vllm_thinkfast.layers.sharded import ShortConv
from vllm_thinkfast.ops.backend import choose_backend, load_operator

OP_NAME = "thinkfast_mixer"

Conv = Callable[[torch.Tensor], torch.Tensor]
Scan = Callable[..., torch.Tensor]


class RecurrentMixer(MambaBase, nn.Module):
    """Base of the mixers. A subclass supplies ``scan_operator`` and ``mix``."""

    scan_operator: str
    """Which operator of ``vllm_thinkfast.ops`` the recurrence is."""
    conv1d: ShortConv
    mixer_activation: str

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        """Registers the layer under ``prefix`` so that the op finds it.

        Raises:
            ValueError: a setting that recurrent state does not support here.
        """
        super().__init__()
        if vllm_config.num_speculative_tokens:
            raise ValueError(
                "speculative decoding is not supported with these models yet: a rejected draft "
                "token cannot be taken back from the state; remove --speculative-config."
            )
        if getattr(vllm_config.cache_config, "use_replayssm", False):
            raise ValueError(
                "--use-replayssm is for vLLM's own Mamba-2 layers; remove it for this model."
            )
        self.config = vllm_config.model_config.hf_config
        self.state_dtypes = state_cache.state_dtypes(vllm_config)
        self.tp_size = get_tensor_model_parallel_world_size()
        self.state_shapes = state_cache.state_shapes(self.config, self.tp_size)
        backend = choose_backend(vllm_config.device_config.device.type)
        self.conv_op = load_operator("causal_conv", backend)
        self.scan_op = load_operator(self.scan_operator, backend)
        self.prefix = prefix
        # vLLM replaces this by views into its cache pages, see MambaBase.bind_kv_cache.
        self.kv_cache = (torch.tensor([]), torch.tensor([]))
        compilation_config = vllm_config.compilation_config
        if prefix in compilation_config.static_forward_context:
            raise ValueError(f"duplicate layer name: {prefix}")
        compilation_config.static_forward_context[prefix] = self
        compat.add_splitting_op(compilation_config, f"vllm::{OP_NAME}")

    def get_state_shape(self) -> state_cache.StateShapes:
        """Shapes of (conv, ssm) of one sequence; vLLM's hook."""
        return self.state_shapes

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        """Dtypes of (conv, ssm); vLLM's hook."""
        return self.state_dtypes

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        """Which batch metadata vLLM prepares: the form common to all state models."""
        return MambaAttentionBackendEnum.MAMBA1

    def mix(
        self, projected: torch.Tensor, dt: torch.Tensor, conv: Conv, scan: Scan
    ) -> torch.Tensor:
        """The mathematics between the projections, for prefill and decode alike.

        Args:
            projected: [T, rows of in_proj].
            dt: [T, ...], what the step sizes or decays are computed from.
            conv: maps raw inputs [T, C] to convolved ones.
            scan: the operator's function without its state and sequence arguments.

        Returns:
            [T, mixer width], before the gate.
        """
        raise NotImplementedError

    def run(self, projected: torch.Tensor, dt: torch.Tensor, output: torch.Tensor) -> None:
        """Body of the custom op: fills ``output`` [T, mixer width] and updates the state."""
        metadata = get_forward_context().attn_metadata
        if metadata is None:  # vLLM's memory profiling run: no cache exists yet
            return
        metadata = metadata[self.prefix]
        num_decode = metadata.num_decode_tokens
        num_tokens = num_decode + metadata.num_prefill_tokens
        if num_decode:
            conv, scan = self._decode_functions(metadata)
            output[:num_decode] = self.mix(projected[:num_decode], dt[:num_decode], conv, scan)
        if metadata.num_prefill_tokens:
            conv, scan = self._prefill_functions(metadata)
            tokens = slice(num_decode, num_tokens)
            output[tokens] = self.mix(projected[tokens], dt[tokens], conv, scan)

    def _states(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Views (conv [slots, K - 1, C], ssm [slots, ...]) into vLLM's pages."""
        conv, ssm = self.kv_cache
        return conv.transpose(1, 2) if is_conv_state_dim_first() else conv, ssm

    def _decode_functions(self, metadata: Any) -> tuple[Conv, Scan]:
        conv_state, ssm_state = self._states()
        slots = compat.decode_state_indices(metadata)[: metadata.num_decode_tokens]

        def conv(u: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.conv_op.decode(
                conv_state, slots, u, self.conv1d.taps, self.conv1d.bias, self.mixer_activation
            )
            return y

        def scan(*inputs: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.scan_op.decode(ssm_state, slots, *inputs)
            return y

        return conv, scan

    def _prefill_functions(self, metadata: Any) -> tuple[Conv, Scan]:
        conv_state, ssm_state = self._states()
        slots = metadata.state_indices_tensor_p
        has_state = metadata.has_initial_states_p
        cu_seqlens = metadata.query_start_loc_p

        def conv(u: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.conv_op.prefill(
                u,
                self.conv1d.taps,
                self.conv1d.bias,
                self.mixer_activation,
                conv_state,
                slots,
                has_state,
                cu_seqlens,
            )
            return y

        def scan(*inputs: torch.Tensor) -> torch.Tensor:
            initial = ssm_state[slots].float()
            # A fresh slot may hold anything, NaN too: mask, do not multiply.
            initial.masked_fill_(~has_state.view(-1, *[1] * (initial.dim() - 1)), 0.0)
            y, final = self.scan_op.prefill(*inputs, initial, cu_seqlens)
            ssm_state[slots] = final.to(ssm_state.dtype)
            out: torch.Tensor = y
            return out

        return conv, scan

    def mixer_op(self, projected: torch.Tensor, dt: torch.Tensor, width: int) -> torch.Tensor:
        """Calls the custom op; returns [T, width] with zeros in padding rows."""
        output = projected.new_zeros(projected.shape[0], width)
        getattr(torch.ops.vllm, OP_NAME)(projected, dt, output, self.prefix)
        return output


def _thinkfast_mixer(
    projected: torch.Tensor, dt: torch.Tensor, output: torch.Tensor, layer_name: str
) -> None:
    layer = get_forward_context().no_compile_layers[layer_name]
    layer.run(projected, dt, output)


def _thinkfast_mixer_fake(
    projected: torch.Tensor, dt: torch.Tensor, output: torch.Tensor, layer_name: str
) -> None:
    """Shape inference: the op only writes into ``output``."""


direct_register_custom_op(
    op_name=OP_NAME,
    op_func=_thinkfast_mixer,
    mutates_args=["output"],
    fake_impl=_thinkfast_mixer_fake,
)
