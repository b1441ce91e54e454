"""Makes the parts of a run from its recipe: teacher, student, objective, data, tokenizer.

The one place where the loop meets the models, the stages and the data, so that each of them stays
free of recipes and the loop free of their constructors.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoTokenizer, LlamaConfig, PretrainedConfig

from thinkfast_distill import architecture, distributed
from thinkfast_distill.architecture import ModelConfig
from thinkfast_distill.config import RunConfig, StageConfig
from thinkfast_distill.distributed import World
from thinkfast_distill.recipe import RecipeError

if TYPE_CHECKING:
    from thinkfast_distill.batch import PackedBatch
    from thinkfast_distill.data.source_config import SourceConfig
    from thinkfast_distill.students.backends import Backend

ROOT_METHODS = (
    *("embed", "hidden", "layer", "mixer", "mixer_and_layer", "mixer_matrix", "head_weight"),
)
"""Methods of a student that stages call instead of ``forward``."""


ARITH_TOKENIZER = "builtin:arith"
"""Value of ``student.tokenizer`` for the tokenizer of the arith problems, made by code."""


def seed_for(seed: int, purpose: str) -> int:
    """A seed below 2**31 that depends on the run's seed and on what it is for."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


# ------------------------------------------------------------------- teacher and tokenizer


def teacher_config(config: RunConfig) -> PretrainedConfig | None:
    """The teacher's configuration, or None without a teacher."""
    return None if config.teacher is None else architecture.teacher_config(config.teacher)


