"""The recipe's schema: every field of a run with its meaning, unit and the reason of its default.

A run is teacher, student, data, a list of stages, evaluation and export. ``recipe.parse`` builds
these classes from YAML and refuses what it does not know; ``load`` is the one entry.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from thinkfast_distill.data import presets
from thinkfast_distill.recipe import RecipeError, apply_overrides, parse, read_yaml

StudentKind = Literal["llamba", "mambainllama", "llama"]
StageKind = Literal["pretrain", "matrix_mixing", "hidden_state", "end_to_end", "sft"]

TEACHER_STAGES = ("matrix_mixing", "hidden_state", "end_to_end")
"""Stage kinds that cannot run without a teacher."""

LAYERWISE_STAGES = ("matrix_mixing", "hidden_state")
"""Stage kinds with a backward pass per layer: they keep the activations of one layer at a time."""


def _check(is_good: bool, message: str) -> None:
    if not is_good:
        raise RecipeError(message)


def _check_sizes(layout: Any) -> None:
    """Refuses sizes below 1; a 0 would be divided by, or taken for null."""
    for size in dataclasses.fields(layout):
        value = getattr(layout, size.name)
        if size.type in (int, int | None) and value is not None:
            _check(value >= 1, f"{size.name}: {value} must be at least 1.")


@dataclass
class TeacherConfig:
    """The frozen model that is distilled."""

    model: str
    """Folder, hub name, or ``package:NAME`` for the data folder of an installed package."""

    revision: str | None = None
    """Hub revision; null takes the default branch. Give a commit for a run worth repeating."""

    gguf_file: str | None = None
    """Name of a GGUF file in the folder, read (dequantised) instead of safetensors."""

    tokenizer: str | None = None
    """Folder or hub name of the tokenizer; null: the teacher's own. Needed for GGUF folders whose
    tokenizer files lie elsewhere."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the frozen weights. bfloat16 halves their memory; logits are float32 either way. It may
    differ between the sessions of a run, which then goes on with other rounding."""

    sizes: dict[str, Any] | None = None
    """Fields of the teacher's config.json. With them ``--dry-run`` needs no access to the teacher;
    a run compares them with the teacher it loads."""

    placement: Literal["replicate", "shard"] = "replicate"
    """With several ranks: a copy on each, or FSDP2 shards gathered layer by layer. A 3B teacher in
    bfloat16 takes 6.4 GB, so replicate until memory is short."""


@dataclass
class LlambaLayout:
    """Mixers of a pure Llamba student. Widths that are null follow the teacher's attention."""

    num_heads: int | None = None
    """SSM heads H; null: the teacher's query heads, which stage 1 and Q,K,V,O copying need."""

    n_groups: int | None = None
    """Groups sharing B and C; null: as many as heads (published models)."""

    ssm_state_size: int | None = 64
    """State width N per head. 64 is published; null: the teacher's head_dim (QKVO copying)."""

    expand: int = 1
    """Mixer width divided by the model's width."""

    conv_kernel: int = 4
    """Taps of the short convolution."""

    mixer_activation: Literal["identity", "silu"] = "identity"
    """After the convolution; the published models have none."""

    use_bias: bool | None = None
    """Biases of in_proj and out_proj, which take the place of the gate's own bias; null: where the
    teacher's output projection has one (Llama with ``attention_bias``), for QKVO copying to hold
    it. The published models have none."""

    chunk_size: int = 128
    """Tokens per scan chunk; no effect on the result beyond rounding."""

    def __post_init__(self) -> None:
        _check_sizes(self)


@dataclass
class MambaInLlamaLayout:
    """Mixers of a hybrid student; attention layers in ``attention_layers`` are kept."""

    attention_layers: list[int] = field(default_factory=list)
    """Indices of layers that keep the teacher's attention."""

    mamba_version: Literal["mamba1", "mamba2"] = "mamba1"
    """M1 uses Mamba-1, which its authors found clearly better on GSM8K."""

    ssm_state_size: int | None = None
    """State width N; null: 16 for Mamba-1, the teacher's head_dim for Mamba-2 (published)."""

    conv_kernel: int = 4
    """Taps of the short convolution."""

    repeat_kv_before_conv: bool | None = None
    """Repeat x (Mamba-2: and B) to all heads before the convolution; null: as published, true for
    Mamba-1 and false for Mamba-2."""

    time_step_rank: int | None = None
    """Mamba-1: rank of the step-size projection; null: ceil(hidden_size / 16)."""

    use_gated_norm: bool = True
    """Mamba-2: RMS norm per head after the gate."""

    use_bias: bool | None = None
    """Mamba-2: biases of in_proj and out_proj; null: where the teacher's output projection has one,
    as in Llamba. Mamba-1 has no place for biases of queries and keys, whatever is set."""

    chunk_size: int = 256
    """Mamba-2: tokens per scan chunk; no effect on the result beyond rounding."""

    def __post_init__(self) -> None:
        _check_sizes(self)


