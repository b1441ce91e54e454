"""The sandbox for sampled programs: what they can do, and that nothing fakes success."""

import os
import platform
import socket
import sys
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


def _run(code: str, tests: str = TESTS, limits: Limits = SHORT, **fields: str) -> Outcome:
    job = Job((code,), fields.get("prompt", ""), fields.get("setup", ""), tests, None)
    (found,) = run_programs([job], limits)
    return found


def _returns(text: str) -> str:
    """Return a program whose f evaluates a text, in which nothing need hold."""
    return f"def f(x):\n    return {text}\n"


# -- verdicts --------------------------------------------------------------------------------------


def test_right_and_wrong_programs_in_order() -> None:
    codes = {
        "def f(x):\n    return x * x\n": "passed",
        "def f(x):\n    return x + 2\n": "failed",
        "def f(x:\n    return x\n": "failed",
        "def f(x):\n    raise ValueError(x)\n": "failed",
        "def g(x):\n    return x * x\n": "failed",
        "": "failed",
        "import nowhere\ndef f(x):\n    return x * x\n": "failed",
        "f = lambda x: x ** 2.0\n": "passed",
        "\0": "failed",
        "def f(x):\n    return '\udc80'\n": "failed",
        "def f(x):\n    return " + "(" * 5000 + ")" * 5000: "failed",
        "def f(x):\n    return f(x)\n": "failed",
    }
    jobs = [Job((code,), "", "", TESTS, None) for code in codes]
    found = run_programs(jobs, SHORT, workers=3)
    assert [outcome.outcome for outcome in found] == list(codes.values())
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
    found = run_programs([whole, unknown, empty], SHORT)
    assert [outcome.outcome for outcome in found] == ["passed", "failed", "failed"]


def test_values_keep_their_types() -> None:
    values = [
        "None, True, 1.5, 'a', [1, (2,)], {1: {'b'}}, frozenset({3}), b'x', 2j, range(3), 7**60",
        "float('inf'), -0.0, '\\ud800', {(1, 2): []}, set(), ()",
    ]
    for value in values:
        assert _run(f"def f():\n    return {value}\n", f"assert f() == ({value})").detail == ""
        assert _run("def f(x):\n    return x\n", f"assert f(({value})) == ({value})").detail == ""
    assert _run("def f():\n    return [1]\n", "assert f() == (1,)").outcome == "failed"
    assert _run("def f():\n    return 1\n", "assert f() is True").outcome == "failed"
    nan = "assert f() != f() and f() > 1 - f() or True"
    assert _run("def f():\n    return float('nan')\n", nan).outcome == "passed"


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
    with pytest.raises(FaultyTestsError, match="an argument of type object"):
        _run("def f(x):\n    return x\n", "assert f(object()) == 1")
    swallowed = "try:\n    f(object())\nexcept:\n    pass\nassert True"
    with pytest.raises(FaultyTestsError, match="an argument of type object"):
        _run("def f(x):\n    return x\n", swallowed)


def test_a_program_cannot_make_the_tests_look_faulty() -> None:
    """That would end the scoring; a value that grows too long fails the program instead."""
    big = "def f(x):\n    return 'x' * (15 << 20)\ndef g(x):\n    return 1\n"
    limits = Limits(cpu_s=20)
    assert _run(big, "assert g([f(1), f(2)]) == 1", limits).outcome == "failed"
    code = "def f(double):\n    return len(double('x' * (15 << 20)))\n"
    assert _run(code, "assert f(lambda x: x + x) == 1", limits).outcome == "failed"


# -- faked success ---------------------------------------------------------------------------------

