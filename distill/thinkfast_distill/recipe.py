"""Reads a recipe: YAML plus ``key=value`` overrides -> checked dataclasses, and back.

The schema is ``config.RunConfig``. Nothing is guessed: an unknown key, a value of another type or
an impossible combination is a ``RecipeError`` that names the place, the value and what is accepted.
One convenience: numbers may be written ``1e-4`` or ``4e9``, which YAML 1.1 reads as text.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union

import yaml

NEW_RUN = (
    "a new --run-dir that starts from this run's weights (thinkfast-distill export RUN OUT, then "
    "student.weights=OUT)"
)
"""For messages: how to go on with a change that a run folder does not take."""


class RecipeError(ValueError):
    """A recipe that cannot be run; the message is one line for the user."""


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML file that holds a mapping.

    Raises:
        RecipeError: the file is absent, not YAML, or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}; give the path of a recipe.") from error
    try:
        value = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark is not None else str(path)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RecipeError(f"{where}: not valid YAML: {problem}.") from error
    if not isinstance(value, dict):
        raise RecipeError(f"{path}: expected a mapping of keys, found {type(value).__name__}.")
    return value


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping; YAML itself would keep the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} cannot be a key", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} occurs twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Returns ``raw`` with ``a.b.c=value`` settings applied; ``raw`` itself is unchanged.

    Args:
        raw: the mapping of a recipe.
        overrides: each ``key=value`` with a dotted key; list items are named by index, or by the
            ``name`` (else ``preset``, else ``kind``) of the item; values are YAML.

    Raises:
        RecipeError: no ``=``, or a path that leads through something that is no mapping or list.
    """
    result: dict[str, Any] = _copy(raw)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise RecipeError(
                f"{override!r}: an override is written key=value, for example "
                "stages.end_to_end.lr=1e-5."
            )
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"{override!r}: the value is not valid YAML.") from error
        _set(result, key.split("."), value, override)
    return result


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copy(item) for item in value]
    return value


def _set(target: Any, path: list[str], value: Any, override: str) -> None:
    for depth, part in enumerate(path):
        is_last = depth == len(path) - 1
        if isinstance(target, list):
            index = _item_index(target, part, override)
            if is_last:
                target[index] = value
                return
            target = target[index]
        elif isinstance(target, dict):
            if is_last:
                target[part] = value
                return
            if target.get(part) is None:
                target[part] = {}
            target = target[part]
        else:
            raise RecipeError(
                f"{override!r}: {'.'.join(path[:depth])} is {target!r}, it has no key {part!r}."
            )


def _item_index(items: list[Any], part: str, override: str) -> int:
    names = [
        item.get("name") or item.get("preset") or item.get("kind")
        if isinstance(item, dict)
        else None
        for item in items
    ]
    if part.isdigit() and int(part) < len(items):
        return int(part)
    if names.count(part) == 1:
        return names.index(part)
    accepted = [str(name) for name in names if name is not None and names.count(name) == 1]
    raise RecipeError(
        f"{override!r}: no single list item {part!r}; accepted: 0 to {len(items) - 1}"
        + (f" or {', '.join(accepted)}." if accepted else ".")
    )


def parse(schema: type, raw: Any, where: str) -> Any:
    """Builds a dataclass from a mapping, strictly.

    Args:
        schema: the dataclass; its field types may be dataclasses, ``Literal``, ``X | None``,
            ``list``, ``dict``, ``int``, ``float``, ``bool``, ``str`` and ``Any``. A class attribute
            ``UNION_KEYS = {field: (key, {value of key: dataclass})}`` says which dataclass a field
            is, by another key of the same mapping.
        raw: what the recipe holds at this place.
        where: the place, for messages: file or ``file: stages.0``.

    Raises:
        RecipeError: names the place, the offending key or value, and what is accepted.
    """
    if not isinstance(raw, Mapping):
        raise RecipeError(f"{where}: expected a mapping of keys, found {raw!r}.")
    fields = {f.name: f for f in dataclasses.fields(schema) if f.init}
    for key in raw:
        if key not in fields:
            raise RecipeError(
                f"{_join(where, str(key))}: unknown key; accepted: {', '.join(fields)}."
            )
    hints = typing.get_type_hints(schema)
    unions: Mapping[str, tuple[str, Mapping[str, type]]] = getattr(schema, "UNION_KEYS", {})
    values: dict[str, Any] = {}
    for name, field in fields.items():
        place = _join(where, name)
        has_default = (
            field.default is not dataclasses.MISSING
            or field.default_factory is not dataclasses.MISSING
        )
        if name in unions:
            key, classes = unions[name]
            chosen = classes.get(str(raw.get(key)))
            if chosen is not None:  # otherwise the check of ``key`` itself reports the mistake
                values[name] = parse(chosen, raw.get(name) or {}, place)
        elif name in raw:
            values[name] = _value(hints[name], raw[name], place)
        elif not has_default:
            raise RecipeError(f"{place}: missing; it has no default.")
    return _construct(schema, values, where)


