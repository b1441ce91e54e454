"""The operator tests of the Triton backend, on a CPU, in Triton's interpreter.

A process of its own, because TRITON_INTERPRET must be set before Triton is imported and must not
reach vLLM. That the kernels really compute there: results are allocated full of NaN (conftest), the
host functions launch kernels and do nothing else (``test_triton_host.py``), and the run below fails
unless every collected test passes.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_thinkfast.ops.backend import OPERATORS

pytest.importorskip("triton", reason="Triton has no wheel for this machine")

FEWEST_TESTS = {**dict.fromkeys(OPERATORS, 60), "state_codec": 10}


@pytest.mark.slow
@pytest.mark.parametrize("operator", FEWEST_TESTS)
def test_operator_in_interpreter(operator):
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-k", "triton", "-p", "no:cacheprovider"]
    finished = subprocess.run(
        [*command, str(here / f"test_{operator}.py")],
        env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=here.parents[2],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout[-6000:] + finished.stderr[-2000:]
    summary = finished.stdout.splitlines()[-1]
    passed = re.search(r"(\d+) passed", summary)
    assert passed, summary
    assert int(passed[1]) > FEWEST_TESTS[operator], summary
    assert "skipped" not in summary, summary
