"""Settings of the whole suite, made before torch is imported, and its option ``--compatibility``.

One thread: the models here are tiny, and two OpenMP threads that wait for each other cost several
times the work itself as soon as anything else runs on the machine.
"""

import os

import pytest

from scripts import compatibility

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    compatibility.add_option(parser)


def pytest_configure(config: pytest.Config) -> None:
    compatibility.configure(config)
