"""Damaged checkpoint folders: a clear error or a correct load, nothing else.

``corpus`` has the cases, ``child`` runs them in a process that may die, ``oracle`` judges what was
loaded. To run all cases, not only every second one:
``THINKFAST_FUZZ_STEP=1 pytest tests/vllm_thinkfast/trust/test_fuzz.py``.
"""

import collections
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.vllm_thinkfast.trust import corpus, oracle
from vllm_thinkfast.checkpoints.config_reader import read_config
from vllm_thinkfast.checkpoints.folder import read_folder
from vllm_thinkfast.checkpoints.reader import house_tensors

ROOT = Path(__file__).parents[3]
STEP = int(os.environ.get("THINKFAST_FUZZ_STEP", "2"))
"""One of so many cases is run."""
FEWEST_CASES = 2000
MOST_DEATHS = 5
"""Then the rest is not run: something is broken that every case meets."""


@dataclass
class Survey:
    """What became of the cases."""

    results: list[tuple[str, str, str, str | None]] = field(default_factory=list)
    """(base, what was done, outcome, complaint or None)"""
    deaths: list[str] = field(default_factory=list)
    """Cases at which the process ended: a crash, a hang, memory."""


def survey(command: Sequence[str], folder: Path, step: int = 1) -> Survey:
    """Runs children until all cases are done; a child that dies is followed by another.

    Args:
        command: starts a child; ``--first N`` is added.
        folder: its working directory.
        step: between the numbers of two cases.
    """
    found, first = Survey(), 0
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    while len(found.deaths) < MOST_DEATHS:
        child = subprocess.run(
            [*command, "--first", str(first)],
            cwd=folder,
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        lines = child.stdout.splitlines()
        found.results += [tuple(json.loads(line)) for line in lines if line.startswith("[")]
        if lines[-1:] == ["end"] and child.returncode == 0:
            return found
        started = [int(line) for line in lines if line.isdigit()]
        end = child.stderr[-2000:]
        found.deaths.append(f"case {started[-1:]}: exit code {child.returncode}\n{end}")
        if not started:
            return found
        first = started[-1] + step
    return found


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bases")
    corpus.write_bases(root)
    return root


@pytest.mark.slow
def test_damaged_folders(bases: Path, tmp_path: Path) -> None:
    """No crash, no hang, no code run, no unclear error, no wrong model; and all of it was tried."""
    child = [sys.executable, "-m", "tests.vllm_thinkfast.trust.child", str(bases)]
    found = survey([*child, "--step", str(STEP)], tmp_path, STEP)
    assert not found.deaths, "\n".join(found.deaths)
    wrong = [
        f"{base}: {what}: {complaint}" for base, what, _, complaint in found.results if complaint
    ]
    assert not wrong, f"{len(wrong)} of {len(found.results)} cases\n" + "\n".join(wrong[:20])
    assert len(found.results) >= FEWEST_CASES
    outcomes = collections.Counter((base, outcome) for base, _, outcome, _ in found.results)
    for base in (*corpus.FORMAT_OF, *(f"{name}-hf" for name in corpus.CONVERTED)):
        # A harness that refuses everything, or loads everything, would find nothing.
        assert outcomes[base, "refused"] >= 80, (base, outcomes)
        assert outcomes[base, "loaded"] >= 25, (base, outcomes)
    files = collections.Counter(what.partition(":")[0] for _, what, _, _ in found.results)
    assert files.keys() == {
        "config.json",
        "mamba_config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
    }


def test_bases_are_valid(bases: Path) -> None:
    """What the damage is done to loads, and the judge agrees."""
    for folder in sorted(bases.iterdir()):
        config = read_config(folder)
        tensors = dict(house_tensors(config, read_folder(folder), source=str(folder)))
        assert oracle.complaints(folder, config, tensors) == []


def _other_field(config: Any, tensors: oracle.Tensors) -> None:
    config.conv_kernel += 1


def _other_value(config: Any, tensors: oracle.Tensors) -> None:
    name = sorted(tensors)[3]
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[0] += 1


def _other_precision(config: Any, tensors: oracle.Tensors) -> None:
    name = sorted(tensors)[3]
    tensors[name] = tensors[name].to(torch.float64)


def _lost_tensor(config: Any, tensors: oracle.Tensors) -> None:
    tensors.pop("model.norm.weight")


@pytest.mark.parametrize("spoil", [_other_field, _other_value, _other_precision, _lost_tensor])
def test_judge_notices(bases: Path, spoil: Callable[[Any, oracle.Tensors], None]) -> None:
    """A model that differs from its files in one place is found, in every format."""
    for folder in sorted(bases.iterdir()):
        config = read_config(folder)
        tensors = dict(house_tensors(config, read_folder(folder), source=str(folder)))
        spoil(config, tensors)
        assert len(oracle.complaints(folder, config, tensors)) == 1, folder.name


_DYING_CHILD = """
import faulthandler, json, os, sys, time
for number in range(int(sys.argv[-1]), 6):
    print(number, flush=True)
    faulthandler.dump_traceback_later(1, exit=True)
    if number == 1:
        os.abort()
    if number == 3:
        time.sleep(60)
    print(json.dumps(["base", "case %d" % number, "refused", None]), flush=True)
    faulthandler.cancel_dump_traceback_later()
print("end", flush=True)
"""


def test_survey_survives_its_children(tmp_path: Path) -> None:
    """A crash and a hang are reported with their case, and the cases after them are run."""
    found = survey([sys.executable, "-c", _DYING_CHILD], tmp_path)
    assert [what for _, what, _, _ in found.results] == ["case 0", "case 2", "case 4", "case 5"]
    assert [death.partition(":")[0] for death in found.deaths] == ["case [1]", "case [3]"]
    assert "Timeout" in found.deaths[1]


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch about its sparse and quantised tensors
def test_corpus_is_the_same_every_time(bases: Path) -> None:
    """Another run, or another process, tries the same damage."""
    first, second = corpus.cases(bases), corpus.cases(bases)
    for number, (a, b) in enumerate(zip(first, second, strict=True)):
        assert (a.base, a.what, a.must_fail) == (b.base, b.what, b.must_fail)
        if number % 50 == 0:
            assert a.files == b.files, a.what
