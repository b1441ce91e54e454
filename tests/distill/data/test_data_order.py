import itertools

import pytest

from thinkfast_distill.data.order import Permutation


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 64, 1000, 4097])
def test_permutation_visits_every_number_once(size):
    order = Permutation(size, 7, "source", 0)
    assert sorted(order[i] for i in range(size)) == list(range(size))


def test_permutation_depends_on_every_part_of_its_key():
    orders = [
        [Permutation(500, *key)[i] for i in range(500)]
        for key in [(1, "a", 0), (1, "a", 1), (1, "b", 0), (2, "a", 0)]
    ]
    assert orders[0] == [Permutation(500, 1, "a", 0)[i] for i in range(500)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert sum(a == b for a, b in zip(one, other, strict=True)) < 10  # chance: 1


def test_permutation_is_the_same_on_every_machine():
    """Resuming elsewhere depends on it: these numbers may never change."""
    order = Permutation(10**9, 42, "finemath", 3)
    assert [order[i] for i in range(3)] == [732890456, 245167813, 100132710]


def test_permutation_mixes_near_and_far():
    """Neighbours must not stay neighbours, and each tenth must be spread over all tenths."""
    order = [Permutation(10_000, 0)[i] for i in range(10_000)]
    assert sum(abs(a - b) < 10 for a, b in itertools.pairwise(order)) < 60  # chance: 19
    tenths = [value // 1000 for value in order[:1000]]
    assert all(60 < tenths.count(t) < 140 for t in range(10))  # five standard deviations: 48


@pytest.mark.parametrize("index", [-1, 5])
def test_permutation_refuses_positions_outside(index):
    with pytest.raises(IndexError):
        Permutation(5)[index]
