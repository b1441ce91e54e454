"""The sandbox for sampled programs: what they can do, and that nothing fakes success."""

import os
import platform
import socket
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from lm_eval_tasks.programs.confine import Limits
from lm_eval_tasks.programs.sandbox import FaultyTestsError, Job, Outcome, run_programs

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"),
    reason="programs are run with Linux's seccomp filters only",
)

#: Generous in wall-clock time, so that a loaded machine gives the same verdicts.
SHORT = Limits(cpu_s=1, wall_s=60.0)
TESTS = "assert f(2) == 4\nassert f(-3) == 9\n"


def _job(code: str, tests: str = TESTS, setup: str = "") -> Job:
    return Job((code,), "", setup, tests, None)


def _run(code: str, tests: str = TESTS, limits: Limits = SHORT, setup: str = "") -> Outcome:
    (found,) = run_programs([_job(code, tests, setup)], limits)
    return found


def _run_all(
    codes: Iterable[str], tests: str = TESTS, limits: Limits = SHORT, workers: int | None = None
) -> list[Outcome]:
    return run_programs([_job(code, tests) for code in codes], limits, workers)


def _verdicts(outcomes: Iterable[Outcome]) -> list[str]:
    return [outcome.outcome for outcome in outcomes]


def _returns(text: str, imports: str = "") -> str:
    """Return a program whose f evaluates a text, in which nothing need hold."""
    begin = f"import {imports}\n" if imports else ""
    return f"{begin}def f(x):\n    return {text}\n"


def _right_if_refused(begin: str, calls: str, refusal: str = "True") -> str:
    """Return a program that passes `TESTS` if the system refuses it everything it tries.

    Args:
        begin: what the program does first; must not fail.
        calls: tuples of a function and its arguments, separated by commas.
        refusal: what must hold for the OSError of each, named ``error``.
    """
    return f"""
{begin}
def refused(make, *args):
    try:
        make(*args)
    except OSError as error:
        return {refusal}
    return False
def f(x):
    calls = [{calls}]
    return x * x if all(refused(*call) for call in calls) else 7
"""


RIGHT = _returns("x * x")


# -- verdicts --------------------------------------------------------------------------------------


def test_right_and_wrong_programs_in_order() -> None:
    codes = {
        RIGHT: "passed",
        _returns("x + 2"): "failed",
        "def f(x:\n    return x\n": "failed",
        "def f(x):\n    raise ValueError(x)\n": "failed",
        "def g(x):\n    return x * x\n": "failed",
        "": "failed",
        _returns("x * x", imports="nowhere"): "failed",
        "f = lambda x: x ** 2.0\n": "passed",
        "\0": "failed",
        _returns("'\udc80'"): "failed",
        _returns("(" * 5000 + ")" * 5000): "failed",
        _returns("f(x)"): "failed",
    }
    found = _run_all(codes, workers=3)
    assert _verdicts(found) == list(codes.values())
    details = [outcome.detail for outcome in found]
    assert details[0] == ""
    assert details[1] == "line 2"
    assert details[2] == "loading: SyntaxError"
    assert details[3] == "line 1: ValueError; line 2: ValueError"
    assert details[4] == "line 1: NameError; line 2: NameError"


def test_no_programs() -> None:
    assert run_programs([]) == []


def test_a_check_function_and_the_prompts_helpers() -> None:
    prompt = "import math\n\n\ndef double(x):\n    return 2 * x\n\n\ndef area(r):\n    '''Doc.'''\n"
    tests = "def check(candidate):\n    assert abs(candidate(1) - math.pi) < 1e-6\n"
    tests += "    assert candidate(double(1)) > 12\n"
    whole = Job((prompt, "def area(r): return math.pi * r * r"), prompt, "", tests, "area")
    unknown = Job((prompt, "def volume(r): return 0"), prompt, "", tests, "volume")
    empty = Job((prompt,), prompt, "", tests, "area")
    assert _verdicts(run_programs([whole, unknown, empty], SHORT)) == ["passed", "failed", "failed"]


@pytest.mark.parametrize(
    "value",
    [
        "None, True, 1.5, 'a', [1, (2,)], {1: {'b'}}, frozenset({3}), b'x', 2j, range(3), 7**60",
        "float('inf'), -0.0, '\\ud800', {(1, 2): []}, set(), ()",
    ],
)
def test_values_are_the_same_on_the_other_side(value: str) -> None:
    """Those that the program returns, and those that it is given."""
    assert _run(_returns(value), f"assert f(0) == ({value})").detail == ""
    assert _run(_returns("x"), f"assert f(({value})) == ({value})").detail == ""