def _construct(schema: type, values: dict[str, Any], where: str) -> Any:
    try:
        return schema(**values)
    except RecipeError as error:  # raised by the class's own checks, which do not know the place
        raise RecipeError(_join(where, str(error))) from error


def _join(where: str, key: str) -> str:
    separator = "." if ": " in where else ": "
    return f"{where}{separator}{key}"


def _value(hint: Any, raw: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return raw
    if origin in (Union, types.UnionType):
        inner = [a for a in arguments if a is not type(None)]
        if raw is None and len(inner) < len(arguments):
            return None
        if len(inner) == 1:
            return _value(inner[0], raw, where)
        return _first_that_fits(inner, raw, where)
    if origin is Literal:
        if raw not in arguments:
            raise RecipeError(f"{where}: {raw!r} is not accepted; accepted: {_names(arguments)}.")
        return raw
    if origin is list:
        if not isinstance(raw, list):
            raise RecipeError(f"{where}: expected a list, found {raw!r}.")
        return [_value(arguments[0], item, _join(where, str(i))) for i, item in enumerate(raw)]
    if origin is dict:
        if not isinstance(raw, Mapping):
            raise RecipeError(f"{where}: expected a mapping, found {raw!r}.")
        return {
            str(key): _value(arguments[1], item, _join(where, str(key)))
            for key, item in raw.items()
        }
    if dataclasses.is_dataclass(hint):
        return parse(typing.cast(type, hint), raw, where)
    return _scalar(hint, raw, where)


def _first_that_fits(hints: list[Any], raw: Any, where: str) -> Any:
    for hint in hints:
        try:
            return _value(hint, raw, where)
        except RecipeError:
            continue
    accepted = ", ".join(getattr(hint, "__name__", str(hint)) for hint in hints)
    raise RecipeError(f"{where}: {raw!r} is not accepted; accepted types: {accepted}.")


def _scalar(hint: Any, raw: Any, where: str) -> Any:
    if hint is bool and isinstance(raw, bool):
        return raw
    if hint is str and isinstance(raw, str):
        return raw
    if hint in (int, float) and not isinstance(raw, bool):
        number = _number(raw)
        if number is not None and hint is float and math.isfinite(number):
            return number
        if number is not None and number.is_integer():
            return raw if isinstance(raw, int) else int(number)
    raise RecipeError(f"{where}: {raw!r} is not of type {getattr(hint, '__name__', hint)}.")


def _number(raw: Any) -> float | None:
    if isinstance(raw, (int, float)):
        return float(raw)
    if isinstance(raw, str):
        try:
            return float(raw)
        except ValueError:
            return None
    return None


def _names(values: Sequence[Any]) -> str:
    return ", ".join(str(value) for value in values)


def to_dict(config: Any) -> dict[str, Any]:
    """The mapping of a dataclass; reading it again gives an equal dataclass."""
    return dataclasses.asdict(config)


def to_yaml(config: Any) -> str:
    """The resolved recipe as YAML."""
    text: str = yaml.safe_dump(to_dict(config), sort_keys=False, width=100)
    return text


def differing_keys(one: Any, other: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted key -> both values, for every leaf in which two mappings differ.

    Args:
        one: a mapping, list or leaf.
        other: what to compare with; an absent key counts as None.
        prefix: dotted path so far.
    """
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        found: dict[str, tuple[Any, Any]] = {}
        for key in [*one, *(key for key in other if key not in one)]:
            path = f"{prefix}.{key}" if prefix else str(key)
            found.update(differing_keys(one.get(key), other.get(key), path))
        return found
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        found = {}
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            found.update(differing_keys(a, b, f"{prefix}.{i}"))
        return found
    return {} if one == other else {prefix: (one, other)}
