"""Makes ``thinkfast_distill`` importable where the distribution is not installed."""

import sys
from pathlib import Path

import pytest

_DISTRIBUTION = str(Path(__file__).resolve().parents[2] / "distill")
if _DISTRIBUTION not in sys.path:
    sys.path.insert(0, _DISTRIBUTION)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """Folder of the tiny teacher; not to be changed."""
    from tests.distill.tiny_run import write_teacher

    return write_teacher(tmp_path_factory.mktemp("teacher"))
