"""Read a benchmark from a local JSON lines file in the hub data set's field layout."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lm_eval_tasks.errors import stop
from lm_eval_tasks.option_words import LM_EVAL, OptionWords

FieldTypes = Mapping[str, type]
#: Returns what is wrong with a row, or None.
RowCheck = Callable[[Mapping[str, Any]], str | None]


def read_local_rows(
    path: str,
    required: FieldTypes,
    optional: FieldTypes,
    check: RowCheck,
    words: OptionWords = LM_EVAL,
) -> list[dict[str, Any]]:
    """Return the rows of a JSON lines file.

    Args:
        path: the file; empty lines are skipped.
        required: fields that every row must have.
        optional: fields that are kept when every row has them; all others are dropped.
        check: looks at each row beyond its field types.
        words: how the file was given.

    Raises:
        InputError: the file cannot be read or has no row, or a line is not as described; the
            message names the file and the line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        stop(f"{words.data_file}{path}: cannot be read ({error}); give a JSON lines file")
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            row, problem = _read_row(line, required, optional)
            problem = problem or check(row)
            if problem:
                stop(f"{path}, line {number}: {problem}")
            rows.append(row)
    if not rows:
        stop(f"{path}: no rows; need one JSON object with {_names(required)} on each line")
    shared = set.intersection(*(set(row) for row in rows))
    return [{key: value for key, value in row.items() if key in shared} for row in rows]


def _read_row(
    line: str, required: FieldTypes, optional: FieldTypes
) -> tuple[dict[str, Any], str | None]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        return {}, f"not JSON ({error.msg} at column {error.colno}); need one JSON object per line"
    except (ValueError, RecursionError) as error:  # a huge number, thousands of brackets
        return {}, f"not JSON ({error}); need one JSON object per line"
    if not isinstance(row, dict):
        return {}, f"need a JSON object with {_names(required)}, got {type(row).__name__}"
    for field, kind in required.items():
        if field not in row:
            return {}, f"no field {field!r}; need {_names(required)}, got {_names(row)}"
        if not isinstance(row[field], kind):
            got = type(row[field]).__name__
            return {}, f"field {field!r} must be of type {kind.__name__}, got {got}"
    present = [field for field, kind in optional.items() if isinstance(row.get(field), kind)]
    return {field: row[field] for field in [*required, *present]}, None


def _names(fields: Mapping[str, Any]) -> str:
    return ", ".join(repr(field) for field in fields) or "no field"
