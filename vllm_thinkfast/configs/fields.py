"""Checks shared by the configuration classes: each names the field, the value and the fix."""

import difflib
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

LARGEST_COUNT = 2**31 - 1
"""Sizes and counts above this are no model's; token positions are 32-bit integers in vLLM."""

LARGEST_DEPTH = 10_000
"""Layers; the names of all tensors are listed before any is read."""
LARGEST_LABELS = 100_000
"""Classes of a classifier; transformers makes a name for each."""

PASSED_ON = frozenset({"architectures", "model_type", "dtype", "torch_dtype"})
"""Fields of transformers that matter here."""

_LONGEST_SHOWN = 200
_NO_FIELDS = ("self", "attribute_map", "sub_configs")
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_MAX_LISTED = 12
_CLOSE = 0.85
"""Similarity (difflib ratio) from which an unknown field counts as a misspelt one: one letter too
many, missing or exchanged in a name of seven letters."""
_MOST_ADDED = 2
"""Letters by which a misspelt field may be longer or shorter."""


def shown(value: Any) -> str:
    """``repr`` of a value from a file, cut after 200 characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError) as error:  # integers of thousands of digits
        return f"<{type(value).__name__}: {error}>"
    if len(text) <= _LONGEST_SHOWN:
        return text
    return f"{text[:_LONGEST_SHOWN]}... ({len(text)} characters)"


def printable(name: str) -> str:
    """A name from a file for a message: as it is, or as ``shown`` if it is long or hides things."""
    return name if name.isprintable() and len(name) <= _LONGEST_SHOWN else shown(name)


def check_spelling(owner: str, given: Iterable[str], known: Collection[str]) -> None:
    """Raises ValueError if a name in ``given`` is close to one of ``known`` without being it.

    For files that may hold fields of other programs: those are ignored, as transformers does, but
    a misspelt field of ours would silently mean its default.
    """
    by_plain_name = {_plain(name): name for name in known}
    for name in sorted(set(given) - set(known)):
        plain = _plain(name)
        # A name that is longer by a word (use_sliding_window) is another name.
        near = [other for other in by_plain_name if abs(len(other) - len(plain)) <= _MOST_ADDED]
        meant = difflib.get_close_matches(plain, near, n=1, cutoff=_CLOSE)
        if meant:
            raise ValueError(
                f"{owner}: unknown field {shown(name)}; did you mean "
                f"{by_plain_name[meant[0]]!r}? Rename it, or remove it."
            )


def _plain(name: str) -> str:
    return name.casefold().replace("_", "")


def check_no_members(owner: str, config_class: type, given: Iterable[str]) -> None:
    """Raises ValueError for fields that would replace methods and the like of the class.

    transformers sets every field that it does not know as an attribute of the object.
    """
    for name in given:
        member = getattr(config_class, name, None)
        is_fixed = isinstance(member, property) and member.fset is None
        if name.startswith("__") or name in _NO_FIELDS or callable(member) or is_fixed:
            raise ValueError(f"{owner}: {shown(name)} cannot be a field of the file; remove it.")


def in_published_words(error: ValueError, names: Mapping[str, str]) -> ValueError:
    """The same error, with what the fields in it are called in published files.

    Args:
        error: names fields of ours, as ``field=value``.
        names: field of ours -> where it stands in published files.
    """
    text = str(error)
    meant = [f"{ours} is {theirs}" for ours, theirs in names.items() if f" {ours}=" in text]
    return ValueError(f"{text} ({', '.join(meant)})") if meant else error


@contextmanager
def accepted_by_transformers(owner: str) -> Iterator[None]:
    """Turns whatever transformers raises about a field into a ValueError of one line."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:  # assertions, attributes, classes of huggingface_hub's own
        text = " ".join(str(error).split())
        raise ValueError(f"{owner}: transformers does not accept a field: {text}") from error


def check_of_transformers(owner: str, **fields: Any) -> None:
    """Raises ValueError for fields that transformers reads and whose type it does not check."""
    for name in ("dtype", "torch_dtype"):
        dtype = fields.get(name)
        if type(dtype).__module__ == "torch":  # the configuration is made in a program
            dtype = str(dtype).removeprefix("torch.")
        if dtype is not None:
            check_choice(owner, name, dtype, _DTYPES)
    if fields.get("num_labels") is not None:
        check_positive(owner, largest=LARGEST_LABELS, num_labels=fields["num_labels"])
    quantisation = fields.get("quantization_config")
    if quantisation is not None and not hasattr(quantisation, "to_dict"):  # made in a program
        check_object(owner, quantization_config=quantisation)
    architectures = fields.get("architectures")
    is_list = isinstance(architectures, (list, tuple))
    if architectures is not None and not (
        is_list and all(isinstance(name, str) for name in architectures)
    ):
        raise ValueError(
            f"{owner}: architectures={shown(architectures)} must be a list of class names."
        )


