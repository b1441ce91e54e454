"""The paper's data (arXiv 2502.20339), as sources that recipes take by name (``preset: NAME``).

8 billion tokens: 4 of FineMath-4+ (raw web pages) and 4 of OpenMathInstruct-2 (problems with
solutions by Llama-3.1-405B). Its ablation takes OpenHermes-2.5 in place of OpenMathInstruct-2.
Field names and sizes are those of the data sets' cards; revisions are left open, so give
``revision`` for a run worth repeating.
"""

from collections.abc import Mapping
from typing import Any

from thinkfast_distill.recipe import RecipeError

SOURCES: dict[str, dict[str, Any]] = {
    # 6.7 million pages, 9.6 billion tokens, ODC-BY.
    "finemath-4plus": {
        "kind": "hub",
        "name": "finemath-4plus",
        "dataset": "HuggingFaceTB/finemath",
        "config": "finemath-4plus",
        "layout": "text",
        "text_field": "text",
    },
    # 14 million rows on some 600,000 problems of the GSM8K and MATH training sets.
    "openmathinstruct-2": {
        "kind": "hub",
        "name": "openmathinstruct-2",
        "dataset": "nvidia/OpenMathInstruct-2",
        "layout": "prompt",
        "prompt_field": "problem",
        "completion_field": "generated_solution",
    },
    # One million general conversations, in ShareGPT's field names.
    "openhermes-2.5": {
        "kind": "hub",
        "name": "openhermes-2.5",
        "dataset": "teknium/OpenHermes-2.5",
        "layout": "chat",
        "messages_field": "conversations",
    },
}


def expand(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The keys of a source, with those of its preset; sources without one stay as they are.

    Args:
        raw: a source of a recipe.
        where: its place, for messages.

    Raises:
        RecipeError: no preset of that name, or a kind beside it.
    """
    if "preset" not in raw:
        return dict(raw)
    name = raw["preset"]
    if name not in SOURCES:
        raise RecipeError(
            f"{where}.preset: {name!r} is not accepted; accepted: {', '.join(SOURCES)}."
        )
    if "kind" in raw:
        raise RecipeError(f"{where}.kind: {raw['kind']!r}: give preset or kind, not both.")
    return SOURCES[name] | {key: value for key, value in raw.items() if key != "preset"}