@dataclass
class LlamaLayout:
    """A Llama trained from scratch (stage kind ``pretrain``), to serve as a small teacher."""

    vocab_size: int | None = None
    """Rows of the embedding; null: the tokenizer's size."""

    hidden_size: int = 128
    """Width D of the residual stream."""

    intermediate_size: int = 384
    """Width of the MLP."""

    num_hidden_layers: int = 3
    """Number of blocks."""

    num_attention_heads: int = 4
    """Query heads."""

    num_key_value_heads: int = 2
    """Key/value heads."""

    head_dim: int | None = None
    """Width of a head; null: hidden_size / num_attention_heads."""

    max_position_embeddings: int = 2048
    """Context in tokens."""

    rope_theta: float = 10000.0
    """Base of the rotary embedding."""

    rms_norm_eps: float = 1e-5
    """eps of all norms."""

    tie_word_embeddings: bool = True
    """Head and embedding share weights."""

    def __post_init__(self) -> None:
        _check_sizes(self)


@dataclass
class StudentConfig:
    """What is trained: an architecture, its layout, and where its first weights come from."""

    UNION_KEYS: ClassVar[dict[str, tuple[str, dict[str, type]]]] = {
        "layout": (
            "kind",
            {"llamba": LlambaLayout, "mambainllama": MambaInLlamaLayout, "llama": LlamaLayout},
        )
    }

    kind: StudentKind
    """``llamba`` (no attention), ``mambainllama`` (hybrid) or ``llama`` (from scratch)."""

    layout: Any = None
    """Sizes; the accepted keys depend on ``kind``."""

    init: Literal["mohawk", "qkvo", "random"] = "mohawk"
    """First mixer weights: ``mohawk`` (identity convolution, open gate, random projections: the
    published Llamba recipe), ``qkvo`` (projections from the teacher's Q,K,V,O) or ``random``.
    Everything that is not a mixer is copied from the teacher."""

    weights: str | None = None
    """An exported student folder to start from instead of ``init``; its layout must match that of
    the first stage (mixers that are new in a later one follow ``init``), but a ``llama`` may have
    more layers: those on top are fresh and pass their input on at first."""

    tokenizer: str | None = None
    """``llama`` only: folder or hub name of the tokenizer to train with, or ``builtin:arith`` for
    the one of the arith problems. Students use the teacher's."""


@dataclass
class DataConfig:
    """A mixture of sources; stages name it."""

    sources: list[dict[str, Any]]
    """Where the text comes from; the keys are those of ``data.source_config``. ``preset: NAME``
    stands for the keys of ``data.presets``, of which others beside it change or add some."""

    loss_on: Literal["all", "completion"] = "all"
    """Which tokens are targets: every token of a text, or what the assistant says."""

    chat_template: str | None = None
    """File with a Jinja chat template; null: the tokenizer's own. It is fixed for the run and
    exported with the student."""

    max_document_tokens: int | None = None
    """Longer documents are dropped and counted; null: kept, and carried over to the next row."""

    decontaminate: list[str] = field(default_factory=list)
    """JSONL files of evaluation problems; documents that share a 13-gram with one are dropped. A
    memmap source must have been made with the same files."""

    def __post_init__(self) -> None:
        # Here, so that the resolved recipe of a run says what a preset was when it started.
        self.sources = [
            presets.expand(source, f"sources.{i}") for i, source in enumerate(self.sources)
        ]