@pytest.mark.parametrize(
    ("value", "tests", "expected"),
    [
        ("[1]", "assert f(0) == (1,)", "failed"),
        ("1", "assert f(0) is True", "failed"),
        ("float('nan')", "assert f(0) != f(0) and not f(0) > 1", "passed"),
    ],
)
def test_values_keep_their_types(value: str, tests: str, expected: str) -> None:
    assert _run(_returns(value), tests).outcome == expected


def test_objects_of_the_program_are_used_where_they_are() -> None:
    code = """
import collections
class Node:
    def __init__(self, value):
        self.value, self.next = value, None
    def __len__(self):
        return 1 + (len(self.next) if self.next else 0)
def total(node):
    return node.value + (total(node.next) if node.next else 0)
def squares(n):
    return (i * i for i in range(n))
def apply(function, items):
    return sorted(items, key=function)
def of_type(kind, items):
    return [item for item in items if isinstance(item, kind)]
def table():
    return collections.Counter("aab")
LIMIT = 7
def fails():
    raise KeyError("k")
"""
    tests = """
assert total(root) == 3
assert len(root) == 2 and bool(root) and root.next.value == 2
assert list(squares(4)) == [0, 1, 4, 9]
assert apply(lambda x: -x, [1, 3, 2]) == [3, 2, 1]
assert apply(len, ["aa", "b"]) == ["b", "aa"]
assert of_type(int, [1, "a"]) == [1]
assert table() == {"a": 2, "b": 1}
assert LIMIT == 7
try:
    fails()
    assert False
except KeyError:
    pass
"""
    setup = "root = Node(1)\nroot.next = Node(2)\n"
    assert _run(code, tests, setup=setup) == _run(code, tests, setup=setup)
    assert _run(code, tests, setup=setup).detail == ""


def test_tests_that_cannot_be_run_are_no_verdict() -> None:
    swallowed = "try:\n    f(object())\nexcept:\n    pass\nassert True"
    for tests in ("assert f(object()) == 1", swallowed):
        with pytest.raises(FaultyTestsError, match="an argument of type object"):
            _run(_returns("x"), tests)


def test_a_program_cannot_make_the_tests_look_faulty() -> None:
    """That would end the scoring; a value that grows too long fails the program instead."""
    big = _returns("'x' * (15 << 20)") + "def g(x):\n    return 1\n"
    limits = Limits(cpu_s=20)
    assert _run(big, "assert g([f(1), f(2)]) == 1", limits).outcome == "failed"
    code = _returns("len(x('x' * (15 << 20)))")
    assert _run(code, "assert f(lambda x: x + x) == 1", limits).outcome == "failed"


# -- faked success ---------------------------------------------------------------------------------

FAKES = {
    "exit 0 when loaded": "import sys\nsys.exit(0)\n",
    "exit 0 when called": _returns("sys.exit(0)", imports="sys"),
    "hard exit when loaded": "import os\nos._exit(0)\n",
    "hard exit when called": _returns("os._exit(0)", imports="os"),
    "equal to everything": """
class A:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
def f(x):
    return A()
""",
    "an int equal to everything": """
class A(int):
    def __eq__(self, other): return True
def f(x):
    return A(7)
""",
    "printed success": 'print(\'{"outcome": "passed", "detail": ""}\')\n' + _returns("7"),
    "written to every file": """
import os
REPORT = b'{"outcome": "passed", "detail": "", "behaviour": null}\\n'
def f(x):
    for number in range(256):
        try:
            os.write(number, REPORT)
        except OSError:
            pass
    return 7
""",
    "forged answers": """
import json, os
def f(x):
    message = json.dumps(["callback", 0, [], {}]).encode()
    for number in range(3, 256):
        try:
            os.write(number, len(message).to_bytes(4, "big") + message)
        except OSError:
            pass
    return 7
""",
    "patched builtins": """
import builtins, ast, json, sys, types
builtins.AssertionError = Exception
builtins.compile = builtins.exec = lambda *args, **kwargs: None
json.dumps = lambda *args, **kwargs: '["value", null]'
for module in list(sys.modules.values()):
    if getattr(module, "__name__", "").startswith("lm_eval_tasks"):
        for name, value in list(vars(module).items()):
            if isinstance(value, types.FunctionType):
                setattr(module, name, lambda *args, **kwargs: None)
def f(x):
    return 7
""",
    "the tests in memory": """
import gc, sys
def f(x):
    frame = sys._getframe()
    texts = []
    while frame:
        texts += [repr(value) for value in frame.f_locals.values()]
        frame = frame.f_back
    texts += [text for item in gc.get_objects() if isinstance(item, dict)
              for text in item.values() if isinstance(text, str)]
    found = [text for text in texts if "assert " + "f(2)" in text]
    return 4 if found and x == 2 else 9 if found else 7
""",
    "the judge's memory": """
import os
def f(x):
    try:
        found = open(f"/proc/{os.getppid()}/mem", "rb")
    except OSError:
        return 7
    return x * x
""",
    "standing in for the function": "import builtins\nbuiltins.f = lambda x: x * x\n"
    "check = lambda *args: None\n",
}


