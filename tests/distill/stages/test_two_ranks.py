"""Stages on two gloo ranks with sharded student and teacher: the gradients of one process."""

from tests.distill import processes
from tests.distill.stages import two_ranks


def test_two_ranks(tmp_path):
    found = processes.start(two_ranks.main, ranks=2, folder=tmp_path)
    assert found.returncode == 0, found.stderr[-3000:]
    assert found.stdout.count("agree") == 8
