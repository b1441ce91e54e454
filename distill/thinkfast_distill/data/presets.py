"""The paper's data (arXiv 2502.20339), as sources and mixtures for recipes.

8 billion tokens: 4 of FineMath-4+ (raw web pages) and 4 of OpenMathInstruct-2 (problems with
solutions by Llama-3.1-405B). Its ablation takes OpenHermes-2.5 in place of OpenMathInstruct-2.
Field names and sizes are those of the data sets' cards; revisions are left open, so give
``revision`` for a run worth repeating.
"""

from typing import Any

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

_BILLION = 1_000_000_000

MIXTURES: dict[str, list[dict[str, Any]]] = {
    "paper": [
        SOURCES["finemath-4plus"] | {"tokens": 4 * _BILLION},
        SOURCES["openmathinstruct-2"] | {"tokens": 4 * _BILLION},
    ],
    # OpenHermes-2.5 is smaller than its budget, so it is read several times.
    "openhermes-ablation": [
        SOURCES["finemath-4plus"] | {"tokens": 4 * _BILLION},
        SOURCES["openhermes-2.5"] | {"tokens": 4 * _BILLION, "epochs": None},
    ],
}
