"""Take away from this very process, for good, everything that a sampled program does not need.

Linux on x86_64 and aarch64; no privileges, namespaces or containers are needed. In this order:

* resource limits: processor time, address space, open files, no bytes into files, no core dump;
* no capabilities, no new privileges, death with the parent, memory closed to the same user;
* Landlock, where the kernel has it: only Python's standard library, the system's shared libraries
  and time zones can be read;
* a seccomp filter that allows a list of system calls and refuses the rest: no sockets of any kind,
  no new processes or programs, no signals to others, no file opened for writing, created, renamed
  or removed, no limits or memory of others. Threads are allowed.

`confine` raises where a part other than Landlock cannot be had; nothing may run then. Everything
here ends with the process; a call cannot be undone. Sources: Linux
``Documentation/userspace-api/{seccomp_filter,landlock}.rst``, ``include/uapi/linux/landlock.h``.
"""

import ctypes
import errno
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Limits(NamedTuple):
    """What a program may use for all tests of its problem together."""

    cpu_s: int = 5
    """Processor time in s, which does not depend on what else the machine does."""
    wall_s: float = 60.0
    """Time in s, for a program that waits instead of computing."""
    memory_bytes: int = 512 << 20
    """Address space."""


class NotConfinedError(OSError):
    """The sandbox cannot be built here; the text says which part and why."""


_MAX_OPEN_FILES = 64
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38

# Numbers from the kernel's asm/unistd_64.h (x86_64) and asm-generic/unistd.h (aarch64).
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_ALLOWED = {
    "x86_64": {
        "files": (0, 1, 3, 4, 5, 6, 8, 17, 19, 20, 21, 22, 32, 33, 436, 439),
        "paths": (79, 80, 89, 137, 138, 217, 262, 267, 269, 292, 293, 332),
        "waiting": (7, 23, 232, 233, 270, 271, 281, 290, 291),
        "memory": (9, 10, 11, 12, 25, 28, 324),
        "threads": (24, 143, 145, 146, 147, 202, 204, 218, 273, 309, 334),
        "signals": (13, 14, 15, 127, 128, 130, 131, 219),
        "time": (35, 36, 37, 38, 96, 97, 98, 99, 100, 201, 228, 229, 230),
        "self": (39, 60, 61, 63, 102, 104, 107, 108, 110, 115, 121, 124, 186, 231, 318),
    },
    "aarch64": {
        "files": (23, 24, 57, 59, 62, 63, 64, 65, 66, 67, 80, 436, 439),
        "paths": (17, 43, 44, 48, 49, 61, 78, 79, 291),
        "waiting": (19, 20, 21, 22, 72, 73),
        "memory": (214, 215, 216, 222, 226, 233, 283),
        "threads": (96, 98, 99, 120, 121, 123, 124, 125, 126, 168, 293),
        "signals": (128, 132, 133, 134, 135, 136, 137, 139),
        "time": (101, 102, 103, 113, 114, 115, 153, 163, 165, 169, 179),
        "self": (93, 94, 155, 156, 158, 160, 172, 173, 174, 175, 176, 177, 178, 260, 278),
    },
}
# Allowed for some arguments only; open is the old call beside openat.
_LIMITED = {
    "x86_64": {
        "open": 2,
        "openat": 257,
        "fcntl": 72,
        "ioctl": 16,
        "clone": 56,
        "kill": 62,
        "tgkill": 234,
        "prlimit64": 302,
        "socket": 41,
    },
    "aarch64": {
        "openat": 56,
        "fcntl": 25,
        "ioctl": 29,
        "clone": 220,
        "kill": 129,
        "tgkill": 131,
        "prlimit64": 261,
        "socket": 198,
    },
}
_CLONE_THREAD = 0x00010000
_OPENS_TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
# Duplicating and flags only: F_SETOWN would send signals to others.
_FCNTL = (0, 1, 2, 3, 4, 1030)
# What Python asks of a new file: close on exec, non-blocking, whether it is a terminal.
_IOCTL = (0x5451, 0x5450, 0x5421, 0x5401)
#: From here on a call is new enough that the C library has another way when told it is missing.
_FIRST_NEW_CALL = 424

