"""Checks shared by the configuration classes: each names the field, the value and the fix."""

from collections.abc import Collection, Mapping
from typing import Any


def check_known_keys(owner: str, given: Mapping[str, Any], known: Collection[str]) -> None:
    """Raises ValueError if ``given`` has a key that ``known`` lacks.

    The published loaders pass such mappings as keyword arguments, some of them swallow what they do
    not know. An option that is not understood changes the mathematics, so it is refused here.
    """
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(
            f"{owner}: unknown option(s) {', '.join(f'{k}={given[k]!r}' for k in unknown)}; "
            f"accepted: {', '.join(sorted(known))}. Remove them if they have no meaning for the "
            "model, otherwise this checkpoint is of another architecture."
        )


def check_choice(owner: str, field: str, value: Any, accepted: Collection[Any]) -> None:
    """Raises ValueError unless ``value`` is one of ``accepted``."""
    if value not in accepted:
        raise ValueError(
            f"{owner}: {field}={value!r} is not supported; accepted: "
            f"{', '.join(repr(a) for a in accepted)}."
        )


def check_positive(owner: str, **fields: Any) -> None:
    """Raises ValueError unless every field is an integer >= 1."""
    for field, value in fields.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{owner}: {field}={value!r} must be an integer >= 1.")


def check_positive_number(owner: str, **fields: Any) -> None:
    """Raises ValueError unless every field is a finite number > 0."""
    for field, value in fields.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 0 < value < float("inf"):
            raise ValueError(f"{owner}: {field}={value!r} must be a number > 0.")


def check_divides(owner: str, **named: tuple[int, str, int]) -> None:
    """Raises ValueError unless each ``field=(value, name, divisor)`` has a divisor that fits."""
    for field, (value, divisor_name, divisor) in named.items():
        if divisor < 1 or value % divisor:
            raise ValueError(
                f"{owner}: {field}={value} must be a multiple of {divisor_name}={divisor}."
            )
