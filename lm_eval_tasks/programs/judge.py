"""The child process that judges programs: for each, one process runs the tests, one the program.

Both are forked from this one, so a program costs no start of an interpreter, and nothing that tests
or program do lasts. They never share an interpreter: the program's process is forked before the
tests are read, and both are confined (`confine`). The tests call the program over a pair of pipes
and compare values of built-in types on their own side, so a program passes only by sending back the
right values: exiting, printing, replacing functions or comparing as equal to everything does not
help it, and the verdict leaves through a pipe that its process does not have.

A failed assertion is counted and the tests go on, so that what a program answers is known for every
call; this *behaviour* never depends on the expected values. Started by `sandbox`.
"""

import ast
import builtins
import contextlib
import hashlib
import importlib
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from lm_eval_tasks.programs.confine import Limits, NotConfinedError, confine, die_with_parent
from lm_eval_tasks.programs.guest import NOT_CONFINED, error_named, run_guest
from lm_eval_tasks.programs.wire import Ended, Wire, canonical, decode, encode

_FAILED = "__failed__"
_TEXT_LIMIT = 300


def main() -> None:
    """Judge programs one after another until stdin ends.

    Arguments: process number of the parent, limits as JSON. Every job is a byte, which this process
    reads, and a frame, which only the process that runs the tests reads: what this one knew, the
    programs' processes, which are forked from it, would know too. The answers are lines of JSON.
    """
    parent, limits = int(sys.argv[1]), Limits(*json.loads(sys.argv[2]))
    report = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    die_with_parent()
    while os.getppid() == parent and os.read(0, 1):
        answer = _in_time(limits, null, report)
        _write(report, json.dumps(answer).encode() + b"\n")
        if "is_last" in answer:
            return


def _in_time(limits: Limits, null: int, report: int) -> dict[str, Any]:
    """Let a child judge the next program, and kill it and all of its own if it takes too long."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        os.close(report)
        os.close(reading)
        _judge_next(limits, null, writing)
    os.close(writing)
    answer, deadline = b"", time.monotonic() + limits.wall_s
    while True:
        ready, _, _ = select.select([reading], [], [], max(deadline - time.monotonic(), 0))
        data = os.read(reading, 1 << 16) if ready else b""
        if not data:
            break
        answer += data
    os.close(reading)
    os.kill(child, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):  # its group, before the number is free again
        os.killpg(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if ready and answer:
        found: dict[str, Any] = json.loads(answer)
        return found
    is_late = not ready or code == -signal.SIGXCPU
    outcome = "timeout" if is_late else "died"
    # It may not have read all of its job, which would be taken for the next one.
    return {"outcome": outcome, "detail": "while the tests ran", "is_last": True}


def _judge_next(limits: Limits, null: int, report: int) -> NoReturn:
    """Judge one program in this process and one of its own, forked before the job is read."""
    parent = os.getppid()
    to_guest, from_judge = os.pipe(), os.pipe()
    guest = os.fork()
    if guest == 0:
        os.dup2(null, 0)
        run_guest(Wire(to_guest[0], from_judge[1]), limits, (to_guest[0], from_judge[1]))
    os.close(to_guest[0])
    os.close(from_judge[1])
    try:
        confine(limits)
        if os.getppid() == parent:
            _write(report, json.dumps(_judge(Wire(from_judge[0], to_guest[1]), guest)).encode())
    except NotConfinedError as error:
        _write(report, json.dumps({"not_confined": str(error)}).encode())
    finally:
        os._exit(0)  # whatever the tests raised: without a report the program did not pass


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _judge(wire: Wire, guest: int) -> dict[str, Any]:
    job = Wire(0, -1).receive()
    try:
        wire.receive()  # the program's process is confined
    except Ended:
        _, status = os.waitpid(guest, 0)
        if os.waitstatus_to_exitcode(status) == NOT_CONFINED:
            return {"not_confined": "the program's process could not be confined"}
        return {"outcome": "died", "detail": "before the program was loaded"}
    tests = _Tests(wire)
    with contextlib.suppress(Ended, _CannotPassError):
        tests.run(**job)
    if tests.fault is not None:
        return {"fault": tests.fault}
    outcome = "failed" if tests.failures else "passed"
    if tests.has_ended:
        is_late = _exit_code(guest) in (-signal.SIGXCPU, -signal.SIGKILL)
        outcome = "timeout" if is_late else "died"
    detail = "; ".join(tests.failures)[:_TEXT_LIMIT]
    return {"outcome": outcome, "detail": detail, "behaviour": tests.behaviour()}


def _exit_code(process: int) -> int | None:
    """Return how a process ended; None if it only closed its pipes."""
    for _ in range(100):  # files are closed a moment before the status is there
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return None


class _CannotPassError(BaseException):
    """The tests give the program something that cannot be sent; the tests' fault, not its."""


