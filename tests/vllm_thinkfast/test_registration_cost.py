"""What registration adds to ``import vllm``: our own few files, and nothing of anybody else's.

Seconds would be noise on a shared machine; what costs them is what gets imported.
"""

import json
import subprocess
import sys

CODE = """
import json, sys
import vllm
before = set(sys.modules)
from vllm_thinkfast.plugin import register
register()
print(json.dumps(sorted(set(sys.modules) - before)))
"""

LIGHT = ("vllm_thinkfast", "importlib", "packaging", "email", "zipfile", "csv", "json")
"""Ours, and what reading a distribution's version needs where vllm has not loaded it already."""


def test_registration_imports_nothing_heavy() -> None:
    result = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, check=True
    )
    added = json.loads(result.stdout.strip().splitlines()[-1])
    assert "vllm_thinkfast.compat" in added
    foreign = [
        name for name in added if name.split(".")[0] not in (*LIGHT, *sys.stdlib_module_names)
    ]
    assert foreign == []
    ours = {name for name in added if name.startswith("vllm_thinkfast")}
    assert not {name for name in ours if name.startswith("vllm_thinkfast.models")}
    assert not {name for name in ours if name.startswith("vllm_thinkfast.configs")}
