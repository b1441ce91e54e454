"""What all mixers share: state binding, the split into decode and prefill, and the custom op.

A mixer's projections are ordinary vLLM linear layers outside the op, so that LoRA, quantisation and
compilation see them. Convolution and recurrence are one opaque op: they read and write vLLM's state
cache, and their control flow depends on the batch.

vLLM puts the decoding sequences (one token each) first in a batch, then the prefills, packed.
"""

import functools
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

from vllm_thinkfast import compat, cuda_patches, envs, state_cache
from vllm_thinkfast.layers.sharded import ShortConv
from vllm_thinkfast.ops import compiled, fused_decode
from vllm_thinkfast.ops.backend import choose_backend, load_operator
from vllm_thinkfast.ops.causal_conv.reference import Activation
from vllm_thinkfast.ops.state_codec import reference as state_codec

OP_NAME = "thinkfast_mixer"

Conv = Callable[[torch.Tensor], torch.Tensor]
Scan = Callable[..., torch.Tensor]


class RecurrentMixer(MambaBase, nn.Module):
    """Base of the mixers. A subclass supplies ``scan_operator`` and ``mix``."""

    scan_operator: str
    """Which operator of ``vllm_thinkfast.ops`` the recurrence is."""
    conv1d: ShortConv
    mixer_activation: Activation

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        """Registers the layer under ``prefix`` so that the op finds it.

        Raises:
            ValueError: a setting that recurrent state does not support here.
        """
        super().__init__()
        if getattr(vllm_config.cache_config, "use_replayssm", False):
            raise ValueError(
                "--use-replayssm is for vLLM's own Mamba-2 layers; remove it for this model."
            )
        mamba_config = getattr(vllm_config, "mamba_config", None)
        if getattr(mamba_config, "enable_stochastic_rounding", False):
            raise ValueError(
                "--enable-mamba-cache-stochastic-rounding is for vLLM's own Mamba-2 kernels; "
                "remove it for this model."
            )
        self.config = vllm_config.model_config.hf_config
        self.state_dtypes = state_cache.state_dtypes(vllm_config)
        self.tp_size = get_tensor_model_parallel_world_size()
        self.state_shapes = state_cache.state_shapes(
            self.config, self.tp_size, self.state_dtypes[1]
        )
        self.has_scales = len(self.state_shapes) > 2
        if self.has_scales:
            state_cache.check_alignment(self.state_shapes, self.state_dtypes)
        self.backend = choose_backend(vllm_config.device_config.device.type)
        self.conv_op = load_operator("causal_conv", self.backend)
        self.scan_op = load_operator(self.scan_operator, self.backend)
        if self.backend == "cpu":
            for operator in ("causal_conv", self.scan_operator):
                compiled.find(operator)  # compiles now rather than in the first step
        self.prefix = prefix
        # vLLM replaces this by views into its cache pages, see MambaBase.bind_kv_cache.
        self.kv_cache = tuple(torch.tensor([]) for _ in self.state_shapes)
        self.is_speculating = vllm_config.num_speculative_tokens > 0
        # For speculative decoding, by a sequence's first slot: the tokens in the state there, and
        # all slots of the sequence, see _run_drafts.
        self.num_tokens_in = torch.empty(0, dtype=torch.int32)
        self.slots_of = torch.empty(0, 1 + vllm_config.num_speculative_tokens, dtype=torch.long)
        compilation_config = vllm_config.compilation_config
        if self.backend == "reference" and cuda_patches.has_graphs(vllm_config):
            raise ValueError(
                f"{envs.OPS_BACKEND}=reference reads lengths on the host, which CUDA graphs "
                "cannot; add --enforce-eager."
            )
        if prefix in compilation_config.static_forward_context:
            raise ValueError(f"duplicate layer name: {prefix}")
        compilation_config.static_forward_context[prefix] = self
        compat.add_splitting_op(compilation_config, f"vllm::{OP_NAME}")

    def get_state_shape(self) -> state_cache.StateShapes:
        """Shapes of (conv, ssm) or (conv, ssm, scales) of one sequence; vLLM's hook."""
        return self.state_shapes

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        """Dtypes of the same; vLLM's hook."""
        return self.state_dtypes

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        """Which batch metadata vLLM prepares: the form common to all state models.

        The two names give the same form. vLLM 0.32 tells the tokens of a draft from a prompt only
        for a few of the names, MAMBA1 not among them.
        """
        backends = MambaAttentionBackendEnum
        return backends.SHORT_CONV if self.is_speculating else backends.MAMBA1

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

    def fusable(self) -> tuple[torch.Tensor | None, ...] | None:
        """What ``fused_decode`` reads besides its arguments and states; None: there is none."""
        return None

    def fused_decode(
        self,
        projected: torch.Tensor,
        dt: torch.Tensor,
        slots: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """``mix`` for one token per sequence in CPU kernels alone, for float32.

        Args:
            projected: [S, rows of in_proj], contiguous rows.
            dt: [S, ...], as ``mix`` gets it, contiguous rows.
            slots: [S], integer.
            output: [S, mixer width], written.
        """
        raise NotImplementedError

    @functools.cached_property
    def _fuses_decode(self) -> bool:
        """Decided at the first decode step, when there are weights and a cache."""
        tensors = self.fusable()
        if self.backend != "cpu" or self.has_scales or tensors is None:
            return False
        conv_state, ssm_state, _ = self._states()
        return fused_decode.can_run(conv_state, ssm_state, *tensors)

    def run(self, projected: torch.Tensor, dt: torch.Tensor, output: torch.Tensor) -> None:
        """Body of the custom op: fills ``output`` [T, mixer width] and updates the state."""
        by_layer = get_forward_context().attn_metadata
        # vLLM's memory profiling, without a cache yet, gives no metadata at all; its tuning of
        # FlashInfer's kernels gives them to attention layers alone.
        metadata = None if by_layer is None else by_layer.get(self.prefix)
        if metadata is None:
            return
        num_decode = metadata.num_decode_tokens
        num_tokens = num_decode + metadata.num_prefill_tokens
        if self.is_speculating:
            self._resize_num_tokens_in()
        if num_decode and self.is_speculating:
            self._run_drafts(metadata, projected, dt, output)
        elif num_decode:
            slots = compat.decode_state_indices(metadata)[:num_decode]
            rows = projected[:num_decode], dt[:num_decode]
            # Inside a compiled graph rows may have other strides; fused_decode asserts them.
            if self._fuses_decode and all(t.stride(1) == 1 for t in rows):
                self.fused_decode(*rows, slots, output[:num_decode])
            else:
                lengths = metadata.seq_lens[:num_decode] if self.has_scales else None
                output[:num_decode] = self.mix(*rows, *self._decode_functions(slots, lengths))
        if metadata.num_prefill_tokens:
            if self.is_speculating:
                self._move_to_first_slot(metadata)
            conv, scan = self._prefill_functions(metadata)
            tokens = slice(num_decode, num_tokens)
            output[tokens] = self.mix(projected[tokens], dt[tokens], conv, scan)
            if self.is_speculating:
                slots = metadata.state_indices_tensor_p.long()
                self.num_tokens_in[slots] = _prefill_lengths(metadata)

    def _resize_num_tokens_in(self) -> None:
        ssm_state = self.kv_cache[1]
        if len(self.num_tokens_in) != len(ssm_state):
            self.num_tokens_in = torch.zeros(
                len(ssm_state), dtype=torch.int32, device=ssm_state.device
            )
            own = torch.arange(len(ssm_state), device=ssm_state.device)
            self.slots_of = own[:, None].repeat(1, self.slots_of.shape[1])

    def _run_drafts(
        self, metadata: Any, projected: torch.Tensor, dt: torch.Tensor, output: torch.Tensor
    ) -> None:
        """Decoding sequences with one accepted and up to k drafted tokens each.

        A rejected token cannot be taken back from a state, so every token's state is kept: a
        sequence has 1 + k slots, and its token j leaves its state in slot j. The next step starts
        from the state of the last token that was accepted. vLLM reports the number of those for
        hybrids only, so it is found from the positions: the state in slot 0 has seen
        ``num_tokens_in`` tokens, and the sequence now goes on after ``num_done`` tokens.

        Shapes do not depend on what was accepted: a sequence without a token j computes its last
        one again, into vLLM's unused slot 0, and the result is dropped.
        """
        num_seqs = metadata.num_decodes
        slots = metadata.state_indices_tensor_d[:num_seqs].long()
        offsets = metadata.query_start_loc_d[: num_seqs + 1]
        starts, lengths = offsets[:-1], offsets.diff()
        num_done = metadata.seq_lens[:num_seqs] - lengths
        first = slots[:, 0]
        source = self._current_slots(slots, first, num_done)
        self.num_tokens_in[first] = num_done + 1
        self.slots_of[first] = slots
        for j in range(min(slots.shape[1], metadata.num_decode_tokens - num_seqs + 1)):
            is_token = j < lengths
            rows = starts + (lengths - 1).clamp(min=0, max=j)
            target = torch.where(is_token, slots[:, j], 0)
            for state in self.kv_cache:
                state[target] = state[source]
            lengths_now = num_done + 1 + j if self.has_scales else None
            conv, scan = self._decode_functions(target, lengths_now)
            y = self.mix(projected[rows], dt[rows], conv, scan)
            output[rows] = torch.where(is_token[:, None], y, output[rows])
            source = target

    def _current_slots(
        self, slots: torch.Tensor, first: torch.Tensor, num_done: torch.Tensor
    ) -> torch.Tensor:
        """Which of a sequence's slots [S, 1 + k] holds its state after ``num_done`` [S] tokens."""
        num_kept = (num_done - self.num_tokens_in[first]).clamp(0, slots.shape[1] - 1)
        return slots.gather(1, num_kept.long()[:, None])[:, 0]

    def _move_to_first_slot(self, metadata: Any) -> None:
        """Puts the current states of prefilled sequences where prefill looks for them.

        A chunk as short as a draft goes through ``_run_drafts``, also where it is part of a prompt
        or of what a preempted sequence computes again, and leaves its state in a later slot.
        Besides, vLLM may hand over a plain decoding sequence behind a prefill as one.
        """
        first = metadata.state_indices_tensor_p.long()
        lengths = metadata.query_start_loc_p.diff()
        num_done = _prefill_lengths(metadata) - lengths
        current = self._current_slots(self.slots_of[first], first, num_done)
        source = torch.where(metadata.has_initial_states_p, current, first)
        for state in self.kv_cache:
            state[first] = state[source]

    def _states(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Views into vLLM's pages: conv [slots, K - 1, C], ssm [slots, ...], and int8's scales."""
        conv, ssm, *scales = self.kv_cache
        conv = conv.transpose(1, 2) if is_conv_state_dim_first() else conv
        return conv, ssm, scales[0] if scales else None

    def _decode_functions(
        self, slots: torch.Tensor, num_tokens: torch.Tensor | None
    ) -> tuple[Conv, Scan]:
        """For slots [S]; int8 needs num_tokens [S], which their states have seen afterwards."""
        conv_state, ssm_state, scales = self._states()

        def conv(u: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.conv_op.decode(
                conv_state, slots, u, self.conv1d.taps, self.conv1d.bias, self.mixer_activation
            )
            return y

        def scan(*inputs: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.scan_op.decode(
                ssm_state, slots, *inputs, scales=scales, num_tokens=num_tokens
            )
            return y

        return conv, scan

    def _prefill_functions(self, metadata: Any) -> tuple[Conv, Scan]:
        conv_state, ssm_state, scales = self._states()
        slots = metadata.state_indices_tensor_p
        has_state = metadata.has_initial_states_p
        cu_seqlens = metadata.query_start_loc_p
        num_tokens = _prefill_lengths(metadata) if self.has_scales else None

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
            initial = state_codec.read(ssm_state, scales, slots)
            # A fresh slot may hold anything, NaN too: mask, do not multiply.
            initial.masked_fill_(~has_state.view(-1, *[1] * (initial.dim() - 1)), 0.0)
            y, final = self.scan_op.prefill(*inputs, initial, cu_seqlens)
            state_codec.write(ssm_state, scales, slots, final, num_tokens)
            out: torch.Tensor = y
            return out

        return conv, scan

    def mixer_op(self, projected: torch.Tensor, dt: torch.Tensor, width: int) -> torch.Tensor:
        """Calls the custom op; returns [T, width] with zeros in padding rows."""
        output = projected.new_zeros(projected.shape[0], width)
        getattr(torch.ops.vllm, OP_NAME)(projected, dt, output, self.prefix)
        return output


def _prefill_lengths(metadata: Any) -> torch.Tensor:
    """Tokens of each prefilled sequence up to the end of this step; integer, [prefills]."""
    lengths: torch.Tensor = metadata.seq_lens[metadata.num_decodes :][: metadata.num_prefills]
    return lengths


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
    op_func=cuda_patches.outside_of_graphs(_thinkfast_mixer),
    mutates_args=["output"],
    fake_impl=_thinkfast_mixer_fake,
)