@pytest.mark.parametrize("name", FAKES)
def test_faked_success_fails(name: str) -> None:
    assert _run(FAKES[name]).outcome in ("failed", "died")


def test_a_bare_except_in_the_tests_does_not_hide_the_end() -> None:
    tests = "try:\n    f(1)\nexcept:\n    pass\nassert True"
    assert _run(FAKES["hard exit when called"], tests).outcome == "died"


def test_the_tests_use_their_own_modules() -> None:
    tests = "assert math.isclose(f(2), 4)"
    assert _run(_returns("math.sqrt(x ** 4)", imports="math"), tests).detail == ""
    assert "NameError" in _run(RIGHT, tests).detail
    fake = "class math:\n    isclose = lambda *args: True\n" + _returns("7")
    assert _run(fake, tests).outcome == "failed"


def test_a_function_with_the_name_of_a_builtin() -> None:
    """Problem 126 of MBPP asks for a function named sum."""
    tests = "assert sum(10,15) == 6\nassert sum(100,150) == 93\nassert sum(4,6) == 3"
    right = "def sum(a, b):\n    found = [i for i in range(1, a) if not a % i + b % i]\n"
    right += "    return __builtins__['sum'](found)"
    assert _run(right, tests).detail == ""
    assert _run("def sum(a, b):\n    return 6", tests).outcome == "failed"
    assert "TypeError" in _run(RIGHT, tests).detail
    for_each = "for a, b in [(4, 6)]:\n    assert sum(a, b) == 3"
    assert _run(right, for_each).detail == ""


@pytest.mark.parametrize(
    ("code", "tests"),
    [
        ("def code(a):\n    return a + 1", "assert code(1) == 2\nassert set([code(2)]) == {3}"),
        ("class queue:\n    def size(self): return 0", "assert queue().size() == 0"),
    ],
)
def test_a_function_with_the_name_of_a_module(code: str, tests: str) -> None:
    assert _run(code, tests).detail == ""


@pytest.mark.parametrize(
    ("fake", "tests"),
    [
        ("set = lambda x: 1", "assert set(f(1)) == {2}"),
        ("set = lambda x: 1\n" + _returns("7"), "assert set(f(1)) == set([2])"),
        ("set = lambda x: 1", "assert set(sum(1, 2)) == set([3])"),
        ("set = sum = lambda *x: 1", "assert set(sum(1, 2)) == set([3])"),
        ("date = datetime = lambda *x: 1\n" + _returns("1"), "assert f(1) == datetime(2020, 1, 1)"),
        ("code = datetime = lambda *x: 1", "assert code(1) == datetime(2020, 1, 1)"),
        ("abs = lambda x: 0\n" + _returns("7"), "g = f\nassert abs(g(1) - 1) < 1"),
    ],
)
def test_a_program_does_not_replace_what_tests_compare_with(fake: str, tests: str) -> None:
    assert _run(fake, tests).outcome == "failed"


def test_a_builtin_beside_a_named_function_stays() -> None:
    """The entry point, or the code before the tests, already names what is tested."""
    tests = "def check(candidate):\n    assert abs(candidate(3) - 9) < 1\n"
    fake = "abs = lambda x: 0\n" + _returns("7")
    (found,) = run_programs([Job((fake,), "", "", tests, "f")], SHORT)
    assert found.outcome == "failed"
    assert _run(fake, "assert abs(g - 9) < 1", setup="g = f(3)").outcome == "failed"


# -- limits ----------------------------------------------------------------------------------------


def test_endless_programs_end() -> None:
    computing = (
        "def f(x):\n    while True:\n        pass\n",
        "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass\n",
    )
    waiting = (
        _returns("time.sleep(1000)", imports="time"),
        _returns("os.kill(os.getpid(), signal.SIGSTOP)", imports="os, signal"),
        _returns("sum(itertools.count())", imports="itertools"),
    )
    for codes, limits in ((computing, SHORT), (waiting, Limits(600, 2.0))):
        assert set(_verdicts(_run_all(codes, limits=limits))) == {"timeout"}


