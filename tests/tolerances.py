"""The one table of numerical tolerances, and the comparison that reports how far off a result is.

A result passes if, element by element, |actual - expected| <= tolerance * (|expected| + rms of
expected). The rms keeps elements that cancel to almost nothing from deciding, and makes the
criterion independent of the scale of the data: tiny results are compared as strictly as large ones.

Expected values come from float64 oracles fed with the same (already rounded) inputs, so that a
tolerance covers rounding inside the operator and of its result, nothing else.
"""

import torch

TOLERANCES: dict[tuple[torch.dtype, str], float] = {
    # Results of one operator; the dtype is that of the result. float32: accumulated roundings over
    # up to 300 tokens. Half types: one rounding at the end, 2^-11 relative for float16 and 2^-8 for
    # bfloat16, but 2^-7 in Triton's interpreter, which truncates to bfloat16 where a GPU rounds.
    (torch.float32, "operator"): 1e-5,
    (torch.bfloat16, "operator"): 8e-3,
    (torch.float16, "operator"): 6e-4,
    # Oracles against closed forms.
    (torch.float64, "operator"): 1e-12,
}


def assert_close(actual: torch.Tensor, expected: torch.Tensor, quantity: str) -> None:
    """Fails with maximum and mean error, error ratio and worst index if a result is off.

    Args:
        actual: what was computed; its dtype selects the tolerance.
        expected: same shape, at least as precise.
        quantity: second half of the key in TOLERANCES.
    """
    __tracebackhide__ = True
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    tolerance = TOLERANCES[actual.dtype, quantity]
    if actual.numel() == 0:
        return
    expected = expected.double()
    assert expected.isfinite().all(), "the expected values themselves are not finite"
    error = (actual.double() - expected).abs()
    rms = expected.square().mean().sqrt()
    bound = tolerance * (expected.abs() + rms)
    if (error <= bound).all():  # false for NaN
        return
    excess = (error / bound).nan_to_num(nan=torch.inf, posinf=torch.inf)
    excess[error == 0] = 0.0
    worst = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
    error_rms = error.square().mean().sqrt()
    raise AssertionError(
        f"{quantity} ({str(actual.dtype).removeprefix('torch.')}, shape {tuple(actual.shape)}): "
        f"{int((~(error <= bound)).sum())} of {error.numel()} elements off, "
        f"{int((~actual.isfinite()).sum())} not finite\n"
        f"  maximum error {error.max():.3e}, mean error {error.mean():.3e}, "
        f"error ratio (rms of error / rms of expected) {error_rms / rms:.3e}\n"
        f"  worst index {worst}: got {actual[worst].item():.8g}, "
        f"expected {expected[worst].item():.8g}, "
        f"{excess[worst]:.3g} times the bound (tolerance {tolerance:g})"
    )