def check_known_keys(owner: str, given: Mapping[str, Any], known: Collection[str]) -> None:
    """Raises ValueError if ``given`` has a key that ``known`` lacks.

    The published loaders pass such mappings as keyword arguments, some of them swallow what they do
    not know. An option that is not understood changes the mathematics, so it is refused here.
    """
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(
            f"{owner}: unknown option(s) "
            f"{', '.join(f'{printable(k)}={shown(given[k])}' for k in unknown[:_MAX_LISTED])}; "
            f"accepted: {', '.join(sorted(known))}. Remove them if they have no meaning for the "
            "model, otherwise this checkpoint is of another architecture."
        )


def check_object(owner: str, **fields: Any) -> None:
    """Raises ValueError unless every field is a JSON object."""
    for field, value in fields.items():
        if not isinstance(value, Mapping):
            raise ValueError(f"{owner}: {field}={shown(value)} must be an object {{...}}.")


def check_choice(owner: str, field: str, value: Any, accepted: Collection[Any]) -> None:
    """Raises ValueError unless ``value`` is one of ``accepted``."""
    # Values from a file may be lists, which no dict can look up.
    if not any(type(value) is type(choice) and value == choice for choice in accepted):
        raise ValueError(
            f"{owner}: {field}={shown(value)} is not supported; accepted: "
            f"{', '.join(repr(a) for a in accepted)}."
        )


def check_positive(owner: str, *, largest: int = LARGEST_COUNT, **fields: Any) -> None:
    """Raises ValueError unless every field is an integer from 1 to ``largest``."""
    for field, value in fields.items():
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        if not is_integer or value < 1:
            raise ValueError(f"{owner}: {field}={shown(value)} must be an integer >= 1.")
        if value > largest:
            raise ValueError(f"{owner}: {field}={shown(value)} is above {largest}.")


def check_positive_number(owner: str, **fields: Any) -> None:
    """Raises ValueError unless every field is a finite number > 0."""
    for field, value in fields.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 0 < value <= sys.float_info.max:
            raise ValueError(f"{owner}: {field}={shown(value)} must be a number > 0.")


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
            raise ValueError(
                f"{owner}: {field}={shown(value)} must be true or false, without quotes."
            )


def check_interval(owner: str, **fields: Any) -> None:
    """Raises ValueError unless every field is two numbers, 0 <= low < high (infinite allowed)."""
    for field, value in fields.items():
        is_pair = isinstance(value, (list, tuple)) and len(value) == 2
        is_numbers = is_pair and all(
            isinstance(v, (int, float)) and not isinstance(v, bool) for v in value
        )
        if not is_numbers or not 0 <= value[0] < value[1]:
            raise ValueError(
                f"{owner}: {field}={shown(value)} must be two numbers [low, high] with "
                "0 <= low < high."
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
_ROPE_OPTIONS: dict[str, tuple[str, ...]] = {
    "dynamic": ("original_max_position_embeddings",),
    "yarn": (
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}
"""RoPE type -> what it may have besides."""


def check_rope(owner: str, rope: Mapping[str, Any]) -> None:
    """Raises ValueError unless ``rope`` has a known ``rope_type``, its numbers and no others."""
    check_object(owner, rope_parameters=rope)
    rope_type = rope.get("rope_type", "default")
    check_choice(owner, "rope_type", rope_type, _ROPE_NUMBERS)
    numbers = ("rope_theta", *_ROPE_NUMBERS[rope_type])
    missing = [name for name in numbers if rope.get(name) is None]
    if missing:
        raise ValueError(
            f"{owner}: rope_type={rope_type!r} lacks {', '.join(missing)}; found "
            f"{shown(dict(rope))}. Add the numbers of the base model's config.json."
        )
    options = _ROPE_OPTIONS.get(rope_type, ())
    check_known_keys(f"{owner}: rope", rope, ("rope_type", *numbers, *options))
    present = {name: rope[name] for name in (*numbers, *options) if name in rope}
    check_flags(owner, truncate=present.pop("truncate", True))
    check_positive_number(owner, **present)
    if rope_type == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise ValueError(
            f"{owner}: low_freq_factor={rope['low_freq_factor']} must be below "
            f"high_freq_factor={rope['high_freq_factor']}."
        )