class _Tests:
    """The tests of a problem while they run against one program."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.failures: list[str] = []
        self.has_ended = False
        """The program's process is gone, or sent nonsense. Kept, since tests may catch anything."""
        self.fault: str | None = None
        """What the tests tried that cannot be done."""
        self.functions: list[Callable[..., Any]] = []
        self._trace = hashlib.blake2b(digest_size=12)
        self._has_value = False

    def run(
        self, program: list[str], prompt: str, setup: str, tests: str, entry_point: str | None
    ) -> None:
        """Load the program and run the tests; `failures` says what went wrong.

        Args:
            program: texts to load one after the other.
            prompt: code of the problem, whose helper functions the tests may use.
            setup: code before the tests, which may use the program's names.
            tests: code with assertions.
            entry_point: function to give to the tests' ``check``; None: they name it themselves.
        """
        kind, _ = self._ask("load", program)
        if kind is not None:
            self.fail(f"loading: {kind}")
            return
        namespace: dict[str, Any] = {"__name__": "tests", _FAILED: self.fail}
        if "random" in tests:
            # Tests that draw their inputs ask every program the same.
            import random

            random.seed(0)
        if entry_point is not None:
            tests += f"\n\ncheck({entry_point})\n"
        try:
            exec(compile(prompt, "<prompt>", "exec", dont_inherit=True), namespace)
            if entry_point is not None:
                namespace[entry_point] = self._name(entry_point)
            is_named = entry_point is not None
            for name, code in (("setup", setup), ("tests", tests)):
                tree = _with_counted_assertions(code)
                is_last = name == "tests"
                is_named |= self._bind(tree, namespace, own_names=is_last and not is_named)
                exec(compile(tree, f"<{name}>", "exec", dont_inherit=True), namespace)
        except Exception as error:
            self.fail("outside of assertions", error)

    def fail(self, where: str, error: Exception | None = None) -> None:
        """Count a failure.

        It goes through the process that programs are forked from, so it says where and never what
        the tests expect: a later program could find that in its memory.
        """
        self.failures.append(where if error is None else f"{where}: {type(error).__name__}")

    def behaviour(self) -> str | None:
        """Return a digest of what the program answered; None if it never gave a value."""
        return self._trace.hexdigest() if self._has_value else None

    def do(self, operation: str, *args: Any, **kwargs: Any) -> Any:
        """Let the program's process do something; return its value or raise its exception."""
        sent = [encode(item, self._export) for item in args]
        named = {key: encode(item, self._export) for key, item in kwargs.items()}
        kind, data = self._ask(operation, sent, named)
        if kind is not None:
            self._trace.update(f"error {kind}\n".encode())
            raise error_named(kind, data)
        value = self._decode(data)
        self._has_value = True
        self._trace.update(json.dumps(canonical(data)).encode() + b"\n")
        return value

    def _ask(self, operation: str, *args: Any) -> tuple[str | None, Any]:
        """Send a request; return (None, encoded value) or (exception's name, its text)."""
        try:
            self.wire.send([operation, *args])
            while True:
                match self.wire.receive():
                    case ["value", data]:
                        return None, data
                    case ["error", str(kind), str(text)]:
                        return kind, text
                    case ["callback", int(number), list(given), dict(named)]:
                        self._call_back(number, given, named)
                    case _:
                        raise Ended("no answer")
        except Ended:
            self._end()
            raise

    def _decode(self, data: Any) -> Any:
        try:
            return decode(data, self._resolve)
        except Ended:
            self._end()
            raise

    def _end(self) -> None:
        if not self.has_ended:
            self.has_ended = True
            self.fail("the program ended")
            self._trace.update(b"ended")

    def _call_back(self, number: int, args: list[Any], kwargs: dict[str, Any]) -> None:
        """Call a function of the tests for the program. Only those handed out can be called."""
        if not 0 <= number < len(self.functions):
            raise Ended("an unknown function")
        values = [decode(item, self._resolve) for item in args]
        named = {key: decode(item, self._resolve) for key, item in kwargs.items()}
        try:
            found = self.functions[number](*values, **named)
            self.wire.send(["value", encode(found, self._export)])
        except Exception as error:  # a value that is too long, too
            self.wire.send(["error", type(error).__name__, ""])

    def _export(self, value: Any) -> dict[str, Any]:
        if isinstance(value, Remote):
            return {"object": value._number}
        if callable(value):
            name = getattr(value, "__name__", None)
            if isinstance(name, str) and getattr(builtins, name, None) is value:
                return {"builtin": name}
            self.functions.append(value)
            return {"function": len(self.functions) - 1}
        self.fault = f"an argument of type {type(value).__name__}"
        raise _CannotPassError(self.fault)

    def _resolve(self, data: dict[str, Any]) -> Any:
        number = data["object"]
        if type(number) is not int:
            raise TypeError("the number of an object is a whole number")
        return Remote(self, number)

    def _name(self, name: str) -> Any:
        kind, data = self._ask("name", [name])
        if kind is not None:
            raise NameError(f"the program does not define {name}")
        return self._decode(data)

    def _bind(self, tree: ast.Module, namespace: dict[str, Any], own_names: bool) -> bool:
        """Let names that the tests use and do not have mean the program's.

        Args:
            tree: the tests.
            namespace: what they have.
            own_names: nothing has named the program yet. If these tests do not either, other than
                by a name that Python has for something else, that name means the program's.

        Returns:
            Whether they name something that only the program can have.
        """
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        unknown = sorted(names - namespace.keys() - vars(builtins).keys())
        tested = _tested_name(tree, namespace) if own_names else None
        asked = sorted({*unknown, *([] if tested is None else [tested])})
        _, known = self._ask("names", asked)
        for name in asked:
            if not isinstance(known, list) or name not in known:
                continue
            # Tests may lean on the program's "import math"; comparing stays on this side.
            is_module = name in sys.stdlib_module_names and name != tested
            namespace[name] = importlib.import_module(name) if is_module else self._name(name)
        own = set(unknown) - _defined_names(tree)
        return bool(own - sys.stdlib_module_names)