@dataclass
class LossConfig:
    """The end-to-end loss; per target token, normalised by the targets of the global batch."""

    kind: Literal["reverse_kl", "forward_kl", "jsd"] = "reverse_kl"
    """``reverse_kl`` = KL(student || teacher), the paper's choice; ``forward_kl`` = KL(teacher ||
    student); ``jsd`` with ``beta``."""

    beta: float = 0.5
    """``jsd`` only, between 0 (forward) and 1 (reverse)."""

    ce_weight: float = 0.0
    """Weight of the cross entropy with the data's next token, added to the divergence."""

    temperature: float = 1.0
    """Divides both logits; the divergence is multiplied by its square."""

    chunk_tokens: int = 1024
    """Tokens whose logits exist at once: 0.5 GB of float32 each at a vocabulary of 128k."""

    def __post_init__(self) -> None:
        _check(0 < self.beta < 1, f"beta: {self.beta} must lie between 0 and 1, exclusive.")
        _check(self.ce_weight >= 0, f"ce_weight: {self.ce_weight} must be >= 0.")
        _check(self.temperature > 0, f"temperature: {self.temperature} must be > 0.")
        _check(self.chunk_tokens >= 1, f"chunk_tokens: {self.chunk_tokens} must be >= 1.")


@dataclass
class StageConfig:
    """One stage: an objective, a token budget, and an optimizer with its own schedule."""

    kind: StageKind
    """The objective."""

    data: str
    """Name of a mixture in ``data``."""

    tokens: int
    """Budget in tokens, padding included; rounded up to whole steps."""

    batch_tokens: int
    """Tokens per optimizer step over all ranks; a multiple of ``seq_len``."""

    lr: float
    """Peak learning rate."""

    name: str | None = None
    """Unique label in logs and overrides; null: the kind."""

    seq_len: int = 8192
    """Tokens per packed row."""

    micro_batch_rows: int | None = None
    """Rows per forward pass and rank; null: all rows of the rank at once."""

    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    """After the warm-up: constant then linear decay (``wsd``), cosine, or constant. It restarts
    with each stage, and so does the optimizer."""

    warmup_fraction: float = 0.1
    """Part of the stage's steps with linearly rising rate."""

    decay_fraction: float = 0.1
    """``wsd`` only: part of the steps with linear decay at the end."""

    min_lr_ratio: float = 0.0
    """Rate at the end of the decay, relative to ``lr``."""

    beta1: float = 0.9
    """AdamW."""

    beta2: float = 0.95
    """AdamW."""

    eps: float = 1e-8
    """AdamW."""

    weight_decay: float = 0.1
    """On matrices only: never on norms, biases, convolutions, nor on A, D, dt_bias and dt_proj.
    Rows of in_proj that make step sizes or decays (dt) are part of a matrix and decay with it."""

    clip_norm: float | None = 1.0
    """Largest global gradient norm; null: no clipping."""

    train: Literal["all", "mixers", "default"] = "default"
    """Which parameters move: everything, the replaced mixers, or what the stage's paper trains
    (stage 1 and 2: mixers; otherwise all)."""

    freeze: list[str] = field(default_factory=list)
    """Patterns (``*``) of parameter names that must not move in this stage."""

    mixer_output_weight: float = 0.0
    """``hidden_state`` only: weight of an extra term on the mixer's output."""

    loss: LossConfig = field(default_factory=LossConfig)
    """``end_to_end`` only."""

    attention_layers: list[int] | None = None
    """``mambainllama`` only: layers that keep attention during this stage, for progressive
    replacement; null: as in the student's layout. The last stage must have the layout's."""

    def __post_init__(self) -> None:
        self.name = self.name or self.kind
        for key in ("tokens", "batch_tokens", "seq_len"):
            _check(getattr(self, key) >= 1, f"{key}: {getattr(self, key)} must be >= 1.")
        _check(
            self.batch_tokens % self.seq_len == 0,
            f"batch_tokens: {self.batch_tokens} must be a multiple of seq_len={self.seq_len}.",
        )
        _check(
            self.micro_batch_rows is None or self.micro_batch_rows >= 1,
            f"micro_batch_rows: {self.micro_batch_rows} must be >= 1.",
        )
        _check(self.lr > 0 and math.isfinite(self.lr), f"lr: {self.lr} must be > 0.")
        for key in ("warmup_fraction", "decay_fraction", "min_lr_ratio"):
            _check(0 <= getattr(self, key) <= 1, f"{key}: {getattr(self, key)} is not in 0..1.")
        _check(
            self.schedule != "wsd" or self.warmup_fraction + self.decay_fraction <= 1,
            "warmup_fraction: warm-up and decay together exceed the stage.",
        )
        for key in ("beta1", "beta2"):
            _check(0 <= getattr(self, key) < 1, f"{key}: {getattr(self, key)} is not in 0..1.")
        _check(self.eps > 0, f"eps: {self.eps} must be > 0.")
        _check(self.weight_decay >= 0, f"weight_decay: {self.weight_decay} must be >= 0.")
        _check(
            self.clip_norm is None or self.clip_norm > 0,
            f"clip_norm: {self.clip_norm} must be > 0, or null.",
        )

    @property
    def batch_rows(self) -> int:
        """Packed rows of the global batch."""
        return self.batch_tokens // self.seq_len

    @property
    def num_steps(self) -> int:
        """Optimizer steps."""
        return -(-self.tokens // self.batch_tokens)


@dataclass
class EvaluationConfig:
    """Held-out measurements on the same fixed batches, during and after every stage."""

    data: str | None = None
    """Name of a mixture in ``data`` with held-out text; null: no evaluation."""

    every_steps: int = 500
    """Steps between evaluations; there is always one at the start and the end of a stage."""

    num_batches: int = 8
    """Batches per evaluation."""

    batch_rows: int = 8
    """Rows per batch over all ranks."""

    seq_len: int = 2048
    """Tokens per row."""

    def __post_init__(self) -> None:
        for key in ("every_steps", "num_batches", "batch_rows", "seq_len"):
            _check(getattr(self, key) >= 1, f"{key}: {getattr(self, key)} must be >= 1.")


@dataclass
class CheckpointConfig:
    """When the state of the run is saved."""

    every_steps: int = 500
    """Steps between checkpoints; the end of a stage and SIGTERM save too."""

    keep: int = 2
    """Newest checkpoints kept; the end of the last stage is always kept."""

    def __post_init__(self) -> None:
        _check(self.every_steps >= 1, f"every_steps: {self.every_steps} must be >= 1.")
        _check(self.keep >= 1, f"keep: {self.keep} must be >= 1.")


@dataclass
class LoggingConfig:
    """Where numbers go besides ``log.jsonl``."""

    every_steps: int = 1
    """Steps between lines of ``log.jsonl``; skipped steps and evaluations are always logged."""

    tracker: Literal["none", "trackio", "wandb", "tensorboard"] = "none"
    """A dashboard to send the same numbers to; its package must be installed."""

    project: str = "thinkfast-distill"
    """Project name in the dashboard."""

    peak_flops_per_s: float | None = None
    """Of one device, for MFU; null: the known figure of the GPU, else measured at start."""

    def __post_init__(self) -> None:
        _check(self.every_steps >= 1, f"every_steps: {self.every_steps} must be >= 1.")


@dataclass
class ComputeConfig:
    """How the run uses the machine.

    None of it changes what is computed, so all may differ between the sessions of a run;
    ``precision`` and ``kernels`` change how it is rounded, which a session that differs in them
    says and records.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto``: cuda where there is one."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: matrix products under autocast; parameters, optimizer state, decay and losses stay
    float32. CPUs without bfloat16 units are several times slower with it."""

    kernels: Literal["reference", "fla", "mamba_ssm"] = "reference"
    """Who computes the recurrences: plain torch in chunks, or the Triton kernels of an installed
    package (extras ``fla``, ``mamba-ssm``; GPU only)."""

    activation_checkpointing: bool = False
    """Recompute each block in the backward pass: 2 N more FLOPs per token, far less memory. Stages
    that go layer by layer (1 and 2) have little to gain and do without it."""

    replicas: int = 1
    """Groups of ranks that each hold a complete sharded copy (hybrid sharding); 1: one group."""

    prefetch_batches: int = 2
    """Global batches prepared ahead in a thread; 0: none."""

    assumed_mfu: float = 0.4
    """Used by ``--dry-run`` to turn FLOPs into GPU-hours."""

    assumed_peak_flops_per_s: float = 989e12
    """Used by ``--dry-run``: bfloat16 without sparsity of one H100 or H200."""

    max_skipped_steps: int = 10
    """Steps in a row with a non-finite loss or gradient after which the run stops."""

    def __post_init__(self) -> None:
        _check(self.replicas >= 1, f"replicas: {self.replicas} must be >= 1.")
        _check(self.prefetch_batches >= 0, f"prefetch_batches: {self.prefetch_batches} is < 0.")
        _check(0 < self.assumed_mfu <= 1, f"assumed_mfu: {self.assumed_mfu} is not in 0..1.")
        _check(self.max_skipped_steps >= 1, f"max_skipped_steps: {self.max_skipped_steps} is < 1.")


@dataclass
class ExportConfig:
    """What ``thinkfast-distill export`` writes besides weights."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the exported matrices."""

    name: str | None = None
    """Title of the model card; null: the run's name."""

    license: str | None = None
    """Of the weights, for the model card; it usually follows from the teacher and the data."""


@dataclass
class RunConfig:
    """A complete run."""

    name: str
    """Names the run folder and the model card."""

    student: StudentConfig
    """What is trained."""

    data: dict[str, DataConfig]
    """Named mixtures."""

    stages: list[StageConfig]
    """Run one after the other; each starts from the weights the previous one left."""

    teacher: TeacherConfig | None = None
    """Null for training from scratch."""

    seed: int = 42
    """Of fresh weights and of the data's order."""

    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Held-out measurements."""

    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saving."""

    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Logs."""

    compute: ComputeConfig = field(default_factory=ComputeConfig)
    """Machine."""

    export: ExportConfig = field(default_factory=ExportConfig)
    """Model folder."""

    def __post_init__(self) -> None:
        _check(bool(self.stages), "stages: the list is empty; a run needs at least one.")
        names = [stage.name for stage in self.stages]
        for i, stage in enumerate(self.stages):
            where = f"stages.{i}"
            _check(
                names.count(stage.name) == 1,
                f"{where}.name: {stage.name!r} occurs twice; give each stage a name.",
            )
            _check(
                stage.data in self.data,
                f"{where}.data: {stage.data!r} is not defined; accepted: {', '.join(self.data)}.",
            )
            self._check_kinds(stage, where)
        self._check_chat_templates()
        held_out = self.evaluation.data
        _check(
            held_out is None or held_out in self.data,
            f"evaluation.data: {held_out!r} is not defined; accepted: {', '.join(self.data)}.",
        )
        from_scratch = self.student.kind == "llama"
        _check(
            not from_scratch or self.student.tokenizer is not None,
            "student.tokenizer: missing; training from scratch needs a tokenizer folder.",
        )
        _check(
            from_scratch or self.teacher is not None,
            f"teacher: missing; a {self.student.kind} student takes its sizes from one.",
        )
        progressive = [s for s in self.stages if s.attention_layers is not None]
        if progressive and self.student.kind == "mambainllama":
            last = self.stages[-1].attention_layers
            _check(
                last is None or sorted(last) == sorted(self.student.layout.attention_layers),
                f"stages.{len(self.stages) - 1}.attention_layers: {last} must be those of "
                f"student.layout: {self.student.layout.attention_layers}.",
            )

    def _check_chat_templates(self) -> None:
        """One template for all stages: the exported model has only one."""
        (first, *others) = dict.fromkeys(stage.data for stage in self.stages)
        wanted = self.data[first].chat_template
        for name in others:
            found = self.data[name].chat_template
            _check(
                found == wanted,
                f"data.{name}.chat_template: {found!r}, but data.{first} has {wanted!r}; the "
                "template is fixed for the run, so give all mixtures the same.",
            )

    def _check_kinds(self, stage: StageConfig, where: str) -> None:
        _check(
            stage.kind not in TEACHER_STAGES or self.teacher is not None,
            f"{where}.kind: {stage.kind} needs a teacher, but the recipe has none.",
        )
        _check(
            (self.student.kind == "llama") == (stage.kind == "pretrain"),
            f"{where}.kind: {stage.kind!r} does not fit student.kind {self.student.kind!r}; a "
            "llama is trained by pretrain stages, other students by all other kinds.",
        )
        _check(
            stage.kind != "matrix_mixing" or self.student.kind != "llama",
            f"{where}.kind: matrix_mixing needs mixers.",
        )
        _check(
            stage.attention_layers is None or self.student.kind == "mambainllama",
            f"{where}.attention_layers: only a mambainllama student has attention layers.",
        )

    def stage_index(self, name: str) -> int:
        """Position of the stage with this name."""
        return [stage.name for stage in self.stages].index(name)


def load(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a recipe.

    Args:
        path: the YAML file.
        overrides: ``key=value`` settings, see ``recipe.apply_overrides``.

    Raises:
        RecipeError: anything wrong with it; the message is one line.
    """
    config: RunConfig = parse(RunConfig, apply_overrides(read_yaml(path), overrides), str(path))
    return config
