"""How a sampled program's process is confined: the filter, systems without it, clean ends."""

import json
import os
import platform
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lm_eval_tasks.errors import InputError
from lm_eval_tasks.programs import confine, sandbox
from lm_eval_tasks.programs.confine import Limits
from lm_eval_tasks.programs.sandbox import Job, Outcome, run_programs

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"),
    reason="programs are run with Linux's seccomp filters only",
)


def _run(code: str) -> Outcome:
    (found,) = run_programs([Job((code,), "", "", "assert f(2) == 4\nassert f(-3) == 9", None)])
    return found


def _change_the_child(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Let every child run a line of code before it serves; ``c`` is its `confine` module."""
    *options, boot = sandbox._COMMAND
    assert boot.endswith("; main()")
    line = f"import lm_eval_tasks.programs.confine as c; {code}; main()"
    monkeypatch.setattr(sandbox, "_COMMAND", (*options, boot.removesuffix("main()") + line))


def test_nothing_runs_unconfined(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The child is told that this is another system: it must refuse, not run the program bare."""
    _change_the_child(monkeypatch, "c.platform.machine = lambda: 'riscv64'")
    with pytest.raises(InputError) as raised:
        _run("def f(x):\n    return x * x\n")
    assert raised.value.code == 2
    assert "need Linux on x86_64 or aarch64" in capsys.readouterr().err


def test_a_filter_that_is_not_applied_is_noticed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An emulator may take it and do nothing; a filter that allows everything stands for that."""
    _change_the_child(monkeypatch, "c._filter = lambda *_: [c._instruction(c._RET, c._ALLOW)]")
    with pytest.raises(InputError):
        _run("def f(x):\n    return x * x\n")
    assert "took the seccomp filter and does not apply it" in capsys.readouterr().err


_ALLOW, _EPERM, _ENOSYS, _EROFS = 0x7FFF0000, 0x50001, 0x50026, 0x5001E


@pytest.mark.parametrize(
    ("machine", "arch", "numbers"),
    [
        (
            "x86_64",
            0xC000003E,
            {"read": 0, "mmap": 9, "openat": 257, "clone": 56, "kill": 62, "tgkill": 234}
            | {"fcntl": 72, "ioctl": 16, "prlimit64": 302, "socket": 41, "connect": 42}
            | {"execve": 59, "ptrace": 101, "unlinkat": 263, "prctl": 157},
        ),
        (
            "aarch64",
            0xC00000B7,
            {"read": 63, "mmap": 222, "openat": 56, "clone": 220, "kill": 129, "tgkill": 131}
            | {"fcntl": 25, "ioctl": 29, "prlimit64": 261, "socket": 198, "connect": 203}
            | {"execve": 221, "ptrace": 117, "unlinkat": 35, "prctl": 167},
        ),
    ],
)
def test_the_filter_decides_alike_on_both_architectures(
    machine: str, arch: int, numbers: dict[str, int]
) -> None:
    """By a machine for filters written out here, since a test runs on one architecture only."""
    code = [struct.unpack("=HBBI", line) for line in confine._filter(machine, pid=77)]

    def decide(name: str | int, *args: int, arch: int = arch) -> int:
        number = name if isinstance(name, int) else numbers[name]
        data = struct.pack("=IIQ6Q", number, arch, 0, *[*args, *[0] * (6 - len(args))])
        at, register = 0, 0
        while True:
            operation, if_true, if_false, value = code[at]
            at += 1
            if operation == 0x06:
                return value
            if operation == 0x20:
                (register,) = struct.unpack_from("=I", data, value)
                continue
            is_true = {
                0x15: register == value,
                0x35: register >= value,
                0x45: bool(register & value),
            }[operation]
            at += if_true if is_true else if_false

    assert decide("read", arch=0x40000003) == 0x80000000, "32-bit calls end the process"
    for allowed in ("read", "mmap"):
        assert decide(allowed) == _ALLOW
    for refused in ("socket", "connect", "execve", "ptrace", "unlinkat", "prctl"):
        assert decide(refused) == _EPERM
    assert decide(425) == decide(435) == decide(numbers["socket"] | 0x40000000) == _ENOSYS
    assert decide("openat", 0, 0, os.O_RDONLY | os.O_CLOEXEC) == _ALLOW
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC, os.O_TMPFILE | os.O_RDWR):
        assert decide("openat", 0, 0, flags) == _EROFS
    assert decide("clone", 0x10000) == _ALLOW
    assert decide("clone", 17) == _EPERM
    for name in ("kill", "tgkill"):
        assert decide(name, 77) == _ALLOW
        assert [decide(name, other & 0xFFFFFFFF) for other in (76, 0, -1)] == [_EPERM] * 3
    assert (decide("fcntl", 0, 1), decide("fcntl", 0, 8)) == (_ALLOW, _EPERM)
    assert (decide("ioctl", 0, 0x5401), decide("ioctl", 0, 0x5412)) == (_ALLOW, _EPERM)
    assert decide("prlimit64", 0, 0, 0) == _ALLOW
    assert decide("prlimit64", 0, 0, 1) == decide("prlimit64", 0, 0, 1 << 32) == _EPERM


def test_the_judges_memory_is_closed_without_landlock_too(monkeypatch: pytest.MonkeyPatch) -> None:
    _change_the_child(monkeypatch, "c._restrict_reading = lambda libc: None")
    code = """
import os
def f(x):
    try:
        open(f"/proc/{os.getppid()}/mem", "rb").close()
    except PermissionError:
        return x * x
"""
    assert _run(code).outcome == "passed"
    seen = "def f(x):\n    open('/etc/passwd').close()\n    return x * x\n"
    assert _run(seen).outcome == "passed", "such kernels do not hide files; the docs say so"


def test_interrupted_runs_leave_no_process(tmp_path: Path) -> None:
    """After a kill -9 of the scorer, the program that never ends is gone too."""
    script = tmp_path / "score.py"
    script.write_text(
        "import sys\nfrom lm_eval_tasks.programs.confine import Limits\n"
        "from lm_eval_tasks.programs.sandbox import Job, run_programs\n"
        "code = 'import time\\nwhile True: time.sleep(0.01)'\n"
        "print('started', flush=True)\n"
        "run_programs([Job((code,), '', '', 'assert 1', None)], Limits(600, 600.0))\n"
    )
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"started\n"
    children = _wait_for(lambda: _descendants(process.pid), 3)
    process.kill()
    process.wait()
    process.stdout.close()
    _wait_for(lambda: [1] if not any(map(_is_alive, children)) else [], 1)


def _wait_for(find: Callable[[], list[int]], count: int) -> list[int]:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = find()
        if len(found) >= count:
            return found
        time.sleep(0.05)
    raise AssertionError(f"waited a minute for {count}")


def _descendants(process: int) -> list[int]:
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(entry.name)] = int(fields[1])
    found = [process]
    for parent in found:
        found += [child for child, of in parents.items() if of == parent]
    return found[1:]


def _is_alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_jobs_are_json() -> None:
    """The child reads limits as a list: a field more must be added at both ends."""
    assert Limits(*json.loads(json.dumps(Limits()))) == Limits()