def test_a_late_program_does_not_disturb_the_next() -> None:
    late = "import time\ntime.sleep(1000)"
    found = _run_all([late, RIGHT, late, RIGHT], limits=Limits(wall_s=3.0), workers=1)
    assert _verdicts(found) == ["timeout", "passed", "timeout", "passed"]


def test_memory_is_bounded() -> None:
    bomb = "def f(x):\n    held = []\n    while True:\n        held.append(bytearray(1 << 24))\n"
    assert _run(bomb, limits=Limits(cpu_s=20)).outcome == "failed"
    huge = _returns("'x' * (40 << 20)")
    assert _run(huge, limits=Limits(cpu_s=20)).outcome == "failed", "a value above 16 MiB"


def test_endless_answers_end() -> None:
    code = _returns("itertools.count()", imports="itertools")
    found = _run(code, "assert list(f(1)) == 1", Limits(cpu_s=600, wall_s=2.0))
    assert found.outcome == "timeout"


def test_output_goes_nowhere() -> None:
    code = (
        "import sys\ndef f(x):\n    block = 'x' * (1 << 24)\n    for _ in range(64):\n"
        "        sys.stdout.write(block); sys.stderr.write(block)\n    return x * x\n"
    )
    assert _run(code, limits=Limits(cpu_s=60)).outcome == "passed"
    assert _run(_returns("input()")).outcome == "failed", "stdin is closed"


def test_no_fork() -> None:
    bomb = "import os\ndef f(x):\n    while True:\n        os.fork()\n"
    assert _run(bomb).outcome == "failed"


def test_no_other_programs() -> None:
    calls = "(subprocess.run, ['true']), (os.execv, '/bin/true', ['true']),"
    calls += "(os.posix_spawn, '/bin/true', ['true'], {})"
    code = _right_if_refused("import os, subprocess", calls, "isinstance(error, PermissionError)")
    assert _run(code).detail == ""
    # This one says it by its value and not by an error.
    assert _run(_returns("os.system('true') == 0 and x * x", imports="os")).outcome == "failed"


def test_threads_are_allowed() -> None:
    code = """
import threading
def f(x):
    found = []
    thread = threading.Thread(target=lambda: found.append(x * x))
    thread.start()
    thread.join()
    return found[0]
"""
    assert _run(code).outcome == "passed"


# -- outside ---------------------------------------------------------------------------------------


def test_right_if_refused() -> None:
    """The helper of these tests: one call that works is enough to fail, and so is a wrong error."""
    assert _run(_right_if_refused("", "(open, '/nowhere')")).outcome == "passed"
    assert _run(_right_if_refused("", "(open, '/nowhere'), (len, 'a')")).outcome == "failed"
    assert _run(_right_if_refused("", "(open, '/nowhere')", "error.errno < 0")).outcome == "failed"


def test_no_network() -> None:
    """Also to this machine: the listener here never hears anything."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        port = server.getsockname()[1]
        begin = """
import errno, socket
FAMILIES = (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK)
KINDS = (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW)
"""
        calls = f"""
             (socket.create_connection, ("127.0.0.1", {port}), 1), (socket.socketpair,),
             *((socket.socket, family, kind) for family in FAMILIES for kind in KINDS)"""
        code = _right_if_refused(begin, calls, "error.errno == errno.EPERM")
        assert _run(code).detail == ""
        with pytest.raises(TimeoutError):
            server.accept()


def test_no_network_by_raw_system_calls() -> None:
    """A program that brings its own system calls, 64-bit numbers of newer interfaces included."""
    if platform.machine() != "x86_64":
        pytest.skip("numbers of x86_64")
    code = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def f(x):
    found = []
    # socket, sendto, bind, fork, vfork, execve, ptrace, unlink, x32 socket, io_uring_setup, clone3
    for number in (41, 44, 49, 57, 58, 59, 101, 87, 41 | 0x40000000, 425, 435, 310, 311, 438, 155):
        ctypes.set_errno(0)
        found.append((libc.syscall(number, 0, 0, 0), ctypes.get_errno()))
    return x * x if all(r == -1 and e in (1, 38) for r, e in found) else 7
"""
    assert _run(code).detail == ""


def test_nothing_is_written(tmp_path: Path) -> None:
    kept = tmp_path / "kept.txt"
    kept.write_text("kept")
    begin = f"""
import os, shutil
folder, kept, new = {str(tmp_path)!r}, {str(kept)!r}, {str(tmp_path / "new")!r}
"""
    calls = """
             (open, kept, "w"), (open, kept, "a"), (open, kept, "r+"), (open, new, "x"),
             (open, "here", "w"), (os.remove, kept), (os.rename, kept, new), (os.mkdir, new),
             (os.truncate, kept, 0), (os.chmod, kept, 0o777), (os.symlink, kept, new),
             (os.link, kept, new), (shutil.rmtree, folder), (os.utime, kept),
             (os.mkfifo, new), (os.rmdir, folder)"""
    assert _run(_right_if_refused(begin, calls)).detail == ""
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("kept.txt", "kept")]


