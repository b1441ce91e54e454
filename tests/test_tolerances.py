"""The comparison itself: what it lets through and what it reports."""

import pytest
import torch

from tests.tolerances import TOLERANCES, assert_close


def test_assert_close_reports_the_worst_element():
    expected = torch.ones(2, 3, dtype=torch.float64)
    actual = expected.float()
    assert_close(actual, expected, "operator")
    actual[1, 2] += 1e-3
    with pytest.raises(AssertionError) as failure:
        assert_close(actual, expected, "operator")
    report = str(failure.value)
    assert "1 of 6 elements" in report
    assert "worst index (1, 2)" in report
    assert "maximum error 1.000e-03" in report
    assert "mean error 1.667e-04" in report
    assert "error ratio" in report


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_assert_close_refuses_what_is_not_finite(bad):
    actual = torch.ones(4)
    actual[2] = bad
    with pytest.raises(AssertionError, match=r"1 not finite(.|\n)*worst index \(2,\)"):
        assert_close(actual, torch.ones(4), "operator")


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_assert_close_does_not_depend_on_the_scale(scale):
    expected = torch.linspace(1, 2, 5, dtype=torch.float64) * scale
    inside = 1 + 0.9 * TOLERANCES[torch.float32, "operator"]
    assert_close((expected * inside).float(), expected, "operator")
    with pytest.raises(AssertionError):
        assert_close((expected * (1 + 1e-4)).float(), expected, "operator")


def test_assert_close_of_zeros_is_exact():
    assert_close(torch.zeros(3), torch.zeros(3), "operator")
    with pytest.raises(AssertionError):
        assert_close(torch.tensor([0.0, 1e-30, 0.0]), torch.zeros(3), "operator")


def test_assert_close_compares_shapes():
    with pytest.raises(AssertionError):
        assert_close(torch.ones(3, 1), torch.ones(3), "operator")