def load_teacher(config: RunConfig) -> Any:
    """The frozen teacher on the CPU, or None without one.

    Raises:
        RecipeError: it cannot be read, or a weight is not finite, which could only end in a NaN.
    """
    from safetensors import SafetensorError

    from thinkfast_distill.teacher import Teacher

    if config.teacher is None:
        return None
    folder = architecture.resolve_folder(
        config.teacher.model, "teacher.model", revision=config.teacher.revision
    )
    dtype = getattr(torch, config.teacher.dtype)
    transformers.utils.logging.disable_progress_bar()  # there is one line of progress, ours
    try:
        teacher = Teacher.from_folder(folder, dtype, gguf_file=config.teacher.gguf_file)
    except (OSError, RuntimeError, SafetensorError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise RecipeError(
            f"teacher.model: {folder}: cannot be loaded: {first_line}; download the checkpoint "
            "again."
        ) from error
    for name, parameter in teacher.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise RecipeError(
                f"teacher.model: {folder}: {name} holds values that are not finite; download the "
                "checkpoint again."
            )
    return teacher


def place_teacher(teacher: Any, config: RunConfig, world: World) -> None:
    """Moves the teacher to the device and shards it, if the recipe says so."""
    if teacher is None:
        return
    teacher.to(world.device)
    if world.size > 1 and config.teacher is not None and config.teacher.placement == "shard":
        distributed.shard(teacher, teacher.blocks(), (), world)


def tokenizer_folder(config: RunConfig) -> Path | None:
    """Folder of the tokenizer files, which the export copies; None for the built-in one.

    Raises:
        RecipeError: nothing is there.
    """
    if config.student.tokenizer == ARITH_TOKENIZER:
        return None
    if config.student.tokenizer is not None:
        return architecture.resolve_folder(config.student.tokenizer, "student.tokenizer")
    if config.teacher is None:
        return None
    name = config.teacher.tokenizer
    if name is not None:
        return architecture.resolve_folder(name, "teacher.tokenizer")
    return architecture.resolve_folder(
        config.teacher.model, "teacher.model", revision=config.teacher.revision
    )


def tokenizer_gguf_file(config: RunConfig) -> str | None:
    """The GGUF file in the tokenizer's folder that holds the tokenizer; None: other files do."""
    teacher = config.teacher
    if config.student.tokenizer is not None or teacher is None or teacher.tokenizer is not None:
        return None
    return teacher.gguf_file


def tokenizer(config: RunConfig) -> Any:
    """The tokenizer of the run; its chat template is the recipe's, if that has one.

    Raises:
        RecipeError: it cannot be loaded.
    """
    if config.student.tokenizer == ARITH_TOKENIZER:
        from thinkfast_distill.data.arith_tokenizer import build_tokenizer

        return build_tokenizer()
    folder = tokenizer_folder(config)
    assert folder is not None, "RunConfig checks that there is a teacher or a tokenizer"
    gguf_file = tokenizer_gguf_file(config)
    extra = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        return AutoTokenizer.from_pretrained(folder, **extra)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise RecipeError(f"tokenizer: {folder}: cannot be loaded: {first_line}") from error


def check_vocabulary(tokenizer: Any, teacher: PretrainedConfig | None) -> None:
    """Refuses a tokenizer with ids that the teacher's embedding has no row for.

    Raises:
        RecipeError: with both numbers.
    """
    if tokenizer is None or teacher is None:
        return
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= teacher.vocab_size:
        raise RecipeError(
            f"teacher.tokenizer: its largest token id is {largest}, but the teacher's vocabulary "
            f"has {teacher.vocab_size} rows; use the tokenizer that the teacher was trained with."
        )


# --------------------------------------------------------------------------------- student


def student_config(
    config: RunConfig, teacher: PretrainedConfig | None, tokenizer: Any, index: int | None
) -> ModelConfig:
    """The student's configuration in a stage (index None: at the end)."""
    size = None if tokenizer is None else len(tokenizer)
    return architecture.student_config(config, teacher, stage=index, tokenizer_size=size)


def build_student(config: ModelConfig, backend: Backend = "reference") -> nn.Module:
    """A student with fresh weights on the default device, in float32."""
    if isinstance(config, LlamaConfig):
        from thinkfast_distill.llama_student import LlamaStudent

        return LlamaStudent(config)
    from thinkfast_distill import students

    return students.build(config, backend)


def initialise(
    config: RunConfig, student: nn.Module, teacher: Any, seed: int, *, index: int
) -> None:
    """Gives a new student its first weights, as the recipe says.

    Args:
        config: ``student.init`` and ``student.weights`` decide.
        student: changed in place.
        teacher: not sharded; None for training from scratch.
        seed: of random parts.
        index: of the stage; the layers that are new in a later one come from the teacher, because
            ``student.weights`` is a student of the first.

    Raises:
        RecipeError: the folder of ``student.weights`` does not fit.
    """
    from thinkfast_distill import init_from_teacher

    if config.student.weights is not None and index == 0:
        load_exported(student, config.student.weights)
    elif teacher is not None and config.student.kind != "llama":
        init_from_teacher.initialise(
            cast(Any, student), teacher, how=config.student.init, seed=seed
        )


def load_exported(student: nn.Module, name: str) -> None:
    """Loads the weights of an exported folder into a student.

    Raises:
        RecipeError: names missing, surplus or wrongly shaped tensors.
    """
    from vllm_thinkfast.checkpoints.folder import read_folder

    folder = architecture.resolve_folder(name, "student.weights")
    found = dict(read_folder(folder))
    wanted = student.state_dict()
    if isinstance(student.config, LlamaConfig):
        _add_identity_blocks(found, wanted)
    if "lm_head.weight" in wanted and "lm_head.weight" not in found:
        found["lm_head.weight"] = found.get("model.embed_tokens.weight", torch.empty(0))
    wrong = [
        f"{key} (there {_shape(found, key)}, here {_shape(wanted, key)})"
        for key in sorted({*found, *wanted})
        if _shape(found, key) != _shape(wanted, key)
    ]
    if wrong:
        raise RecipeError(
            f"student.weights: {folder}: {len(wrong)} tensors do not fit the student, for example "
            f"{wrong[0]}; give an exported folder of the same kind, layout and vocabulary."
        )
    student.load_state_dict({key: value.float() for key, value in found.items()})


def _shape(tensors: Mapping[str, torch.Tensor], name: str) -> list[int] | None:
    return list(tensors[name].shape) if name in tensors else None


def _add_identity_blocks(found: dict[str, torch.Tensor], fresh: Mapping[str, torch.Tensor]) -> None:
    """Adds a Llama's blocks above those of a checkpoint; at first they pass their input on."""
    number = {name: int(name.split(".")[2]) for name in fresh if name.startswith("model.layers.")}
    num_found = len({name.split(".")[2] for name in found if name.startswith("model.layers.")})
    for name, index in number.items():
        if index >= num_found and name not in found:
            is_output = name.endswith(("self_attn.o_proj.weight", "mlp.down_proj.weight"))
            found[name] = torch.zeros_like(fresh[name]) if is_output else fresh[name].clone()


def blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a student, in order."""
    layers = model.get_submodule("model.layers")
    assert isinstance(layers, nn.ModuleList)
    return list(layers)


def checkpoint_blocks(student: nn.Module) -> None:
    """Makes every block recompute its forward pass in the backward pass."""
    for block in blocks(student):
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def shard_student(student: nn.Module, world: World) -> None:
    """Shards a student block by block; nothing happens with one process."""
    distributed.shard(student, blocks(student), ROOT_METHODS, world)


# --------------------------------------------------------------------- objectives and data


def build_stage(config: RunConfig, index: int, student: nn.Module, teacher: Any) -> Any:
    """The objective of a stage; teacher None where only names are asked for.

    Raises:
        RecipeError: student, teacher and stage do not fit together; names the stage.
    """
    from thinkfast_distill import stages

    stage = config.stages[index]
    try:
        return stages.build(stage, student, teacher, freeze=stage.freeze)
    except ValueError as error:
        raise RecipeError(f"stages.{index}: {error}") from error


def end_to_end_objective(stage: StageConfig, student: nn.Module, teacher: Any) -> Any:
    """The end-to-end objective with a stage's settings, for held-out measurements."""
    from thinkfast_distill import stages

    return stages.build(dataclasses.replace(stage, kind="end_to_end"), student, teacher)


def stage_without_weights(
    config: RunConfig, index: int, student_config: ModelConfig, teacher: Any
) -> tuple[nn.Module, Any]:
    """A student on the meta device and the objective of a stage for it.

    Args:
        config: the run.
        index: of the stage.
        student_config: of the student in that stage.
        teacher: None where only names are asked for.

    Raises:
        ValueError: student, teacher and stage do not fit together.
    """
    with torch.device("meta"):
        student = build_student(student_config)
    return student, build_stage(config, index, student, teacher)


def micro_batches(batch: PackedBatch, rows: int | None) -> Iterator[PackedBatch]:
    """The rows of a batch in pieces of about ``rows``; all at once if None."""
    num_rows = batch.input_ids.shape[0]
    yield from batch.split(1 if rows is None else -(-num_rows // rows))


def normalised(kind: str, sums: Mapping[str, float]) -> dict[str, float]:
    """Sums of a stage's metrics -> the figures that are logged."""
    from thinkfast_distill import stages

    return stages.normalised(kind, sums)


def counts_step_labels(config: RunConfig, data: str) -> bool:
    """Whether all targets of a mixture are step labels."""
    return all(
        source.has_step_labels and not getattr(source, "learn_steps", False)
        for source in _sources(config, data)
    )


def contamination_notes(config: RunConfig) -> list[str]:
    """One line for each mixture that is trained on, has hub data and names no problems."""
    return [
        f"mixture {name}: nothing is decontaminated; name the problems you will evaluate on in "
        f"data.{name}.decontaminate"
        for name in dict.fromkeys(stage.data for stage in config.stages)
        if not config.data[name].decontaminate
        and any(source.get("kind") == "hub" for source in config.data[name].sources)
    ]


def is_reward_model(config: RunConfig) -> bool:
    """Whether the last stage trains a process reward model."""
    return all(source.has_step_labels for source in _sources(config, config.stages[-1].data))


def _sources(config: RunConfig, data: str) -> list[SourceConfig]:
    from thinkfast_distill.data.source_config import source_config

    return [source_config(raw, f"data.{data}") for raw in config.data[data].sources]


def loader(
    config: RunConfig,
    tokenizer: Any,
    *,
    data: str,
    seq_len: int,
    batch_rows: int,
    purpose: str,
    state: dict[str, Any] | None,
) -> Any:
    """The batches of a mixture.

    Args:
        config: the run.
        tokenizer: of the run.
        data: name of the mixture.
        seq_len: tokens of a row.
        batch_rows: rows of a global batch.
        purpose: stage or "evaluation"; each has its own order.
        state: of the loader, to continue from.

    Raises:
        DataError: the data cannot be used.
    """
    from thinkfast_distill.data.formatting import read_chat_template
    from thinkfast_distill.data.loader import Loader

    mixture = config.data[data]
    return Loader(
        mixture.sources,
        tokenizer,
        seq_len,
        batch_rows,
        seed_for(config.seed, f"data/{purpose}"),
        state,
        loss_on=mixture.loss_on,
        chat_template=read_chat_template(tokenizer, mixture.chat_template),
        max_document_tokens=mixture.max_document_tokens,
        decontaminate=mixture.decontaminate,
    )
