"""Saving and restoring a run: torch.distributed.checkpoint for tensors, one JSON file for the rest.

``RUN/checkpoints/step_00001200/`` holds the shards of student and optimizer and ``state.json``:
progress, data state, configuration, git commit, versions. Nothing in it depends on the number of
ranks. A checkpoint is written under another name and renamed when complete, then the file
``latest`` is pointed at it: a run killed at any moment, or out of disk space, finds the previous
one intact.
"""

import contextlib
import dataclasses
import errno
import json
import os
import platform
import shutil
import subprocess
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from thinkfast_distill import recipe
from thinkfast_distill.config import RunConfig
from thinkfast_distill.distributed import World

STATE_FILE = "state.json"
LATEST = "latest"
_FOLDER = "checkpoints"
_FORMAT = 1
_PARTIAL = ".partial-"

FREE_KEYS = (
    *("checkpoint", "logging", "compute", "export", "evaluation", "teacher.placement"),
    *("stages.*.micro_batch_rows", "stages.*.loss.chunk_tokens"),
    *("teacher.dtype", "data.*.sources.*.epochs"),
)
"""Parts of a recipe that may change between the sessions of a run: none alters the objective, the
schedule or the order of the data, but see ``ROUNDING_KEYS``."""

ROUNDING_KEYS = ("compute.precision", "compute.kernels", "teacher.dtype")
"""Those of them with which the numbers round otherwise. They are free so that a run can go on
elsewhere, or after an overflow; a session that differs in them says so and records them."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or used; the message is one line for the user."""


