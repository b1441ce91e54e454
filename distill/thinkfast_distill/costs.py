"""What a run costs before it runs: parameters, FLOPs per token, memory, device-hours.

FLOPs follow the usual count of 2 per multiply-add and parameter: a training token costs 6 N of the
student (+2 N when blocks are recomputed; 4 N of what is frozen between trained parts), a teacher
token 2 N. N leaves out the embedding table, which is only looked up, and counts the head. The
quadratic part of attention is listed apart.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from transformers import PretrainedConfig

from thinkfast_distill.architecture import ModelConfig, head_dim_of
from thinkfast_distill.config import LAYERWISE_STAGES, RunConfig, StageConfig
from thinkfast_distill.optimiser import group_of
from vllm_thinkfast.checkpoints.reader import house_shapes
from vllm_thinkfast.configs import LlambaConfig, MambaInLlamaConfig

PARTS = ("embedding", "head", "ssm", "attention", "mlp", "norm")

# Dense matrix throughput in bfloat16 from the makers' data sheets, without sparsity.
_PEAK_FLOPS_PER_S = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
}


@dataclass(frozen=True)
class ModelCost:
    """Sizes of one model."""

    parameters: dict[str, int]
    """Parameters per part; a tied head counts under ``embedding`` alone."""

    is_tied: bool
    """Head and embedding share weights."""

    head_parameters: int
    """Rows times width of the head."""

    attention_width: int
    """Query width summed over the layers that attend."""

    mixer_share: float
    """Part of the layers that have an SSM mixer."""

    @property
    def total(self) -> int:
        """Parameters in memory."""
        return sum(self.parameters.values())

    @property
    def body(self) -> int:
        """Parameters of the blocks and the final norm."""
        return sum(self.parameters[part] for part in ("ssm", "attention", "mlp", "norm"))

    @property
    def active(self) -> int:
        """Parameters a token is multiplied with: blocks and head."""
        return self.body + self.head_parameters


def model_cost(config: ModelConfig | PretrainedConfig) -> ModelCost:
    """Counts the parameters of a student or of a Llama-architecture teacher."""
    if isinstance(config, (LlambaConfig, MambaInLlamaConfig)):
        shapes: Mapping[str, tuple[int, ...]] = house_shapes(config)
    else:
        shapes = llama_shapes(config)
    tied = bool(config.tie_word_embeddings)
    parameters = dict.fromkeys(PARTS, 0)
    for name, shape in shapes.items():
        part = part_of(name)
        if not (tied and part == "head"):
            parameters[part] += prod(shape)
    num_layers = int(config.num_hidden_layers)
    if isinstance(config, LlambaConfig):
        attention_width, num_attention = 0, 0
    else:
        layers = getattr(config, "attention_layers", None)
        num_attention = num_layers if layers is None else len(layers)
        attention_width = num_attention * config.num_attention_heads * head_dim_of(config)
    head = int(config.vocab_size) * int(config.hidden_size)
    return ModelCost(parameters, tied, head, attention_width, 1 - num_attention / num_layers)


def part_of(name: str) -> str:
    """The part of the model a parameter belongs to, see ``PARTS``."""
    return "head" if name.startswith("lm_head.") else group_of(name)


def llama_shapes(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a Llama-architecture model (Llama, Qwen2)."""
    attention = MambaInLlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=head_dim_of(config),
        attention_bias=bool(getattr(config, "attention_bias", False)),
        mlp_bias=bool(getattr(config, "mlp_bias", False)),
        attention_layers=list(range(config.num_hidden_layers)),
    )
    shapes = dict(house_shapes(attention))
    if str(config.model_type) == "qwen2":
        for name in list(shapes):
            for part in ("q_proj", "k_proj", "v_proj"):
                if name.endswith(f".{part}.weight"):
                    shapes[name.replace(".weight", ".bias")] = shapes[name][:1]
    return shapes


