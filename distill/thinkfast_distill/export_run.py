"""``thinkfast-distill export``: the newest checkpoint of a run as a served model folder.

The model card is made from the run's own records: what was trained on, for how long, the held-out
figures at the start and after each stage, and each stage's own loss before and after it. A run
without held-out data has the losses of its first and last training steps instead.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch

from thinkfast_distill import model_card, parts
from thinkfast_distill.checkpoint import Checkpoint, CheckpointStore
from thinkfast_distill.config import RunConfig
from thinkfast_distill.distributed import World
from thinkfast_distill.export import export
from thinkfast_distill.loop import CHAT_TEMPLATE_FILE
from thinkfast_distill.recipe import RecipeError
from thinkfast_distill.run_log import LOG_FILE, read_log
from thinkfast_distill.status import read_run_config

_CARD_METRICS = (
    "reverse_kl",
    "forward_kl",
    "top1_agreement",
    "cross_entropy",
    "teacher_cross_entropy",
    "step_accuracy",
    "step_recall_right",
    "step_recall_wrong",
    "step_balanced_accuracy",
    "step_no_error_found",
    "step_first_error_found",
    "step_f1",
)
_REWARD_MODEL = """\
A process reward model: it scores the steps of a solution, with RLHFlow's protocol
(https://github.com/RLHFlow/RLHF-Reward-Modeling, `math-rm`).

* Input: a conversation rendered with this folder's chat template, without a system turn. The first
  user turn is the question, a space and the first step, every other user turn the next step; every
  assistant turn is `+`, whatever its score.
* Score of a step: softmax over the logits of the tokens `+` and `-` at the position that predicts
  the assistant's token; the probability of `+`.
* Labels: a step is wrong if it or a step before it is.
* Metrics `step_*` are on held-out solutions at a threshold of 0.5: `recall` of single labels and
  their mean `balanced_accuracy`; `first_error_found` is the part of wrong solutions whose first
  wrong step is found exactly, `no_error_found` that of right solutions without a false alarm, `f1`
  their harmonic mean (ProcessBench)."""
_ARITH_STEPS = """\
* Steps: the lines of a solution, with the answer line `#### <number>`; `"\\n"` separates them."""


def export_run(run: Path, out: Path) -> Path:
    """Exports the newest checkpoint of a run.

    Args:
        run: the run folder; the run may still be going on.
        out: the folder to write.

    Returns:
        the folder.

    Raises:
        RecipeError: no run folder, or nothing was saved yet.
        ExportError: the folder cannot be written.
    """
    config = read_run_config(run)
    store = CheckpointStore(run, config.checkpoint.keep, World())
    checkpoint = store.latest()
    if checkpoint is None:
        raise RecipeError(f"{run}: no checkpoint yet; the run has to save one first.")
    index = min(checkpoint.progress.stage, len(config.stages) - 1)
    if checkpoint.progress.stage_step == 0 and checkpoint.progress.stage > 0:
        index = checkpoint.progress.stage - 1  # the next stage may have other layers
    teacher_config = parts.teacher_config(config)
    tokenizer = parts.tokenizer(config)
    student_config = parts.student_config(config, teacher_config, tokenizer, index)
    student = parts.build_student(student_config)
    store.load_student(checkpoint, student)
    template = run / CHAT_TEMPLATE_FILE
    with tempfile.TemporaryDirectory() as made:
        folder = parts.tokenizer_folder(config)
        if folder is None:
            folder = Path(made)
            tokenizer.save_pretrained(folder)
        return export(
            student,
            student_config,
            folder,
            out,
            card=_card(config, checkpoint, run),
            dtype=getattr(torch, config.export.dtype),
            chat_template=template.read_text(encoding="utf-8") if template.is_file() else None,
            gguf_file=parts.tokenizer_gguf_file(config),
        )


def _card(config: RunConfig, checkpoint: Checkpoint, run: Path) -> dict[str, Any]:
    """Facts for the model card; what is not known is left out."""
    progress = checkpoint.progress
    records = read_log(run / LOG_FILE)
    stages: list[dict[str, Any]] = []
    for i, stage in enumerate(config.stages[: progress.stage + 1]):
        name = str(stage.name)
        if name not in progress.stage_tokens:
            continue
        steps = progress.stage_step if i == progress.stage else stage.num_steps
        before = progress.first_metrics.get(name, {})
        found = progress.last_metrics.get(name, {})
        figures = {**_own_loss(stage.kind, before, found), **_whole_model(found)}
        if not stages and before:
            start = {"name": "start", "kind": "", "tokens": 0, "steps": 0}
            stages.append({**start, "metrics": _whole_model(before)})
        stages.append(
            {
                "name": name,
                "kind": stage.kind,
                "tokens": progress.stage_tokens[name],
                "steps": steps,
                "metrics": figures or _training_losses(records, i, steps),
            }
        )
    sessions = [r for r in records if r["event"] == "session"]
    facts: dict[str, Any] = {
        "name": config.export.name or config.name,
        "license": config.export.license,
        "teacher": None if config.teacher is None else config.teacher.model,
        "kind": config.student.kind,
        "notes": _notes(config),
        "data": progress.source_tokens,
        "stages": stages,
        "evaluation": _whole_model(progress.last_metrics.get(stages[-1]["name"], {}))
        if stages
        else None,
        "seed": config.seed,
        "command": _command(sessions[0]["command"]) if sessions else None,
        # That of the code that ran: the checkout may have moved on while it did.
        "commit": ", ".join(dict.fromkeys(s["git_commit"] for s in sessions if s["git_commit"])),
        "environment": {
            key: value
            for key, value in checkpoint.environment.items()
            if key != "git_commit" and value is not None
        },
    }
    return {key: value for key, value in facts.items() if value not in (None, {}, [])}


def _own_loss(kind: str, before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """The stage's own held-out objective before and after it, and its trivial baseline.

    Where a stage is measured end to end too, its own figures are named ``<kind>_...``
    (``evaluation.Evaluation``).
    """
    prefix = f"{kind}_" if f"{kind}_loss" in after else ""
    figures = {
        "loss before": before.get(f"{prefix}loss"),
        "loss": after.get(f"{prefix}loss"),
        "baseline": after.get(f"{prefix}baseline"),
    }
    return {key: value for key, value in figures.items() if value is not None}


def _training_losses(records: list[dict[str, Any]], index: int, steps: int) -> dict[str, float]:
    """Losses of the first and the last training step that a stage's log has up to ``steps``."""
    found = [
        r["loss"]
        for r in records
        if r["event"] == "train"
        and r["stage_index"] == index
        and r["stage_step"] <= steps
        and isinstance(r.get("loss"), float)
    ]
    if not found:
        return {}
    first, last = model_card.TRAINING_LOSSES
    return {first: found[0], last: found[-1]}


def _whole_model(found: dict[str, float]) -> dict[str, float]:
    """Figures that mean the same in every stage."""
    return {key: found[key] for key in _CARD_METRICS if key in found}


def _notes(config: RunConfig) -> str | None:
    """What a user of the model must know and cannot see from the files."""
    if not parts.is_reward_model(config):
        return None
    sources = config.data[config.stages[-1].data].sources
    is_arith = all(source["kind"] == "arith" for source in sources)
    return "\n".join([_REWARD_MODEL, *([_ARITH_STEPS] if is_arith else [])])


def _command(words: list[str]) -> str:
    """The command; of absolute paths, which say nothing on another machine, the name alone."""
    program, *rest = words
    rest = [_without_folder(word) for word in rest]
    is_module = program.endswith(".py")
    return " ".join(["thinkfast-distill" if is_module else Path(program).name, *rest])


def _without_folder(word: str) -> str:
    """A word of a command; ``/a/b`` becomes ``b``, also after ``key=``."""
    key, separator, value = word.rpartition("=")
    return key + separator + Path(value).name if Path(value).is_absolute() else word