FAKES = {
    "exit 0 when loaded": "import sys\nsys.exit(0)\n",
    "exit 0 when called": "import sys\ndef f(x):\n    sys.exit(0)\n",
    "hard exit when loaded": "import os\nos._exit(0)\n",
    "hard exit when called": "import os\ndef f(x):\n    os._exit(0)\n",
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
    "printed success": 'print(\'{"outcome": "passed", "detail": ""}\')\ndef f(x):\n    return 7\n',
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
    assert _run("import os\ndef f(x):\n    os._exit(0)\n", tests).outcome == "died"


def test_the_tests_use_their_own_modules() -> None:
    tests = "assert math.isclose(f(2), 4)"
    assert _run("import math\ndef f(x):\n    return math.sqrt(x ** 4)\n", tests).detail == ""
    assert "NameError" in _run("def f(x):\n    return x * x\n", tests).detail
    fake = "class math:\n    isclose = lambda *args: True\ndef f(x):\n    return 7\n"
    assert _run(fake, tests).outcome == "failed"


# -- limits ----------------------------------------------------------------------------------------


def test_endless_programs_end() -> None:
    computing = (
        "def f(x):\n    while True:\n        pass\n",
        "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass\n",
    )
    waiting = (
        "import time\ndef f(x):\n    time.sleep(1000)\n",
        "import os, signal\ndef f(x):\n    os.kill(os.getpid(), signal.SIGSTOP)\n",
        "import itertools\ndef f(x):\n    return sum(itertools.count())\n",
    )
    for codes, limits in ((computing, SHORT), (waiting, Limits(600, 2.0))):
        found = run_programs([Job((code,), "", "", TESTS, None) for code in codes], limits)
        assert {outcome.outcome for outcome in found} == {"timeout"}


def test_a_late_program_does_not_disturb_the_next() -> None:
    late = Job(("import time\ntime.sleep(1000)",), "", "", TESTS, None)
    right = Job(("def f(x): return x * x",), "", "", TESTS, None)
    found = run_programs([late, right, late, right], Limits(wall_s=3.0), workers=1)
    assert [outcome.outcome for outcome in found] == ["timeout", "passed", "timeout", "passed"]


def test_memory_is_bounded() -> None:
    bomb = "def f(x):\n    held = []\n    while True:\n        held.append(bytearray(1 << 24))\n"
    assert _run(bomb, limits=Limits(cpu_s=20)).outcome == "failed"
    huge = _returns("'x' * (40 << 20)")
    assert _run(huge, limits=Limits(cpu_s=20)).outcome == "failed", "a value above 16 MiB"


def test_endless_answers_end() -> None:
    code = "import itertools\ndef f(x):\n    return itertools.count()\n"
    found = _run(code, "assert list(f(1)) == 1", Limits(cpu_s=600, wall_s=2.0))
    assert found.outcome == "timeout"


def test_output_goes_nowhere() -> None:
    code = (
        "import sys\ndef f(x):\n    block = 'x' * (1 << 24)\n    for _ in range(64):\n"
        "        sys.stdout.write(block); sys.stderr.write(block)\n    return x * x\n"
    )
    assert _run(code, limits=Limits(cpu_s=60)).outcome == "passed"
    assert _run(_returns("input()")).outcome == "failed", "stdin is closed"


def test_no_processes() -> None:
    bomb = "import os\ndef f(x):\n    while True:\n        os.fork()\n"
    assert _run(bomb).outcome == "failed"
    for text in (
        "__import__('subprocess').run(['true'])",
        "__import__('os').system('true')",
        "__import__('os').execv('/bin/true', ['true'])",
        "__import__('os').posix_spawn('/bin/true', ['true'], {})",
    ):
        code = f"def f(x):\n    try:\n        return {text} and 7\n    except OSError:\n"
        assert _run(code + "        return x * x\n").outcome in ("passed", "failed"), text
        assert _run(code + "        return x * x\n").outcome == (
            "failed" if "system" in text else "passed"
        ), text


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


def test_no_network() -> None:
    """Also to this machine: the listener here never hears anything."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        port = server.getsockname()[1]
        code = f"""
import errno, socket
def refused(make):
    try:
        make()
    except OSError as error:
        return error.errno == errno.EPERM
    return False
def f(x):
    calls = [lambda: socket.create_connection(("127.0.0.1", {port}), 1)]
    for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK):
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW):
            calls.append(lambda: socket.socket(family, kind))
    calls.append(socket.socketpair)
    return x * x if all(map(refused, calls)) else 7
"""
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
    code = f"""
import os, shutil
def refused(make, *args):
    try:
        make(*args)
    except OSError:
        return True
    return False
def f(x):
    kept, new = {str(kept)!r}, {str(tmp_path / "new")!r}
    calls = [(open, kept, "w"), (open, kept, "a"), (open, kept, "r+"), (open, new, "x"),
             (open, "here", "w"), (os.remove, kept), (os.rename, kept, new), (os.mkdir, new),
             (os.truncate, kept, 0), (os.chmod, kept, 0o777), (os.symlink, kept, new),
             (os.link, kept, new), (shutil.rmtree, {str(tmp_path)!r}), (os.utime, kept),
             (os.mkfifo, new), (os.rmdir, {str(tmp_path)!r})]
    return x * x if all(refused(*call) for call in calls) else 7