@dataclass(frozen=True)
class StageCost:
    """FLOPs of one token of a stage."""

    student: float
    """Forward and backward of the student."""

    recompute: float
    """Second forward for activation checkpointing."""

    teacher: float
    """Forward of the teacher."""

    attention: float
    """The quadratic part of attention in both, for full rows and causal masks."""

    @property
    def per_token(self) -> float:
        """All together."""
        return self.student + self.recompute + self.teacher + self.attention


def stage_cost(
    config: RunConfig, stage: StageConfig, student: ModelCost, teacher: ModelCost | None
) -> StageCost:
    """FLOPs per token of a stage.

    Args:
        config: for activation checkpointing.
        stage: its kind decides which parts run.
        student: sizes of the student.
        teacher: sizes of the teacher; None without one.
    """
    recompute = 2.0 * student.body if config.compute.activation_checkpointing else 0.0
    # q k^T and the weighted sum: 2 FLOPs each per pair, half of the pairs under a causal mask.
    quadratic = 2.0 * stage.seq_len
    taught = 0 if teacher is None else teacher.attention_width
    if stage.kind in ("pretrain", "sft") or teacher is None:
        attention = 3 * quadratic * student.attention_width
        return StageCost(6.0 * student.active, recompute, 0.0, attention)
    if stage.kind == "end_to_end":
        attention = quadratic * (3 * student.attention_width + taught)
        return StageCost(6.0 * student.active, recompute, 2.0 * teacher.active, attention)
    # Layer by layer, and so without recomputation.
    teacher_flops = 2.0 * teacher.body
    if stage.kind == "hidden_state" and stage.train == "all":
        attention = quadratic * (3 * student.attention_width + taught)
        return StageCost(6.0 * student.body, 0.0, teacher_flops, attention)
    if stage.kind == "hidden_state":
        # Only layers with a mixer are compared; the gradient passes through their frozen rest.
        frozen = student.mixer_share * (student.parameters["mlp"] + student.parameters["norm"])
        flops = 6.0 * student.parameters["ssm"] + 4.0 * frozen
        return StageCost(flops, 0.0, teacher_flops, quadratic * taught)
    # matrix_mixing: mixers alone; the student's matrices cost about what the teacher's scores do.
    return StageCost(6.0 * student.parameters["ssm"], 0.0, teacher_flops, 4 * quadratic * taught)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device."""

    student: float
    """Float32 weights, gradients of the trainable ones, and two AdamW moments."""

    teacher: float
    """Frozen weights."""

    activations: float
    """Of one micro-batch, kept for the backward pass; a rough figure."""

    logits: float
    """The loss over the vocabulary: its chunk of tokens, the gradient of the head, and a float32
    copy of a bfloat16 teacher's head."""

    evaluation: float
    """Instead of activations and logits, while held-out rows are measured; a rough figure."""

    @property
    def total(self) -> float:
        """The most at any time; the allocator adds some."""
        passing = max(self.activations + self.logits, self.evaluation)
        return self.student + self.teacher + passing


