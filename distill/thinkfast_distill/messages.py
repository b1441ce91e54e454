"""The lines that a run shows about its course."""

from collections.abc import Mapping
from typing import Any

from thinkfast_distill import run_log
from thinkfast_distill.checkpoint import Progress
from thinkfast_distill.config import StageConfig
from thinkfast_distill.recipe import NEW_RUN

SHOWN = (
    "loss",
    "reverse_kl",
    "forward_kl",
    "cross_entropy",
    "teacher_cross_entropy",
    "top1_agreement",
    "top1_accuracy",
    "step_balanced_accuracy",
    "step_f1",
    "hidden_state_loss",
    "hidden_state_baseline",
    "matrix_mixing_loss",
    "matrix_mixing_baseline",
)
"""Held-out figures that a line shows, where the stage has them."""

_LIVE = ("loss", "baseline", "top1_agreement", "top1_accuracy")


def progress_text(stage: StageConfig, progress: Progress, record: Mapping[str, Any]) -> str:
    """The live line after a step, of the step's log record."""
    done, total = progress.stage_step, stage.num_steps
    tokens_per_s = record["tokens_per_s"]
    left_s = (total - done) * stage.batch_tokens / tokens_per_s
    shown = [f"{key} {record[key]:.4g}" for key in _LIVE if key in record]
    return " | ".join(
        [
            f"{stage.name} {done}/{total}",
            *shown,
            f"lr {record['lr']:.2e}",
            f"{tokens_per_s:,.0f} tok/s",
            f"MFU {record['mfu']:.1%}",
            f"{run_log.duration(left_s)} left",
        ]
    )


def skipped_message(progress: Progress, reason: str, sample_ids: list[list[str]]) -> str:
    """Why the run stops after steps without an update; ``sample_ids`` per row of the last one."""
    listed = [sample for row in sample_ids for sample in row]
    more = f" and {len(listed) - 12} more" if len(listed) > 12 else ""
    return (
        f"step {progress.step}: {progress.skipped_in_a_row} steps in a row were skipped, the last "
        f"because: {reason}; samples of the last one: {', '.join(listed[:12])}{more}. The last "
        "checkpoint is from before; look at these samples. With more compute.max_skipped_steps the "
        f"same command continues; a lower learning rate, or other data, needs {NEW_RUN}."
    )


def rounding_lines(changed: Mapping[str, tuple[str, str]]) -> list[str]:
    """One line per key with which the run goes on otherwise, see `checkpoint.other_rounding`."""
    return [
        f"{key}: {before} before, {now} now; the curve goes on with other rounding"
        for key, (before, now) in changed.items()
    ]