"""
    assert _run(code).detail == ""
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("kept.txt", "kept")]


def test_no_signals_to_others_and_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "secret")
    code = f"""
import os, resource, signal
def refused(make, *args):
    try:
        make(*args)
    except OSError:
        return True
    return False
def f(x):
    calls = [(os.kill, process, signal.SIGKILL) for process in (os.getppid(), {os.getpid()}, 0, -1)]
    calls.append((resource.prlimit, {os.getpid()}, resource.RLIMIT_CPU, (1, 1)))
    calls.append((os.setsid,))
    clean = "SECRET_TOKEN" not in os.environ and os.listdir(".") == []
    return x * x if clean and all(refused(*call) for call in calls) else 7
"""
    if _has_landlock():  # which refuses to list the folder
        code = code.replace('os.listdir(".") == []', 'refused(os.listdir, ".")')
    assert _run(code).detail == ""


def _has_landlock() -> bool:
    import ctypes

    return ctypes.CDLL(None).syscall(444, None, 0, 1) >= 1


@pytest.mark.skipif(not _has_landlock(), reason="this kernel has no Landlock; files can be read")
def test_other_files_cannot_be_read(tmp_path: Path) -> None:
    data = tmp_path / "tests.jsonl"
    data.write_text("answers")
    package = next(path for path in sys.path if path.endswith("site-packages"))
    installed = next(Path(package).glob("*.dist-info/METADATA"))
    code = f"""
import os
def refused(make, *args):
    try:
        make(*args)
    except PermissionError:
        return True
    return False
def f(x):
    calls = [(open, {str(data)!r}), (os.listdir, {str(tmp_path)!r}), (open, "/etc/passwd"),
             (open, {__file__!r}), (open, {str(installed)!r}), (os.listdir, "/"),
             (open, "/proc/self/environ"), (open, "/proc/self/maps")]
    return x * x if all(refused(*call) for call in calls) else 7
"""
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
    assert _run("import numpy\ndef f(x):\n    return x * x\n").outcome == "failed"


# -- state -----------------------------------------------------------------------------------------


def test_no_state_between_programs() -> None:
    """One judge serves them in turn; what the first leaves behind, the second must not see."""
    leaves = (
        "import builtins, os, sys\nbuiltins.left = 1\nos.environ['LEFT'] = '1'\n"
        "sys.modules['left'] = sys\ndef f(x):\n    return x * x\n"
    )
    looks = (
        "import builtins, os, sys\n"
        "seen = hasattr(builtins, 'left') or 'LEFT' in os.environ or 'left' in sys.modules\n"
        "def f(x):\n    return 7 if seen else x * x\n"
    )
    tests = TESTS + "import builtins\nassert not hasattr(builtins, 'by_tests')\n"
    tests += "builtins.by_tests = True\n"
    jobs = [Job((code,), "", "", tests, None) for code in (leaves, looks, leaves, looks)]
    found = run_programs(jobs, SHORT, workers=1)
    assert [outcome.detail for outcome in found] == ["", "", "", ""]


def test_behaviour() -> None:
    """Equal values make equal behaviour, whatever is expected of them."""
    same = [
        "def f(x):\n    return x * x + 1\n",
        "def f(x):\n    return 1 + x ** 2.0\n",
        "def f(x):\n    return float(x * x) + 1 + 1e-13\n",
    ]
    other = ["def f(x):\n    return x * x + 2\n", "def f(x):\n    return str(x * x + 1)\n"]
    broken = ["def f(x):\n    return None.x\n", "def f(x:", "import os\nos._exit(0)\n"]
    codes = same + other + broken
    found = run_programs([Job((code,), "", "", TESTS, None) for code in codes], SHORT)
    first = found[0].behaviour
    assert first is not None
    assert [outcome.behaviour == first for outcome in found] == [True] * 3 + [False] * 5
    assert found[3].behaviour != found[4].behaviour
    assert [outcome.behaviour for outcome in found[5:]] == [None] * 3
    elsewhere = Job((same[0],), "", "", "assert f(2) == 5\nassert f(-3) == 10\n", None)
    (right,) = run_programs([elsewhere], SHORT)
    assert right.outcome == "passed"
    assert right.behaviour == first, "the expected values do not matter"


def test_sets_and_random_tests_are_repeatable() -> None:
    code = "def f(x):\n    return list({'alpha', 'beta', 'gamma', 'delta'}) + [x]\n"
    tests = "import random\nassert f(random.random()) == 1\n"
    assert len({_run(code, tests).behaviour for _ in range(3)}) == 1