def memory_estimate(
    config: RunConfig,
    stage: StageConfig,
    student_config: ModelConfig,
    student: ModelCost,
    teacher: ModelCost | None,
    trainable: int,
    num_ranks: int,
) -> MemoryEstimate:
    """Estimates the memory of a stage on one device.

    Args:
        config: precision, placement of the teacher, checkpointing.
        stage: rows and row length; ``evaluation`` of the config has those of held-out batches.
        student_config: widths.
        student: sizes of the student.
        teacher: sizes of the teacher, or None.
        trainable: trainable parameters of the stage.
        num_ranks: devices.
    """
    shards = max(num_ranks // config.compute.replicas, 1)
    weights = (4.0 * student.total + 12.0 * trainable) / shards
    frozen = 0.0
    if teacher is not None and config.teacher is not None:
        frozen = teacher.total * (2.0 if config.teacher.dtype == "bfloat16" else 4.0)
        if config.teacher.placement == "shard":
            frozen /= shards
    rows = _rows_at_once(stage, stage.batch_rows, num_ranks)
    tokens = rows * stage.seq_len
    size = 2.0 if config.compute.precision == "bfloat16" else 4.0
    hidden, mlp = student_config.hidden_size, student_config.intermediate_size
    # Per token and block: norms, projections, convolution and gate of the mixer; three MLP tensors.
    block_token = size * (14.0 * hidden + 3.0 * mlp)
    layers = int(student_config.num_hidden_layers)
    heads = 0
    if stage.kind == "matrix_mixing" and teacher is not None:
        heads = teacher.attention_width // layers // int(student_config.head_dim)
    if stage.kind in LAYERWISE_STAGES:
        activations = block_token * tokens + _matrices(rows, heads, stage.seq_len)
    elif config.compute.activation_checkpointing:
        activations = block_token * tokens + layers * tokens * hidden * 4.0
    else:
        activations = block_token * tokens * layers
    logits = 0.0
    if stage.kind not in LAYERWISE_STAGES:
        of_teacher = None if stage.kind in ("pretrain", "sft") else teacher
        logits = _vocabulary_bytes(config, stage, student_config, of_teacher, tokens)
        # The head's gradient, of which the backward pass makes a copy when the chunks are gone.
        head_grad = 4.0 * student.head_parameters
        logits = head_grad + max(logits, head_grad)
    held_out, evaluation = config.evaluation, 0.0
    if held_out.data is not None:
        # One block at a time, for there are no gradients; the stage's own objective, then logits.
        rows = _rows_at_once(stage, held_out.batch_rows, num_ranks)
        tokens = rows * held_out.seq_len
        evaluation = block_token * tokens + max(
            _matrices(rows, heads, held_out.seq_len),
            _vocabulary_bytes(config, stage, student_config, teacher, tokens),
        )
    return MemoryEstimate(weights, frozen, activations, logits, evaluation)


def _vocabulary_bytes(
    config: RunConfig,
    stage: StageConfig,
    student_config: ModelConfig,
    teacher: ModelCost | None,
    tokens: int,
) -> float:
    """Bytes of a loss over the vocabulary at its peak, without the gradient of the head.

    Counted in ``losses``: of a cross entropy, logits and their log-softmax are there at once. With
    a teacher, both of both models, both probabilities, their gap and one product. For jsd or with a
    temperature it is two more, and then the gradient of the cross entropy lies beside them.
    """
    tensors, copies = 2, 0.0
    if teacher is not None:
        loss = stage.loss
        is_plain = loss.kind != "jsd" and loss.temperature == 1
        tensors = 8 if is_plain else 10 + (loss.ce_weight > 0)
        if config.teacher is not None and config.teacher.dtype == "bfloat16":
            copies = 4.0 * teacher.head_parameters
    chunk = min(stage.loss.chunk_tokens, tokens)
    return 4.0 * tensors * student_config.vocab_size * chunk + copies


def _rows_at_once(stage: StageConfig, batch_rows: int, num_ranks: int) -> int:
    """Rows of a forward pass on one rank."""
    of_rank = -(-batch_rows // num_ranks)
    return min(stage.micro_batch_rows or of_rank, of_rank)


def _matrices(rows: int, heads: int, seq_len: int) -> float:
    """Bytes of stage 1's matrices: attention, the mixer's, their difference and what makes them."""
    return 6.0 * rows * heads * seq_len**2 * 4.0


def peak_flops_per_s(device: torch.device, precision: str) -> tuple[float, str]:
    """Peak of one device and where the figure comes from.

    Args:
        device: a GPU is looked up by name; anything unknown is measured by one second of matrix
            products at most.
        precision: "bfloat16" or "float32".
    """
    if device.type == "cuda" and precision == "bfloat16":
        name = torch.cuda.get_device_name(device)
        for known, peak in _PEAK_FLOPS_PER_S.items():
            if known in name:
                return peak, f"data sheet of {known}"
    return measured_flops_per_s(device, getattr(torch, precision)), "measured"


def measured_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """Throughput of square matrix products: the best of a few."""
    import time

    size = 8192 if device.type == "cuda" else 768
    one = torch.randn(size, size, device=device, dtype=dtype)
    best = 0.0
    for _ in range(4):
        begin = time.perf_counter()
        product = one @ one
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        del product
        best = max(best, 2.0 * size**3 / (time.perf_counter() - begin))
    return best