_LD, _JEQ, _JGE, _JSET, _RET = 0x20, 0x15, 0x35, 0x45, 0x06
_KILL_PROCESS, _ERRNO, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000


def confine(limits: Limits) -> None:
    """Confine the calling process, which must have one thread.

    Raises:
        NotConfinedError: a part of it cannot be had; the process must end then.
    """
    machine = platform.machine()
    if sys.platform != "linux" or machine not in _ALLOWED:
        raise NotConfinedError(
            f"need Linux on x86_64 or aarch64, this is {sys.platform} on {machine}"
        )
    set_limits(limits)
    libc = ctypes.CDLL(None, use_errno=True)
    header = struct.pack("=Ii", 0x20080522, 0)
    _call("dropping capabilities", libc.capset(header, bytes(24)))
    _prctl(libc, "no new privileges", _PR_SET_NO_NEW_PRIVS, 1)
    die_with_parent()
    _prctl(libc, "closing its memory", _PR_SET_DUMPABLE, 0)
    _restrict_reading(libc)
    code = b"".join(_filter(machine, os.getpid()))
    memory = ctypes.create_string_buffer(code, len(code))
    program = ctypes.create_string_buffer(
        struct.pack("@HP", len(code) // 8, ctypes.addressof(memory))
    )
    _prctl(libc, "seccomp filter", _PR_SET_SECCOMP, 2, ctypes.addressof(program))
    # Some emulators take the filter and do not apply it.
    number = _LIMITED[machine]["socket"]
    if libc.syscall(number, 2, 1, 0) >= 0 or ctypes.get_errno() != errno.EPERM:
        raise NotConfinedError("the kernel took the seccomp filter and does not apply it")
    try:
        # Where this fails every program would, and look wrong.
        os.close(os.open(os.__file__, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        raise NotConfinedError(f"Python's own library cannot be read inside: {error}") from None


def die_with_parent() -> None:
    """Let the kernel kill this process when its parent ends, however that ends.

    Raises:
        NotConfinedError: the kernel does not do that.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    _prctl(libc, "death with the parent", _PR_SET_PDEATHSIG, signal.SIGKILL)


def set_limits(limits: Limits) -> None:
    """Set the resource limits.

    Not among them: the number of processes, which the kernel counts over all processes of the user;
    the filter refuses every new one instead.
    """
    for kind, soft, hard in (
        (resource.RLIMIT_CPU, limits.cpu_s, limits.cpu_s + 1),  # the second is SIGKILL
        (resource.RLIMIT_AS, limits.memory_bytes, limits.memory_bytes),
        (resource.RLIMIT_NOFILE, _MAX_OPEN_FILES, _MAX_OPEN_FILES),
        (resource.RLIMIT_FSIZE, 0, 0),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        _, most = resource.getrlimit(kind)
        if most != resource.RLIM_INFINITY:
            soft, hard = min(soft, most), min(hard, most)
        resource.setrlimit(kind, (soft, hard))


def _prctl(libc: ctypes.CDLL, what: str, option: int, *values: int) -> None:
    words = [ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)[:4]]
    _call(what, libc.prctl(option, *words))


def _call(what: str, result: int) -> None:
    if result != 0:
        raise NotConfinedError(f"{what} failed: {os.strerror(ctypes.get_errno())}")


# -- Landlock -------------------------------------------------------------------------------------

_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446  # on every architecture
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/etc/localtime")


def _restrict_reading(libc: ctypes.CDLL) -> None:
    """Leave only Python's own library and the system's readable, if the kernel can do that."""
    if libc.syscall(_LANDLOCK_CREATE, None, 0, 1) < 1:
        return  # the caller documents that such kernels do not hide files
    ruleset = libc.syscall(_LANDLOCK_CREATE, struct.pack("=Q", _READ_FILE | _READ_DIR), 8, 0)
    if ruleset < 0:
        raise NotConfinedError(f"Landlock rules failed: {os.strerror(ctypes.get_errno())}")
    for path, access in _readable():
        try:
            opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue  # not on this system
        rule = struct.pack("=Qi", access, opened)
        _call(f"Landlock rule for {path}", libc.syscall(_LANDLOCK_ADD, ruleset, 1, rule, 0))
        os.close(opened)
    _call("Landlock", libc.syscall(_LANDLOCK_RESTRICT, ruleset, 0))
    os.close(ruleset)


def _readable() -> Iterator[tuple[str, int]]:
    """Yield what may be read, and how.

    Not the installed packages below the standard library: one of them may hold the tests.
    """
    for path in _LIBRARIES:
        yield path, _READ_FILE | (_READ_DIR if os.path.isdir(path) else 0)
    for device in ("/dev/null", "/dev/urandom", "/dev/random"):
        yield device, _READ_FILE
    for folder in sys.path:
        if os.path.isfile(folder):  # a standard library that is packed into one file
            yield folder, _READ_FILE
        if not os.path.isdir(folder):
            continue
        yield folder, _READ_DIR
        for entry in os.scandir(folder):
            if entry.name not in ("site-packages", "dist-packages"):
                yield entry.path, _READ_FILE | (_READ_DIR if entry.is_dir() else 0)
    shared = os.path.join(sys.base_prefix, "lib")
    for entry in os.scandir(shared) if os.path.isdir(shared) else ():
        if entry.is_file() and ".so" in entry.name:
            yield entry.path, _READ_FILE


# -- seccomp --------------------------------------------------------------------------------------


def _filter(machine: str, pid: int) -> Iterator[bytes]:
    """Yield the instructions of the filter, 8 bytes each."""
    yield _instruction(_LD, 4)  # architecture: the 32-bit calls have other numbers
    yield _instruction(_JEQ, _AUDIT_ARCH[machine], 1, 0)
    yield _instruction(_RET, _KILL_PROCESS)
    yield _instruction(_LD, 0)  # number of the call
    for group in _ALLOWED[machine].values():
        for number in group:
            yield from _if_equal(number, [_instruction(_RET, _ALLOW)])
    for name, number in _LIMITED[machine].items():
        yield from _if_equal(number, _checks(name, pid))
    yield _instruction(_JGE, _FIRST_NEW_CALL, 1, 0)
    yield _instruction(_RET, _ERRNO | errno.EPERM)
    yield _instruction(_RET, _ERRNO | errno.ENOSYS)


def _checks(name: str, pid: int) -> list[bytes]:
    """Return the instructions that decide on a call by its arguments."""
    if name in ("open", "openat"):
        flags = _argument(1 if name == "open" else 2)
        return [flags, _instruction(_JSET, _OPENS_TO_WRITE, 1, 0), *_either(errno.EROFS)]
    if name in ("kill", "tgkill"):
        return [_argument(0), _instruction(_JEQ, pid, 0, 1), *_either(errno.EPERM)]
    if name == "clone":  # other than fork, a thread shares the limits
        return [_argument(0), _instruction(_JSET, _CLONE_THREAD, 0, 1), *_either(errno.EPERM)]
    if name in ("fcntl", "ioctl"):
        accepted = _FCNTL if name == "fcntl" else _IOCTL
        return [_argument(1), *_one_of(accepted), _instruction(_RET, _ERRNO | errno.EPERM)]
    if name == "prlimit64":  # reading limits has no pointer to new ones
        refuse = _instruction(_JEQ, 0, 0, 3), _argument(2, high=True), _instruction(_JEQ, 0, 0, 1)
        return [_argument(2), *refuse, *_either(errno.EPERM)]
    assert name == "socket", name
    return [_instruction(_RET, _ERRNO | errno.EPERM)]


def _either(code: int) -> list[bytes]:
    return [_instruction(_RET, _ALLOW), _instruction(_RET, _ERRNO | code)]


def _one_of(values: Sequence[int]) -> list[bytes]:
    allow = _instruction(_RET, _ALLOW)
    return [line for value in values for line in (_instruction(_JEQ, value, 0, 1), allow)]


def _if_equal(value: int, then: list[bytes]) -> list[bytes]:
    return [_instruction(_JEQ, value, 0, len(then)), *then]


def _argument(number: int, high: bool = False) -> bytes:
    """Return the instruction that loads the low or high half of an argument; little-endian."""
    return _instruction(_LD, 16 + 8 * number + (4 if high else 0))


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)