def test_no_signals_to_others_and_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "secret")
    begin = 'import os, resource, signal\nassert "SECRET_TOKEN" not in os.environ\n'
    me = os.getpid()
    calls = f"""
             *((os.kill, process, signal.SIGKILL) for process in (os.getppid(), {me}, 0, -1)),
             (resource.prlimit, {me}, resource.RLIMIT_CPU, (1, 1)), (os.setsid,)"""
    if _has_landlock():  # which refuses to list the folder
        calls += ', (os.listdir, ".")'
    else:
        begin += 'assert os.listdir(".") == []\n'
    assert _run(_right_if_refused(begin, calls)).detail == ""


def _has_landlock() -> bool:
    import ctypes

    return ctypes.CDLL(None).syscall(444, None, 0, 1) >= 1


@pytest.mark.skipif(not _has_landlock(), reason="this kernel has no Landlock; files can be read")
def test_other_files_cannot_be_read(tmp_path: Path) -> None:
    data = tmp_path / "tests.jsonl"
    data.write_text("answers")
    package = next(path for path in sys.path if path.endswith("site-packages"))
    installed = next(Path(package).glob("*.dist-info/METADATA"))
    calls = f"""
             (open, {str(data)!r}), (os.listdir, {str(tmp_path)!r}), (open, "/etc/passwd"),
             (open, {__file__!r}), (open, {str(installed)!r}), (os.listdir, "/"),
             (open, "/proc/self/environ"), (open, "/proc/self/maps")"""
    code = _right_if_refused("import os", calls, "isinstance(error, PermissionError)")
    assert _run(code).detail == ""


def test_the_standard_library_is_there() -> None:
    names = (
        "asyncio bisect collections copy dataclasses datetime decimal fractions functools hashlib"
    )
    names += " heapq itertools json math operator queue random re statistics string sys typing"
    code = "".join(f"import {name}\n" for name in names.split())
    code += "@dataclasses.dataclass\nclass A:\n    x: 'int'\ndef f(x):\n    return A(x).x ** 2\n"
    code += "hashlib.sha256(b'').digest()\n"
    assert _run(code).detail == ""
    assert _run(_returns("x * x", imports="numpy")).outcome == "failed"


# -- state -----------------------------------------------------------------------------------------


def test_no_state_between_programs() -> None:
    """One judge serves them in turn; what the first leaves behind, the second must not see."""
    leaves = (
        "import builtins, os, sys\nbuiltins.left = 1\nos.environ['LEFT'] = '1'\n"
        "sys.modules['left'] = sys\n" + RIGHT
    )
    looks = (
        "import builtins, os, sys\n"
        "seen = hasattr(builtins, 'left') or 'LEFT' in os.environ or 'left' in sys.modules\n"
        + _returns("7 if seen else x * x")
    )
    tests = TESTS + "import builtins\nassert not hasattr(builtins, 'by_tests')\n"
    tests += "builtins.by_tests = True\n"
    found = _run_all([leaves, looks, leaves, looks], tests, workers=1)
    assert [outcome.detail for outcome in found] == ["", "", "", ""]


def test_behaviour() -> None:
    """Equal values make equal behaviour, whatever is expected of them."""
    same = list(map(_returns, ("x * x + 1", "1 + x ** 2.0", "float(x * x) + 1 + 1e-13")))
    other = [_returns("x * x + 2"), _returns("str(x * x + 1)")]
    broken = [_returns("None.x"), "def f(x:", "import os\nos._exit(0)\n"]
    found = _run_all(same + other + broken)
    first = found[0].behaviour
    assert first is not None
    assert [outcome.behaviour == first for outcome in found] == [True] * 3 + [False] * 5
    assert found[3].behaviour != found[4].behaviour
    assert [outcome.behaviour for outcome in found[5:]] == [None] * 3
    right = _run(same[0], "assert f(2) == 5\nassert f(-3) == 10\n")
    assert right.outcome == "passed"
    assert right.behaviour == first, "the expected values do not matter"


def test_sets_and_random_tests_are_repeatable() -> None:
    code = _returns("list({'alpha', 'beta', 'gamma', 'delta'}) + [x]")
    tests = "import random\nassert f(random.random()) == 1\n"
    assert len({_run(code, tests).behaviour for _ in range(3)}) == 1
