"""Take the alias's version from the installed vllm-cpu, or stop."""

from importlib.metadata import PackageNotFoundError, version

from setuptools import setup

try:
    cpu_version = version("vllm-cpu")
except PackageNotFoundError:
    raise SystemExit(
        "vllm-cpu is not installed in this environment (or pip's build isolation hides it). This "
        "alias is for CPU environments only; there, run: "
        "pip install --no-build-isolation --no-deps ./integrations/vllm_cpu_alias"
    ) from None

# vLLM takes a version of "vllm" that contains "cpu" for its CPU build (vllm/platforms/__init__.py).
local = "." if "+" in cpu_version else "+"
setup(version=f"{cpu_version}{local}cpu", install_requires=[f"vllm-cpu=={cpu_version}"])
