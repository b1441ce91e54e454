"""The program's side: a process that loads a sampled program and does what the judge asks of it.

It was forked before the judge knew the tests, and cannot reach the judge's memory. Whatever the
program does to this process only changes the values that are sent back.
"""

import builtins
import itertools
import operator
import os
import sys
import types
from collections.abc import Callable
from typing import Any, NoReturn

from lm_eval_tasks.programs.confine import Limits, NotConfinedError, confine
from lm_eval_tasks.programs.wire import Ended, Wire, decode, encode

#: Exit code of a process that could not be confined and therefore did nothing.
NOT_CONFINED = 99
#: Name of the program's module; not ``__main__``, so that a program's own trial runs do not run.
_MODULE = "program"


def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function."""
    return function(*args, **kwargs)


#: What the judge may ask for, on objects of the program.
OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": call,
    "getattr": getattr,
    "setattr": setattr,
    "iter": iter,
    "next": next,
    "len": len,
    "bool": bool,
    "str": str,
    "getitem": operator.getitem,
    "setitem": operator.setitem,
    "contains": operator.contains,
}


def run_guest(wire: Wire, limits: Limits, descriptors: tuple[int, ...]) -> NoReturn:
    """Serve the judge until it is gone; never returns.

    Args:
        wire: to the judge.
        limits: of this process.
        descriptors: the wire's files, the only ones that stay open besides 0 to 2.
    """
    edges = [2, *sorted(descriptors), 1 << 16]
    for low, high in itertools.pairwise(edges):
        os.closerange(low + 1, high)
    try:
        confine(limits)
    except NotConfinedError:
        os._exit(NOT_CONFINED)
    try:
        _Guest(wire).serve()
    finally:
        os._exit(0)


class _Guest:
    """The program and the objects of it that the judge knows by number."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.objects: list[Any] = []
        self.module = types.ModuleType(_MODULE)

    def serve(self) -> None:
        """Answer requests until the judge is gone."""
        self.wire.send(["value", "ready"])
        while True:
            self._answer(self.wire.receive())

    def _answer(self, request: Any) -> None:
        try:
            self.wire.send(["value", self._encode(self._do(*request))])
        except Ended:
            raise
        except BaseException as error:  # SystemExit too: leaving is no way to pass
            self.wire.send(["error", type(error).__name__, _text_of(error)])

    def _do(self, operation: str, args: list[Any], kwargs: dict[str, Any] | None = None) -> Any:
        if operation == "load":
            return self._load(args)
        if operation == "names":  # which of these does the program define?
            return [name for name in args if name in vars(self.module)]
        if operation == "name":
            return vars(self.module)[args[0]]
        values = [decode(item, self._resolve) for item in args]
        named = {key: decode(item, self._resolve) for key, item in (kwargs or {}).items()}
        return OPERATIONS[operation](*values, **named)

    def _load(self, texts: list[str]) -> None:
        sys.modules[_MODULE] = self.module  # dataclasses look their module up
        for text in texts:
            exec(compile(text, "<program>", "exec", dont_inherit=True), vars(self.module))

    def _encode(self, value: Any) -> Any:
        return encode(value, self._export)

    def _export(self, value: Any) -> dict[str, Any]:
        self.objects.append(value)
        return {"object": len(self.objects) - 1, "type": type(value).__name__}

    def _resolve(self, data: dict[str, Any]) -> Any:
        if "object" in data:
            return self.objects[data["object"]]
        if "builtin" in data:
            return getattr(builtins, data["builtin"])
        return self._function(data["function"])

    def _function(self, number: int) -> Callable[..., Any]:
        """Return a function of the tests, such as the key of a sort, as the program calls it."""

        def function(*args: Any, **kwargs: Any) -> Any:
            named = {key: self._encode(item) for key, item in kwargs.items()}
            self.wire.send(["callback", number, [self._encode(item) for item in args], named])
            while True:
                message = self.wire.receive()
                if message[0] == "value":
                    return decode(message[1], self._resolve)
                if message[0] == "error":
                    raise error_named(message[1], message[2])
                self._answer(message)

        return function


class ForeignError(Exception):
    """Stands for an exception whose class exists on the other side only."""


def error_named(name: str, text: str) -> Exception:
    """Return an exception of a built-in class, or a `ForeignError`."""
    kind = getattr(builtins, str(name), None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        try:
            return kind(text)
        except TypeError:  # UnicodeDecodeError and its like want more
            return ForeignError(f"{name}: {text}")
    return ForeignError(f"{name}: {text}")


def _text_of(error: BaseException) -> str:
    """Return the text of an exception, whose own methods may fail."""
    try:
        return str(error)[:500]
    except Exception:
        return ""
