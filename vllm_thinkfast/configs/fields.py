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


def check_object(owner: str, **fields: Any) -> None:
    """Raises ValueError unless every field is a JSON object."""
    for field, value in fields.items():
        if not isinstance(value, Mapping):
            raise ValueError(f"{owner}: {field}={value!r} must be an object {{...}}.")


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


def check_flags(owner: str, **fields: Any) -> None:
    """Raises ValueError unless every field is a bool; a quoted "false" would count as true."""
    for field, value in fields.items():
        if not isinstance(value, bool):
            raise ValueError(f"{owner}: {field}={value!r} must be true or false, without quotes.")


def check_interval(owner: str, **fields: Any) -> None:
    """Raises ValueError unless every field is two numbers, 0 <= low < high (infinite allowed)."""
    for field, value in fields.items():
        is_pair = isinstance(value, (list, tuple)) and len(value) == 2
        is_numbers = is_pair and all(
            isinstance(v, (int, float)) and not isinstance(v, bool) for v in value
        )
        if not is_numbers or not 0 <= value[0] < value[1]:
            raise ValueError(
                f"{owner}: {field}={value!r} must be two numbers [low, high] with 0 <= low < high."
            )


_ROPE_NUMBERS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}
"""RoPE type -> the numbers it cannot do without (transformers ``modeling_rope_utils.py``)."""


def check_rope(owner: str, rope: Mapping[str, Any]) -> None:
    """Raises ValueError unless ``rope`` has a known ``rope_type`` and that type's numbers."""
    rope_type = rope.get("rope_type", "default")
    check_choice(owner, "rope_type", rope_type, _ROPE_NUMBERS)
    numbers = ("rope_theta", *_ROPE_NUMBERS[rope_type])
    missing = [name for name in numbers if rope.get(name) is None]
    if missing:
        raise ValueError(
            f"{owner}: rope_type={rope_type!r} lacks {', '.join(missing)}; found "
            f"{dict(rope)!r}. Add the numbers of the base model's config.json."
        )
    check_positive_number(owner, **{name: rope[name] for name in numbers})
