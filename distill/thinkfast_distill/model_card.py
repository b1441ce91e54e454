"""The model card of an exported student, generated from the run: facts only.

A fact that is not known is left out; nothing is filled in.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

KEYS: dict[str, str] = {
    "name": "title of the card",
    "license": "licence of the weights",
    "teacher": "folder or hub name of the teacher",
    "kind": "llamba, mambainllama or llama",
    "data": "source -> tokens that were trained on",
    "stages": "list of objects: name, kind, tokens, steps, and metrics (name -> value)",
    "evaluation": "metric -> value, measured after the last stage",
    "seed": "of weights and data order",
    "command": "what was run",
    "commit": "of the repository",
    "environment": "package or hardware -> version",
    "notes": "free text",
    "num_parameters": "set by export",
    "dtype": "set by export",
}
"""What a card may hold."""

_STAGE_KEYS = ("name", "kind", "tokens", "steps", "metrics")


_COLUMNS = """\
Measured on held-out text. `loss` is the stage's own objective, `baseline` what a student that
learned nothing has there; all other figures are of the whole model."""

TRAINING_LOSSES = ("first training loss", "last training loss")
"""Metrics of a stage of a run without held-out text."""

_TRAINING_COLUMNS = """\
Nothing was measured on held-out text. The losses are the stage's own objective on the text of its
first and its last logged training step."""


def check(card: Mapping[str, Any]) -> None:
    """Raises ValueError if the card has unknown facts or facts of the wrong form."""
    unknown = sorted(set(card) - set(KEYS))
    if unknown:
        raise ValueError(f"card: unknown {', '.join(unknown)}; accepted: {', '.join(KEYS)}.")
    for key in ("data", "evaluation", "environment"):
        if not isinstance(card.get(key) or {}, Mapping):
            raise ValueError(f"card: {key}={card[key]!r} must be an object: {KEYS[key]}.")
    stages = card.get("stages") or []
    is_list = isinstance(stages, Sequence) and not isinstance(stages, str)
    for stage in stages if is_list else [stages]:
        if not isinstance(stage, Mapping) or set(stage) - set(_STAGE_KEYS):
            raise ValueError(
                f"card: stages: {stage!r} must be an object with some of {', '.join(_STAGE_KEYS)}."
            )
    try:
        json.dumps(dict(card), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"card: cannot be written as JSON: {error}.") from error


def render(card: Mapping[str, Any], *, architecture: str) -> str:
    """The card as Markdown with Hugging Face's header.

    Args:
        card: see ``KEYS``.
        architecture: vLLM's name of the model class.
    """
    name = card.get("name") or "student"
    is_student = architecture != "LlamaForCausalLM"
    lines = ["---"]
    if card.get("license"):
        lines.append(f"license: {card['license']}")
    teacher = card.get("teacher")
    if teacher and _is_hub_name(teacher):
        lines.append(f"base_model: {teacher}")
    lines += ["pipeline_tag: text-generation", "tags:"]
    lines += [f"- {tag}" for tag in (["distillation", "mamba", "vllm"] if is_student else ["vllm"])]
    lines += ["---", "", f"# {name}", ""]
    size = f"{card['num_parameters']:,} parameters" if "num_parameters" in card else "a model"
    origin = f", distilled from `{teacher}`" if teacher else ""
    lines += [f"{architecture} with {size}{origin}.", ""]
    if card.get("notes"):
        lines += [str(card["notes"]).strip(), ""]
    lines += ["## Serve", ""]
    if is_student:
        lines += ["With the plugin `vllm-thinkfast` installed beside vLLM:", ""]
    lines.append("```console")
    lines += ["$ vllm serve ./" + _file_name(name), "```", ""]
    if card.get("stages"):
        names = {name for stage in card["stages"] for name in stage.get("metrics") or {}}
        columns = _TRAINING_COLUMNS if names.intersection(TRAINING_LOSSES) else _COLUMNS
        lines += ["## Training", "", *_stages(card["stages"]), "", columns, ""]
    if card.get("data"):
        total = sum(card["data"].values()) or 1
        lines += ["| source | tokens | share |", "| --- | ---: | ---: |"]
        lines += [
            f"| {_cell(source)} | {tokens:,} | {tokens / total:.1%} |"
            for source, tokens in card["data"].items()
        ]
        lines.append("")
    if card.get("evaluation"):
        lines += ["## Evaluation", "", "| metric | value |", "| --- | ---: |"]
        lines += [f"| {_cell(k)} | {_number(v)} |" for k, v in card["evaluation"].items()]
        lines.append("")
    lines += _reproduction(card)
    return "\n".join(lines).rstrip() + "\n"


def _stages(stages: Sequence[Mapping[str, Any]]) -> list[str]:
    # In the order of the stage that has most of them.
    longest_first = sorted(stages, key=lambda stage: -len(stage.get("metrics") or {}))
    metrics = list(dict.fromkeys(m for stage in longest_first for m in stage.get("metrics") or {}))
    head = ["stage", "kind", "tokens", "steps", *metrics]
    lines = ["| " + " | ".join(head) + " |", "| --- | --- |" + " ---: |" * (len(head) - 2)]
    for stage in stages:
        values = stage.get("metrics") or {}
        cells = [_cell(stage.get("name", "")), _cell(stage.get("kind", ""))]
        cells += [_number(stage.get(key)) for key in ("tokens", "steps")]
        cells += [_number(values.get(metric)) for metric in metrics]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _reproduction(card: Mapping[str, Any]) -> list[str]:
    facts = [(key, card[key]) for key in ("commit", "seed", "dtype") if card.get(key) is not None]
    facts += list((card.get("environment") or {}).items())
    if not facts and not card.get("command"):
        return []
    lines = ["## Reproduce", ""]
    if card.get("command"):
        lines += ["```console", f"$ {card['command']}", "```", ""]
    return [*lines, *(f"* {key}: {value}" for key, value in facts), ""]


def _number(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return _cell(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _is_hub_name(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and " " not in name


def _file_name(name: str) -> str:
    return name.rsplit("/", 1)[-1].replace(" ", "-")
