"""The training loop: stages one after the other, each from the checkpoint before it.

A stage always starts the same way, whether the run goes on or was resumed: build the student, load
the newest checkpoint, shard, make a fresh optimizer (or load the one of the unfinished stage). So
the curve after a kill is the curve without it, also at a border between stages.

A step whose loss or gradient is not finite updates nothing and is counted; after
``compute.max_skipped_steps`` in a row the run stops and names the samples.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PretrainedConfig

from thinkfast_distill import costs, metrics, optimiser, parts, recipe, run_log
from thinkfast_distill.architecture import ModelConfig
from thinkfast_distill.checkpoint import (
    CheckpointStore,
    Progress,
    check_same_recipe,
    environment,
    other_rounding,
    rounding,
)
from thinkfast_distill.checkpoint import read as read_checkpoint
from thinkfast_distill.config import LAYERWISE_STAGES, RunConfig, StageConfig
from thinkfast_distill.distributed import World
from thinkfast_distill.evaluation import Evaluation
from thinkfast_distill.feed import Feed
from thinkfast_distill.freeze import freeze_table
from thinkfast_distill.messages import SHOWN, progress_text, rounding_lines, skipped_message
from thinkfast_distill.schedule import learning_rate

if TYPE_CHECKING:
    from thinkfast_distill.batch import PackedBatch

CONFIG_FILE = "config.yaml"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
_LOCK_FILE = ".lock"


class TrainingError(RuntimeError):
    """The run cannot go on; the message is one line for the user."""


class Interrupted(Exception):  # noqa: N818  (a request, not an error)
    """A signal asked the run to stop; its state is saved."""

    def __init__(self, signum: int) -> None:
        """Args: signum: the signal."""
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Trainer:
    """One session of a run."""

    def __init__(
        self,
        config: RunConfig,
        run: Path,
        world: World,
        *,
        max_steps: int | None = None,
        on_step: Callable[[Progress], None] | None = None,
        show_progress: bool = True,
    ) -> None:
        """Opens the run folder and reads the newest checkpoint.

        Args:
            config: the run.
            run: its folder; created.
            world: the ranks.
            max_steps: stop, saved, after this many steps of the run; the schedules stay those of
                the recipe.
            on_step: called after every finished step.
            show_progress: show the live line.

        Raises:
            RecipeError: the recipe cannot be run here, or the folder holds another recipe's run.
            CheckpointError: the newest checkpoint is unreadable.
        """
        self.config, self.run_folder, self.world = config, run, world
        self._max_steps, self._on_step = max_steps, on_step
        self._check_rows()
        if world.is_main:
            run.mkdir(parents=True, exist_ok=True)
        # Before the checkpoint is read: another process may be writing the next one.
        self._lock = _lock(run) if world.is_main else None
        world.barrier()
        self.store = CheckpointStore(run, config.checkpoint.keep, world)
        self._other_rounding: dict[str, tuple[str, str]] = {}
        try:
            checkpoint = self.store.latest()
            if checkpoint is not None:
                check_same_recipe(checkpoint, config)
                self._other_rounding = other_rounding(checkpoint, config)
        except BaseException:
            self._unlock()
            raise
        self._checkpoint = checkpoint  # the one that the next stage starts from
        self.progress = Progress() if checkpoint is None else checkpoint.progress
        self._show_progress = show_progress
        self._signal = 0
        self._saved_step = -1 if checkpoint is None else checkpoint.progress.step
        # Set by train():
        self.log: run_log.RunLog
        self.tokenizer: Any = None
        self.teacher: Any = None
        self.teacher_config: PretrainedConfig | None = None
        self.evaluation: Evaluation
        self._peak_flops_per_s = 0.0
        # Set at the start of each stage:
        self.student: nn.Module
        self.stage: Any = None
        self.optimizer: torch.optim.Optimizer | None = None
        self._parameters: dict[str, nn.Parameter] = {}
        self._flops_per_token = 0.0

    def train(self) -> Progress:
        """Runs what is left of the recipe.

        Returns:
            the progress at the end.

        Raises:
            TrainingError: too many non-finite steps in a row, or a teacher that is not finite (on
                any rank; all ranks raise, and the finished steps are saved).
            DataError: a source ended before its budget, or is malformed; the state is saved.
            OSError: a data file cannot be read any more; the state is saved.
            CheckpointError: no room for a checkpoint; the previous one is unchanged.
            Interrupted: SIGTERM or SIGINT; the state is saved.
        """
        try:
            if not self._is_done():
                self._set_up()
                with self._signals():
                    while not self._is_done():
                        self._run_stage(self.progress.stage)
        finally:
            if hasattr(self, "log"):
                self.log.close()
            self._unlock()
        return self.progress

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)

    def _is_done(self) -> bool:
        has_reached_limit = self._max_steps is not None and self.progress.step >= self._max_steps
        return has_reached_limit or self.progress.stage == len(self.config.stages)

    def _set_up(self) -> None:
        config, world = self.config, self.world
        self.teacher_config = parts.teacher_config(config)
        self.tokenizer = parts.tokenizer(config)
        parts.check_vocabulary(self.tokenizer, self.teacher_config)
        self._check_kernels()
        self.log = self._open_log()
        self.teacher = parts.load_teacher(config)
        self._check_later_stages()
        parts.place_teacher(self.teacher, config, world)
        self.evaluation = Evaluation(config, world, self.tokenizer, self.teacher)
        self._peak_flops_per_s = self._peak()

    # ------------------------------------------------------------------ stages

    def _run_stage(self, index: int) -> None:
        """Trains one stage to its end, or to ``max_steps``."""
        stage = self.config.stages[index]
        feed = self._start_stage(index)
        try:
            if self.progress.stage_step == 0 or self.progress.is_evaluation_due:
                self._evaluate(stage)
            while self.progress.stage_step < stage.num_steps:
                if self._is_done():
                    self._save()
                    return
                self._step(stage, feed)
        finally:
            feed.close()
        if stage.num_steps % self.config.evaluation.every_steps:  # else it was just done
            self._evaluate(stage)
        self._log_data(stage, feed)
        self.optimizer = None
        self.progress = dataclasses.replace(
            self.progress, stage=index + 1, stage_step=0, data_state=None
        )
        self._save()

    def _start_stage(self, index: int) -> Feed:
        """Builds student, objective, optimizer and data of a stage."""
        config, world = self.config, self.world
        stage = config.stages[index]
        is_unfinished = self.progress.stage_step > 0
        student_config = parts.student_config(config, self.teacher_config, self.tokenizer, index)
        self.student = self._build_student(index, student_config)
        self.stage = parts.build_stage(config, index, self.student, self.teacher)
        names = set(self.stage.trainable_parameters())
        for name, parameter in self.student.named_parameters():
            parameter.requires_grad_(name in names)
        self.student.to(world.device)
        if config.compute.activation_checkpointing and stage.kind not in LAYERWISE_STAGES:
            parts.checkpoint_blocks(self.student)
        parts.shard_student(self.student, world)
        if is_unfinished:
            assert self._checkpoint is not None
            self.store.load_student(self._checkpoint, self.student)
        self._parameters = optimiser.named_trainable(self.student)
        no_decay = self.stage.partly_trained_parameters()
        self.optimizer = optimiser.build(stage, self._parameters, no_decay)
        if is_unfinished:
            assert self._checkpoint is not None
            self.store.load_optimizer(self._checkpoint, self.student, self.optimizer)
        student_cost = costs.model_cost(student_config)
        teacher_cost = None if self.teacher is None else costs.model_cost(self.teacher_config)
        self._flops_per_token = costs.stage_cost(
            config, stage, student_cost, teacher_cost
        ).per_token
        self.log.message(f"stage {stage.name} ({stage.kind}), {stage.num_steps} steps")
        for line in freeze_table(self.student.named_parameters(), names, no_decay):
            self.log.message("  " + line)
        loader = self._loader(stage, self.progress.data_state)
        template = getattr(loader, "chat_template", None)
        if world.is_main and template is not None:
            # The export must carry the template that was trained with.
            (self.run_folder / CHAT_TEMPLATE_FILE).write_text(template, encoding="utf-8")
        return Feed(loader, world.rank, world.size, config.compute.prefetch_batches)

    def _build_student(self, index: int, student_config: ModelConfig) -> nn.Module:
        """The student at the start of a stage, on the CPU, not yet sharded."""
        config = self.config
        checkpoint = self._checkpoint if self.progress.step else None
        seed = parts.seed_for(config.seed, str(config.stages[index].name))
        torch.manual_seed(seed)
        student = parts.build_student(student_config, config.compute.kernels)
        if checkpoint is not None and self.progress.stage_step > 0:
            return student  # loaded after sharding
        before = None
        if index > 0:
            before = parts.student_config(config, self.teacher_config, self.tokenizer, index - 1)
        has_same_layers = before is not None and before.to_dict() == student_config.to_dict()
        if not has_same_layers:
            parts.initialise(config, student, self._teacher_on_cpu(), seed, index=index)
        if checkpoint is not None:
            alone = CheckpointStore(self.run_folder, config.checkpoint.keep, World())
            alone.load_student(checkpoint, student, only_common=not has_same_layers)
        return student

    def _teacher_on_cpu(self) -> Any:
        """The teacher as loaded; a second copy if the first is on a GPU or sharded."""
        teacher = self.config.teacher
        is_plain = teacher is None or self.world.size == 1 or teacher.placement == "replicate"
        if is_plain and self.world.device.type == "cpu":
            return self.teacher
        return parts.load_teacher(self.config)

    # ------------------------------------------------------------------- steps

    def _step(self, stage: StageConfig, feed: Feed) -> None:
        begin = time.perf_counter()
        batch, data_state, counts = self._next_batch(feed)
        lr = learning_rate(stage, self.progress.stage_step)
        assert self.optimizer is not None
        optimiser.set_learning_rate(self.optimizer, lr)
        sums, not_finite = self._backward(stage, batch, counts["counted"])
        sums["failed"] = float(len(not_finite))
        sums = metrics.sum_over_ranks(sums, self.world)
        if sums.pop("failed"):
            self.optimizer.zero_grad(set_to_none=True)
            self._stop_at_teacher(not_finite)
        squares = optimiser.squared_norms(self._parameters, self.world)
        norm = math.sqrt(sum(squares.values())) if metrics.is_finite(squares) else math.nan
        reason = _reason_to_skip(norm, sums, counts)
        if reason is None:
            optimiser.clip(self._parameters.values(), norm, stage.clip_norm)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._advance(stage, counts, data_state, is_skipped=reason is not None)
        elapsed = time.perf_counter() - begin
        self.progress.elapsed_s += elapsed
        record = self._record("train" if reason is None else "skip", stage)
        figures = parts.normalised(stage.kind, sums)
        record.update({key: value for key, value in figures.items() if key[-1:].isalpha()})
        # Figures per layer (alignment_3 and its trivial baseline_3) as lists.
        record.update(metrics.by_layer(figures))
        record["grad_norm"] = norm
        record["grad_norm_by_part"] = {part: math.sqrt(max(s, 0.0)) for part, s in squares.items()}
        record["lr"] = lr
        record.update(self._throughput(stage, counts, elapsed))
        self._after_step(stage, batch, record, reason)

    def _backward(
        self, stage: StageConfig, batch: PackedBatch, counted: float
    ) -> tuple[dict[str, float], list[str]]:
        """Gradients of the global batch's loss with respect to this rank's rows.

        Returns:
            sums to log, and this rank's samples for which the teacher is not finite.
        """
        sums: dict[str, float] = {}
        if counted == 0:
            return sums, []  # nothing to learn from on any rank
        with self._noting_not_finite() as not_finite:
            for part in parts.micro_batches(batch, stage.micro_batch_rows):
                with self._autocast():
                    more = self.stage.backward(part.to(self.world.device), counted)
                metrics.add_sums(sums, more)
        return sums, not_finite

    def _noting_not_finite(self) -> contextlib.AbstractContextManager[list[str]]:
        if self.teacher is None:
            return contextlib.nullcontext([])
        noting: contextlib.AbstractContextManager[list[str]] = self.teacher.noting_not_finite()
        return noting

    def _stop_at_teacher(self, not_finite: list[str]) -> None:
        """Stops all ranks, saved, if the teacher was not finite on any; all of them call it.

        All give the same message: where the first rank to end ends the others, theirs is lost.
        """
        from thinkfast_distill.teacher import not_finite_message

        samples = [sample for one in self.world.gather(not_finite) for sample in one]
        if samples:
            self._save()
            raise TrainingError(not_finite_message(samples))

    def _next_batch(self, feed: Feed) -> tuple[PackedBatch, dict[str, Any], dict[str, float]]:
        """This rank's rows, the data state after them, and counts over the global batch."""
        batch: PackedBatch | None = None
        data_state: dict[str, Any] = {}
        problem: Exception | None = None
        try:
            batch, data_state = feed.next()
        except (OSError, ValueError) as error:  # this rank must not leave the others waiting
            problem = error
        counts: dict[str, float] = {"failed": float(problem is not None), "num_targets": 0.0}
        counts["counted"] = 0.0
        counts["signal"] = float(self._signal)
        counts.update({"tokens": 0.0, "valid": 0.0})
        if batch is not None:
            counts["num_targets"] = float(batch.num_targets())
            counts["counted"] = float(self.stage.count(batch))
            counts["tokens"] = float(batch.input_ids.numel())
            counts["valid"] = float(sum(batch.source_tokens.values()))
        counts = metrics.sum_over_ranks(counts, self.world)
        if counts["failed"] or counts["signal"]:
            self._save()
        if problem is not None:
            raise problem
        if counts["failed"] or batch is None:
            raise TrainingError("another rank cannot read its data, see its message.")
        if counts["signal"]:
            raise Interrupted(self._signal or signal.SIGTERM)
        return batch, data_state, counts

    def _advance(
        self,
        stage: StageConfig,
        counts: dict[str, float],
        data_state: dict[str, Any],
        *,
        is_skipped: bool,
    ) -> None:
        progress = self.progress
        progress.step += 1
        progress.stage_step += 1
        tokens, name = int(counts["tokens"]), str(stage.name)
        progress.tokens += tokens
        progress.stage_tokens[name] = progress.stage_tokens.get(name, 0) + tokens
        progress.num_targets += int(counts["num_targets"])
        progress.data_state = data_state
        progress.skipped_steps += is_skipped
        progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if is_skipped else 0

    def _throughput(
        self, stage: StageConfig, counts: dict[str, float], elapsed: float
    ) -> dict[str, Any]:
        tokens_per_s = counts["tokens"] / elapsed
        flops_per_s = tokens_per_s * self._flops_per_token / self.world.size
        figures: dict[str, Any] = {
            "tokens_per_s": tokens_per_s,
            "mfu": flops_per_s / self._peak_flops_per_s,
            # Of all tokens: those that are no padding, and those that are targets of the loss.
            "packing_efficiency": counts["valid"] / counts["tokens"],
            "valid_token_fraction": counts["num_targets"] / counts["tokens"],
        }
        if self.world.device.type == "cuda":
            figures["peak_memory_bytes"] = torch.cuda.max_memory_allocated(self.world.device)
        else:
            figures["peak_memory_bytes"] = _peak_process_bytes()
        return figures

    def _after_step(
        self, stage: StageConfig, batch: PackedBatch, record: dict[str, Any], reason: str | None
    ) -> None:
        progress, config = self.progress, self.config
        sources = self.world.gather(batch.source_tokens)
        for tokens in sources:
            for source, count in tokens.items():
                progress.source_tokens[source] = progress.source_tokens.get(source, 0) + count
        record["source_tokens"] = dict(progress.source_tokens)
        if reason is not None:
            record["reason"] = reason
            samples = self.world.gather(batch.sample_ids)
            record["sample_ids"] = [row for rows in samples for row in rows]
            self.log.write(record)
            self.log.message(f"step {progress.step}: {reason}, step skipped")
            if progress.skipped_in_a_row >= config.compute.max_skipped_steps:
                raise TrainingError(skipped_message(progress, reason, record["sample_ids"]))
        elif progress.step % config.logging.every_steps == 0:
            self.log.write(record)
        self.log.progress(
            progress_text(stage, progress, record), is_last=progress.stage_step == stage.num_steps
        )
        if progress.stage_step % config.evaluation.every_steps == 0:
            progress.is_evaluation_due = True  # after a resume too, should it fail
            self._evaluate(stage)
        is_end = progress.stage_step == stage.num_steps
        if progress.stage_step % config.checkpoint.every_steps == 0 and not is_end:
            self._save()
        if self._on_step is not None:
            self._on_step(progress)

    # ------------------------------------------------------- saving, measuring

    def _save(self) -> None:
        """Saves unless this very state is saved already, or no step is done.

        A checkpoint without a step would be worth nothing, and hold the run to this recipe.
        """
        is_border = self.optimizer is None
        is_saved = self.progress.step == self._saved_step and not is_border
        if is_saved or self.progress.step == 0:
            return
        folder = self.store.save(self.config, self.progress, self.student, self.optimizer)
        self._saved_step = self.progress.step
        if is_border:
            self._checkpoint = read_checkpoint(folder)

    def _evaluate(self, stage: StageConfig) -> None:
        """Measures the student on the held-out batches."""
        with self._autocast(), self._noting_not_finite() as not_finite:
            found = self.evaluation.run(stage, self.student, self.stage)
        self._stop_at_teacher(not_finite)
        self.progress.is_evaluation_due = False
        if not found:
            return
        name = str(stage.name)
        if self.progress.stage_step == 0:
            self.progress.first_metrics[name] = found
        self.progress.last_metrics[name] = found
        self.log.write({**self._record("eval", stage), **found})
        shown = [key for key in SHOWN if key in found]
        self.log.message(
            f"held out, {name} step {self.progress.stage_step}: "
            + ", ".join(f"{key} {found[key]:.4g}" for key in shown)
        )

    def _log_data(self, stage: StageConfig, feed: Feed) -> None:
        """Records what a finished stage read of each source, and what was left out and why."""
        assert self.progress.data_state is not None
        found = feed.report(self.progress.data_state)
        self.log.write({**self._record("data", stage), "data": found})
        for source in found["sources"]:
            dropped = {reason: count for reason, count in source["dropped"].items() if count}
            if dropped:
                reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
                self.log.message(f"source {source['name']}: documents left out: {reasons}")

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.config.compute.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.world.device.type, dtype=torch.bfloat16)

    def _record(self, event: str, stage: StageConfig) -> dict[str, Any]:
        return {
            "event": event,
            "step": self.progress.step,
            "stage": stage.name,
            "stage_index": self.progress.stage,
            "stage_step": self.progress.stage_step,
            "tokens": self.progress.tokens,
        }

    # ------------------------------------------------------------------ set-up

    def _check_rows(self) -> None:
        for i, stage in enumerate(self.config.stages):
            if stage.batch_rows % self.world.size:
                raise recipe.RecipeError(
                    f"stages.{i}.batch_tokens: {stage.batch_tokens} are {stage.batch_rows} rows of "
                    f"{stage.seq_len} tokens, which {self.world.size} ranks cannot share evenly; "
                    "use a multiple."
                )
        rows = self.config.evaluation.batch_rows
        if self.config.evaluation.data is not None and rows % self.world.size:
            raise recipe.RecipeError(
                f"evaluation.batch_rows: {rows} must be a multiple of the {self.world.size} ranks."
            )

    def _check_kernels(self) -> None:
        """Finds a kernel package that is not installed before the teacher is loaded.

        Raises:
            ImportError: with the install line.
            ValueError: the package does not have a student's recurrence.
        """
        for i in range(self.progress.stage, len(self.config.stages)):
            sizes = parts.student_config(self.config, self.teacher_config, self.tokenizer, i)
            with torch.device("meta"):
                parts.build_student(sizes, self.config.compute.kernels)

    def _check_later_stages(self) -> None:
        """Finds what would stop a later stage now, and not after hours of training."""
        checked = {self.config.stages[self.progress.stage].data}
        for i in range(self.progress.stage, len(self.config.stages)):
            stage = self.config.stages[i]
            sizes = parts.student_config(self.config, self.teacher_config, self.tokenizer, i)
            parts.stage_without_weights(self.config, i, sizes, self.teacher)
            if stage.data not in checked:
                checked.add(stage.data)
                self._loader(stage, state=None)

    def _loader(self, stage: StageConfig, state: dict[str, Any] | None) -> Any:
        return parts.loader(
            self.config,
            self.tokenizer,
            data=stage.data,
            seq_len=stage.seq_len,
            batch_rows=stage.batch_rows,
            purpose=str(stage.name),
            state=state,
        )

    def _open_log(self) -> run_log.RunLog:
        config, run = self.config, self.run_folder
        tracker = None
        if self.world.is_main:
            progress = self.progress
            at = (-1, 0) if progress.step == 0 else (progress.stage, progress.stage_step)
            if progress.step and progress.stage_step == 0:
                # At a border: the next stage's measurements before its first step come again.
                at = (progress.stage - 1, config.stages[progress.stage - 1].num_steps)
            run_log.truncate_log(run / run_log.LOG_FILE, *at)
            resolved = recipe.to_yaml(config)
            (run / CONFIG_FILE).write_text(resolved, encoding="utf-8")
            tracker = run_log.open_tracker(config.logging, run, config.name, recipe.to_dict(config))
        log = run_log.RunLog(
            run,
            is_main=self.world.is_main,
            tracker=tracker,
            stream=run_log.standard_error() if self._show_progress else None,
        )
        log.write(
            {
                "event": "session",
                "step": self.progress.step,
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "command": sys.argv,
                "hardware": _hardware(self.world),
                "rounding": rounding(recipe.to_dict(config)),
                "rounding_before": {key: then for key, (then, _) in self._other_rounding.items()},
                **environment(),
            }
        )
        if self.progress.step:
            log.message(f"continuing after step {self.progress.step}")
        for line in rounding_lines(self._other_rounding):
            log.message(line)
        return log

    def _peak(self) -> float:
        stated = self.config.logging.peak_flops_per_s
        if stated is not None:
            return stated
        return costs.peak_flops_per_s(self.world.device, self.config.compute.precision)[0]

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Lets SIGTERM and SIGINT end the run after the current step."""

        def note(signum: int, frame: Any) -> None:
            self._signal = signum

        before = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)


def _reason_to_skip(norm: float, sums: dict[str, float], counts: dict[str, float]) -> str | None:
    """Why a step must not update anything; None if it may."""
    if counts["counted"] == 0:
        return "nothing in the batch counts for the loss"
    if not (math.isfinite(norm) and metrics.is_finite(sums)):
        return "loss or gradient not finite"
    return None


def _lock(run: Path) -> int:
    """Takes the run folder for this process; the system frees it when the process ends."""
    import fcntl

    descriptor = os.open(run / _LOCK_FILE, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise recipe.RecipeError(
            f"{run}: another process trains in this folder; wait for it or choose another "
            "--run-dir."
        ) from error
    return descriptor


def _hardware(world: World) -> dict[str, Any]:
    if world.device.type == "cuda":
        name = torch.cuda.get_device_name(world.device)
    else:
        name = f"cpu, {torch.get_num_threads()} threads"
    return {"device": name, "num_ranks": world.size, "host": socket.gethostname()}


def _peak_process_bytes() -> int:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