@dataclass
class Progress:
    """How far a run is; JSON-able and independent of the number of ranks."""

    stage: int = 0
    """Index of the current stage."""

    stage_step: int = 0
    """Finished steps of that stage."""

    step: int = 0
    """Finished steps of the run."""

    tokens: int = 0
    """Tokens of all finished steps, padding included."""

    stage_tokens: dict[str, int] = field(default_factory=dict)
    """The same per stage name."""

    source_tokens: dict[str, int] = field(default_factory=dict)
    """Tokens per data source, without padding."""

    num_targets: int = 0
    """Tokens that entered a loss."""

    skipped_steps: int = 0
    """Steps without an update: loss or gradient not finite, or nothing that counts."""

    skipped_in_a_row: int = 0
    """The last of them, without an update in between."""

    is_evaluation_due: bool = False
    """Whether the last step's held-out measurement failed and is to be repeated."""

    data_state: dict[str, Any] | None = None
    """State of the stage's data loader; None at the start of a stage."""

    elapsed_s: float = 0.0
    """Time spent in steps, over all sessions."""

    first_metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    """Stage name -> held-out measurements before the stage."""

    last_metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    """Stage name -> newest held-out measurements of the stage."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    folder: Path
    """Where it lies."""

    progress: Progress
    """How far the run was."""

    config: dict[str, Any]
    """The resolved recipe that made it."""

    environment: dict[str, Any]
    """Git commit, versions and number of ranks of the session that wrote it."""


class CheckpointStore:
    """The checkpoints of one run folder."""

    def __init__(self, run: Path, keep: int, world: World) -> None:
        """Opens the store; nothing is written yet.

        Args:
            run: the run folder.
            keep: how many to keep.
            world: the ranks that save together.
        """
        self.folder = run / _FOLDER
        self.keep = keep
        self.world = world

    def save(
        self,
        config: RunConfig,
        progress: Progress,
        student: nn.Module,
        optimizer: torch.optim.Optimizer | None,
    ) -> Path:
        """Writes a checkpoint and removes the oldest ones.

        Args:
            config: the run.
            progress: how far it is.
            student: the model, sharded or not.
            optimizer: None at the end of a stage: the next one starts afresh.

        Returns:
            the folder of the checkpoint.

        Raises:
            CheckpointError: it cannot be written; the previous checkpoint is unchanged.
        """
        name = f"step_{progress.step:08d}" + ("" if optimizer is not None else "_end")
        partial, final = self.folder / f"{_PARTIAL}{name}", self.folder / name
        tensors = _tensors(student, optimizer)
        problem: OSError | None = None
        try:
            if self.world.is_main:
                self._prepare(partial, tensors)
        except OSError as error:
            problem = error
        self._stop_together(problem, name)
        try:
            with _without_warning():
                state_dict_saver.save(tensors, checkpoint_id=partial, no_dist=self.world.size == 1)
            if self.world.is_main:
                document = {
                    "format": _FORMAT,
                    "progress": dataclasses.asdict(progress),
                    "config": recipe.to_dict(config),
                    "environment": {**environment(), "num_ranks": self.world.size},
                }
                _write_synced(partial / STATE_FILE, json.dumps(document, indent=1))
                self._publish(partial, final)
        except (OSError, RuntimeError, CheckpointException) as error:
            problem = _os_error_within(error)
            if problem is None:
                raise
        self._stop_together(problem, name)
        return final

    def _prepare(self, partial: Path, tensors: Mapping[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(f"{_PARTIAL}*"):
            shutil.rmtree(leftover)
        partial.mkdir()
        needed = sum(t.numel() * t.element_size() for t in _only_tensors(tensors.values()))
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(errno.ENOSPC, f"{needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free")

    def _publish(self, partial: Path, final: Path) -> None:
        if final.exists():  # the same step saved again, after a resume from an older checkpoint
            os.replace(final, self.folder / f"{_PARTIAL}replaced")
        os.replace(partial, final)
        shutil.rmtree(self.folder / f"{_PARTIAL}replaced", ignore_errors=True)
        pointer = self.folder / f".{LATEST}"
        _write_synced(pointer, final.name + "\n")
        os.replace(pointer, self.folder / LATEST)
        for old in self._complete()[: -self.keep]:
            if old != final:
                shutil.rmtree(old)

    def _stop_together(self, problem: OSError | None, name: str) -> None:
        """Raises on every rank if there was a problem on any."""
        problems = [text for text in self.world.gather(problem and str(problem)) if text]
        if not problems:
            return
        if self.world.is_main:
            for leftover in self.folder.glob(f"{_PARTIAL}*"):
                shutil.rmtree(leftover, ignore_errors=True)
        self.world.barrier()
        previous = self.latest_folder()
        kept = "there is no earlier checkpoint"
        if previous is not None:
            kept = f"the previous checkpoint {previous} is unchanged"
        raise CheckpointError(
            f"{self.folder / name}: the checkpoint cannot be written: {problems[0]}; {kept}. Make "
            "room and start the same command again."
        )

    def _complete(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        found = [f for f in self.folder.glob("step_*") if (f / STATE_FILE).is_file()]
        return sorted(found, key=lambda folder: (int(folder.name.split("_")[1]), folder.name))

    def latest_folder(self) -> Path | None:
        """The newest complete checkpoint; None if there is none."""
        pointer = self.folder / LATEST
        if pointer.is_file():
            named = self.folder / pointer.read_text(encoding="utf-8").strip()
            if (named / STATE_FILE).is_file():
                return named
        # Killed between the rename and the pointer, or the folder was moved about by hand.
        complete = self._complete()
        return complete[-1] if complete else None

    def latest(self) -> Checkpoint | None:
        """Reads the newest checkpoint's description."""
        folder = self.latest_folder()
        return None if folder is None else read(folder)

    def load_student(
        self, checkpoint: Checkpoint, student: nn.Module, *, only_common: bool = False
    ) -> list[str]:
        """Loads weights into a student, sharded or not.

        Args:
            checkpoint: where from.
            student: overwritten in place.
            only_common: load the tensors that both have, for a student whose layers changed.

        Returns:
            names of the tensors that were not loaded.

        Raises:
            CheckpointError: the checkpoint lacks a tensor, unless ``only_common``.
        """
        stored = {
            name: tuple(entry.size)
            for name, entry in _stored(checkpoint).items()
            if isinstance(entry, TensorStorageMetadata)
        }
        wanted: dict[str, Any] = get_model_state_dict(student)
        absent = [
            name
            for name, value in wanted.items()
            if stored.get(f"student.{name}") != tuple(value.shape)
        ]
        if absent and not only_common:
            raise CheckpointError(
                f"{checkpoint.folder}: does not hold {absent[0]}"
                + (f" and {len(absent) - 1} more tensors" if len(absent) > 1 else "")
                + " in the student's shape; the checkpoint is of another student."
            )
        state = {f"student.{n}": value for n, value in wanted.items() if n not in absent}
        self._load(checkpoint, state)
        loaded = {name.removeprefix("student."): value for name, value in state.items()}
        set_model_state_dict(student, loaded, options=StateDictOptions(strict=not absent))
        return absent

    def _load(self, checkpoint: Checkpoint, state: dict[str, Any]) -> None:
        """Fills the tensors of ``state``; each rank reads the parts it holds."""
        try:
            with _without_warning():
                state_dict_loader.load(
                    state, checkpoint_id=checkpoint.folder, no_dist=self.world.size == 1
                )
        except (OSError, RuntimeError, CheckpointException) as error:
            first_line = str(error).strip().splitlines()[0]
            raise CheckpointError(
                f"{checkpoint.folder}: cannot be loaded: {first_line}; remove this folder to "
                "continue from the checkpoint before."
            ) from error

    def load_optimizer(
        self, checkpoint: Checkpoint, student: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        """Loads the optimizer's state of an unfinished stage, if it had made a step."""
        if not any(name.startswith("optimizer.") for name in _stored(checkpoint)):
            return
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        wanted: dict[str, Any] = get_optimizer_state_dict(student, optimizer, options=options)
        state = {f"optimizer.{name}": value for name, value in wanted.items()}
        self._load(checkpoint, state)
        loaded = {name.removeprefix("optimizer."): value for name, value in state.items()}
        set_optimizer_state_dict(student, optimizer, loaded, options=options)


def _stored(checkpoint: Checkpoint) -> dict[str, Any]:
    """Name -> description of everything that a checkpoint holds."""
    metadata = FileSystemReader(checkpoint.folder).read_metadata()
    return dict(metadata.state_dict_metadata)


def read(folder: Path) -> Checkpoint:
    """Reads the description of a complete checkpoint.

    Raises:
        CheckpointError: it is unreadable or of another format.
    """
    path = folder / STATE_FILE
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != _FORMAT:
            raise CheckpointError(
                f"{path}: format {document['format']!r} is not {_FORMAT}; resume it with the "
                "version of thinkfast-distill that wrote it."
            )
        progress = Progress(**document["progress"])
        return Checkpoint(folder, progress, document["config"], document["environment"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a readable checkpoint: {error}.") from error


def check_same_recipe(checkpoint: Checkpoint, config: RunConfig) -> None:
    """Refuses to continue a checkpoint that another recipe made.

    Raises:
        RecipeError: names the differing keys with both values.
    """
    here = recipe.to_dict(config)
    differing = {
        key: values
        for key, values in recipe.differing_keys(checkpoint.config, here).items()
        if not any(fnmatchcase(key, free) or key.startswith(f"{free}.") for free in FREE_KEYS)
    }
    if not differing:
        return
    listed = [f"{key} ({old!r} -> {new!r})" for key, (old, new) in list(differing.items())[:8]]
    more = f" and {len(differing) - 8} more" if len(differing) > 8 else ""
    raise recipe.RecipeError(
        f"{checkpoint.folder}: made by another recipe; differing keys: {', '.join(listed)}{more}. "
        "Choose another --run-dir, or restore these values to continue the run."
    )


def rounding(resolved: Mapping[str, Any]) -> dict[str, str]:
    """The values of ``ROUNDING_KEYS`` that a resolved recipe has."""
    found = {}
    for key in ROUNDING_KEYS:
        part, _, name = key.partition(".")
        value = (resolved.get(part) or {}).get(name)  # there may be no teacher
        if value is not None:
            found[key] = value
    return found


def other_rounding(checkpoint: Checkpoint, config: RunConfig) -> dict[str, tuple[str, str]]:
    """The ``ROUNDING_KEYS`` in which a recipe differs from the checkpoint's: key -> (then, now)."""
    then, now = rounding(checkpoint.config), rounding(recipe.to_dict(config))
    return {key: (then[key], now[key]) for key in then if then[key] != now.get(key, then[key])}


def environment() -> dict[str, Any]:
    """Git commit of the checkout this package runs from (None if installed), and versions."""
    import transformers

    import vllm_thinkfast

    return {
        "git_commit": git_commit(Path(__file__).resolve().parent),
        "vllm_thinkfast": vllm_thinkfast.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def git_commit(folder: Path) -> str | None:
    """The commit checked out around a folder; ``-dirty`` is appended if files differ from it."""
    if shutil.which("git") is None:
        return None
    result = subprocess.run(
        ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        capture_output=True,
        text=True,
        check=False,
    )
    return result.stdout.strip() or None


@contextlib.contextmanager
def _without_warning() -> Iterator[None]:
    """Hides the notice that one process saves alone, which is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _tensors(student: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    tensors: dict[str, Any] = {f"student.{n}": t for n, t in get_model_state_dict(student).items()}
    # Of an optimizer that has not stepped yet torch would make a state in which it has, once.
    if optimizer is not None and optimizer.state:
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        state: dict[str, Any] = get_optimizer_state_dict(student, optimizer, options=options)
        tensors.update({f"optimizer.{n}": t for n, t in state.items()})
    return tensors


def _only_tensors(values: Iterable[Any]) -> list[torch.Tensor]:
    return [value for value in values if isinstance(value, torch.Tensor)]


def _os_error_within(error: BaseException) -> OSError | None:
    """The OSError that an exception is, wraps, or was caused by."""
    if isinstance(error, OSError):
        return error
    if isinstance(error, CheckpointException):
        for inner, _ in error.failures.values():
            found = _os_error_within(inner)
            if found is not None:
                return found
    return _os_error_within(error.__cause__) if error.__cause__ is not None else None


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