class Remote:
    """An object of the program: everything asked of it is done in the program's process."""

    __slots__ = ("_number", "_tests")
    _number: int
    _tests: _Tests

    def __init__(self, tests: _Tests, number: int) -> None:
        object.__setattr__(self, "_tests", tests)
        object.__setattr__(self, "_number", number)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        return self._tests.do("call", self, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute, other than the private ones of Python itself."""
        if name.startswith("__"):
            raise AttributeError(name)
        return self._tests.do("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute."""
        self._tests.do("setattr", self, name, value)

    def __iter__(self) -> Any:
        """Return an iterator, an object of the program as well."""
        return self._tests.do("iter", self)

    def __next__(self) -> Any:
        """Return the next item of an iterator."""
        return self._tests.do("next", self)

    def __len__(self) -> int:
        """Return the length."""
        return int(self._tests.do("len", self))

    def __bool__(self) -> bool:
        """Return the truth value."""
        return bool(self._tests.do("bool", self))

    def __str__(self) -> str:
        """Return the text."""
        return str(self._tests.do("str", self))

    def __getitem__(self, key: Any) -> Any:
        """Return an item."""
        return self._tests.do("getitem", self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        """Set an item."""
        self._tests.do("setitem", self, key, value)

    def __contains__(self, key: Any) -> bool:
        """Return whether it holds something."""
        return bool(self._tests.do("contains", self, key))


def _tested_name(tree: ast.Module, namespace: Mapping[str, Any]) -> str | None:
    """Return the one builtin or module name that tests call, where they use no name of their own.

    Such tests can only be about a function of the program that has this name. With any other name
    beside it, or two of this kind, a program could replace what the tests compare with.
    """
    known = namespace.keys() | _defined_names(tree)
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - known
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    called = {function.id for function in calls if isinstance(function, ast.Name)} - known
    modules = (called & sys.stdlib_module_names) - vars(builtins).keys()
    if used - vars(builtins).keys() - modules:
        return None
    candidates = modules or called & vars(builtins).keys()
    return candidates.pop() if len(candidates) == 1 else None


def _defined_names(tree: ast.Module) -> set[str]:
    """Return the names that tests give to something themselves, anywhere."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            found.add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            found.add(node.name)
        elif isinstance(node, ast.alias):
            found.add((node.asname or node.name).partition(".")[0])
    return found


def _with_counted_assertions(code: str) -> ast.Module:
    """Parse tests so that a failed assertion is counted and does not end them."""
    tree: ast.Module = _CountAssertions().visit(ast.parse(code))
    return ast.fix_missing_locations(tree)


class _CountAssertions(ast.NodeTransformer):
    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        where = f"line {node.lineno}"
        (template,) = ast.parse(
            f"try:\n if not 0: {_FAILED}({where!r})\n"
            f"except Exception as __error__: {_FAILED}({where!r}, __error__)\n"
        ).body
        assert isinstance(template, ast.Try)
        (condition,) = template.body
        assert isinstance(condition, ast.If)
        assert isinstance(condition.test, ast.UnaryOp)
        condition.test.operand = node.test
        return template
