"""Held-out measurements: always the same batches, so that the numbers of a run are one curve.

Every stage is measured by its own objective and, where there is a teacher, end to end: KL both
ways, cross entropies, top-1 agreement. So it shows what each stage pays for the whole model. On
held-out step labels, a process reward model is also measured as such, see `step_metrics`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from thinkfast_distill import metrics, parts, step_metrics
from thinkfast_distill.config import RunConfig, StageConfig
from thinkfast_distill.distributed import World

if TYPE_CHECKING:
    from thinkfast_distill.batch import PackedBatch


class Evaluation:
    """The held-out batches of a run and how they are measured."""

    def __init__(self, config: RunConfig, world: World, tokenizer: Any, teacher: Any) -> None:
        """Prepares the batches, so that bad data is found before the first step.

        Args:
            config: the run; without ``evaluation.data`` every measurement is empty.
            world: the ranks that share the rows.
            tokenizer: for the data.
            teacher: the frozen model, or None.

        Raises:
            DataError: the held-out data cannot be used.
        """
        self._config, self._world = config, world
        self._tokenizer, self._teacher = tokenizer, teacher
        self._batches = [] if config.evaluation.data is None else self._read()

    def run(self, stage: StageConfig, student: nn.Module, objective: Any) -> dict[str, float]:
        """Measures a student; all ranks call it together.

        Args:
            stage: the current stage.
            student: the student as it is, sharded or not.
            objective: the stage's objective for this student.

        Returns:
            metrics per target token (and per layer), equal on all ranks; empty without held-out
            data.
        """
        if self._config.evaluation.data is None:
            return {}
        measured = [(stage.kind, objective)]
        if self._teacher is not None and stage.kind != "end_to_end":
            measured.append(
                ("end_to_end", parts.end_to_end_objective(stage, student, self._teacher))
            )
        found: dict[str, float] = {}
        was_training = student.training
        student.eval()
        try:
            with torch.no_grad():
                for kind, one in measured:
                    sums: dict[str, float] = {}
                    for batch in self._held_out(stage.micro_batch_rows):
                        metrics.add_sums(sums, one.evaluate(batch.to(self._world.device)))
                    figures = parts.normalised(kind, metrics.sum_over_ranks(sums, self._world))
                    # Several objectives have a "loss"; the plain names are end to end.
                    prefix = f"{kind}_" if len(measured) > 1 and one is objective else ""
                    whole = {key: value for key, value in figures.items() if key[-1:].isalpha()}
                    found.update({prefix + key: value for key, value in whole.items()})
                if parts.counts_step_labels(self._config, self._config.evaluation.data):
                    found.update(self._step_figures(student, stage.micro_batch_rows))
        finally:
            student.train(was_training)
        return found

    def _step_figures(self, student: Any, rows: int | None) -> dict[str, float]:
        good_id, bad_id = step_metrics.label_ids(self._tokenizer)
        sums: dict[str, float] = {}
        for held_out in self._held_out(rows):
            batch = held_out.to(self._world.device)
            hidden, head = student.hidden(batch), student.head_weight()
            metrics.add_sums(sums, step_metrics.step_sums(hidden, head, batch, good_id, bad_id))
        return step_metrics.step_figures(metrics.sum_over_ranks(sums, self._world))

    def _held_out(self, rows: int | None) -> Iterator[PackedBatch]:
        """The batches, cut as the stage cuts its own: what fits in training must fit here."""
        for batch in self._batches:
            yield from parts.micro_batches(batch, rows)

    def _read(self) -> list[PackedBatch]:
        settings = self._config.evaluation
        loader = parts.loader(
            self._config,
            self._tokenizer,
            data=str(settings.data),
            seq_len=settings.seq_len,
            batch_rows=settings.batch_rows,
            purpose="evaluation",
            state=None,
        )
        return [
            loader.next(self._world.rank, self._world.size) for _ in range(settings.num_batches)
        ]
