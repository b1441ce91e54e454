"""What the judge and a program say to each other: frames of JSON, values of built-in types.

Numbers, strings, lists, tuples, sets, dictionaries, bytes and ranges, and their subclasses, go over
by value as the built-in type, so that nothing which a program defines (an ``__eq__`` that is always
true) takes part in a comparison on the other side. Other objects go over as a number that stands
for them. Nothing received is ever evaluated.
"""

import json
import math
import os
from collections.abc import Callable
from typing import Any

#: Longest message in bytes.
MAX_MESSAGE_BYTES = 16 << 20
_EXACT_INTEGERS = 1 << 53

#: Turns an object that has no value of its own into a dictionary that names it, and back.
Exporter = Callable[[Any], dict[str, Any]]
Importer = Callable[[dict[str, Any]], Any]


class Ended(BaseException):
    """The other side is gone, or says what no honest one would.

    No `Exception`: tests that catch those do not catch this.
    """


class Wire:
    """Both directions of a connection."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        # Kept here: a program may replace what the modules hold.
        self._fds, self._read, self._write = (read_fd, write_fd), os.read, os.write

    def send(self, message: Any) -> None:
        """Send a message of encoded values.

        Raises:
            ValueError: it is too long.
            Ended: nobody reads it.
        """
        data = json.dumps(message).encode()
        if len(data) > MAX_MESSAGE_BYTES:
            raise ValueError(f"a value of {len(data)} bytes; at most {MAX_MESSAGE_BYTES} are taken")
        view = memoryview(len(data).to_bytes(4, "big") + data)
        while view:
            try:
                view = view[self._write(self._fds[1], view) :]
            except OSError as error:
                raise Ended(str(error)) from None

    def receive(self) -> Any:
        """Wait for a message.

        Raises:
            Ended: end of file, or no message.
        """
        length = int.from_bytes(self._exactly(4), "big")
        if length > MAX_MESSAGE_BYTES:
            raise Ended(f"a message of {length} bytes")
        try:
            return json.loads(self._exactly(length))
        except (ValueError, RecursionError) as error:
            raise Ended(str(error)) from None

    def _exactly(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            found = self._read(self._fds[0], min(length - len(data), 1 << 16))
            if not found:
                raise Ended("end of file")
            data += found
        return bytes(data)


def encode(value: Any, export: Exporter) -> Any:
    """Return what JSON can hold of a value; `decode` is the way back."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        number = int(value)
        return number if abs(number) < _EXACT_INTEGERS else {"int": hex(number)}
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, list):
        return [encode(item, export) for item in value]
    if isinstance(value, dict):
        pairs = [[encode(key, export), encode(item, export)] for key, item in value.items()]
        return {"dict": pairs}
    for kind in (tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [encode(item, export) for item in value]}
    if isinstance(value, bytes | bytearray):
        return {"bytes": value.hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, range):
        return {"range": [encode(edge, export) for edge in (value.start, value.stop, value.step)]}
    return export(value)


def decode(data: Any, resolve: Importer) -> Any:
    """Return the value of an encoded one.

    Raises:
        Ended: no encoded value.
    """
    try:
        return _decode(data, resolve)
    except (TypeError, ValueError, LookupError, RecursionError) as error:
        raise Ended(f"a malformed value: {error}") from None


def _decode(data: Any, resolve: Importer) -> Any:
    if isinstance(data, list):
        return [_decode(item, resolve) for item in data]
    if not isinstance(data, dict):
        return data
    if len(data) == 1:
        ((tag, content),) = data.items()
        if tag == "int":
            return int(content, 16)
        if tag == "bytes":
            return bytes.fromhex(content)
        if tag == "complex":
            return complex(*content)
        if tag == "dict":
            return {_decode(key, resolve): _decode(item, resolve) for key, item in content}
        if tag in _COLLECTIONS:
            items = [_decode(item, resolve) for item in content]
            return _COLLECTIONS[tag](items)
    return resolve(data)


_COLLECTIONS: dict[str, Callable[[list[Any]], Any]] = {
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "range": lambda edges: range(*edges),
}


def canonical(data: Any) -> Any:
    """Return an encoded value so that equal values become the same JSON, floats to 9 digits.

    Objects count by the name of their type.
    """
    if isinstance(data, bool):
        return int(data)
    if isinstance(data, float):
        if not math.isfinite(data):
            return {"float": repr(data)}
        rounded = float(f"{data:.9g}")
        is_whole = rounded.is_integer() and abs(rounded) < _EXACT_INTEGERS
        return int(rounded) if is_whole else rounded
    if isinstance(data, list):
        return [canonical(item) for item in data]
    if not isinstance(data, dict):
        return data
    if "object" in data:
        return {"object": data.get("type")}
    ((tag, content),) = data.items()
    content = canonical(content)
    if tag in ("set", "frozenset", "dict"):
        return {tag.removeprefix("frozen"): sorted(content, key=json.dumps)}
    return {tag: content}
