"""Settings of the whole suite, its option ``--compatibility``, and how processes divide it.

One thread: the models here are tiny, and two OpenMP threads that wait for each other cost several
times the work itself as soon as anything else runs on the machine.
"""

import os

import pytest

from scripts import compatibility

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ["HF_HUB_OFFLINE"] = "1"

MODEL_FIXTURES = ("family", "family_folder", "folder", "golden")
"""Parameters of these keep an engine of theirs while tests ask for it."""


def pytest_addoption(parser: pytest.Parser) -> None:
    compatibility.add_option(parser)


def pytest_configure(config: pytest.Config) -> None:
    compatibility.configure(config)


# First, because xdist reads the groups in the same hook.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Which tests stay together with ``-n``: a file, or those that share engines of a model."""
    if hasattr(config, "workerinput"):
        for item in items:
            item.add_marker(pytest.mark.xdist_group(_group(item)))


def _group(item: pytest.Item) -> str:
    if "engines" not in getattr(item, "fixturenames", ()):
        return f"{item.path.parent.name}.{item.path.stem}"
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    models = [str(parameters[name]) for name in MODEL_FIXTURES if name in parameters]
    return ".".join([item.path.parent.name, "engines", *models])
