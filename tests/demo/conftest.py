"""Stored results of a made-up run."""

from pathlib import Path
from typing import Any

import pytest

from demo.report import build_results
from demo.settings import Contender


def contender(name: str) -> Contender:
    return Contender(name, f"{name} model", Path("/nowhere"), f"id-{name}", "2 of 4")


@pytest.fixture
def contenders() -> list[Contender]:
    return [contender("teacher"), contender("student")]


def passk_result(pass_1: float) -> dict[str, Any]:
    metrics = {
        "pass@1": pass_1,
        "pass@1_stderr": 0.0123,
        "pass@4": min(1.0, 3 * pass_1),
        "pass@4_stderr": 0.0456,
        "truncated": 0.25,
        "no_answer": 0.125,
        "boxed": 0.0625,
        "n_distinct": 1.0,
        "gen_tokens": 77.7,
    }
    return {
        "metrics": metrics,
        "per_problem": [{"pass@1": pass_1}] * 3,
        "wall_s": 12.3,
        "engine_start_s": 4.5,
        "peak_memory_bytes": {"process": 3 * 2**29},
        "samples": [{"question": "q", "samples": ["a"]}],
    }


def speed_round(teacher: float, student: float) -> dict[str, Any]:
    return {
        name: {
            "decode_tokens_per_s": speed,
            "prefill_tokens_per_s": 1000.0 + 500 * (name == "student"),
        }
        for name, speed in (("teacher", teacher), ("student", student))
    }


@pytest.fixture
def results(contenders: list[Contender]) -> dict[str, Any]:
    measured = {
        "passk": {"teacher": passk_result(0.2), "student": passk_result(0.0)},
        # the machine slows down by half: the ratio of each round stays what it is
        "speed": {"rounds": [speed_round(100, 150), speed_round(50, 80), speed_round(90, 108)]},
    }
    settings = {
        "num_samples": 4,
        "max_tokens": 160,
        "temperature": 0.5,
        "max_num_seqs": 8,
        "speed_sequences": 8,
        "speed_tokens": 32,
    }
    return build_results(contenders, measured, {"settings": settings, "git_commit": "abc"})
