"""A process whose every change of a folder is seen by the kernel, killed or failed at a chosen one.

`ptrace` stops the process, its threads and its children before each call to the system that writes,
makes, names, flushes or removes something in the folder, whatever language made the call. So
between two stops nothing changes: to end the process at each of them is to end it everywhere.
"""

import ctypes
import errno
import os
import platform
import signal
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

CAN_TRACE = sys.platform == "linux" and platform.machine() == "x86_64"
needs_tracer = pytest.mark.skipif(not CAN_TRACE, reason="traces calls of Linux on x86-64")

# numbers of system calls on x86-64, by what their first argument is
BY_DESCRIPTOR = {
    1: "write", 18: "pwrite64", 20: "writev", 40: "sendfile", 74: "fsync", 75: "fdatasync",
    77: "ftruncate", 91: "fchmod", 285: "fallocate", 296: "pwritev", 326: "copy_file_range",
}  # fmt: skip
BY_PATH = {
    2: "open", 76: "truncate", 82: "rename", 83: "mkdir", 84: "rmdir", 85: "creat", 86: "link",
    87: "unlink", 88: "symlink", 90: "chmod",
}  # fmt: skip
# behind the descriptor of a folder
BY_PLACE = {
    257: "openat", 258: "mkdirat", 263: "unlinkat", 264: "renameat", 265: "linkat",
    266: "symlinkat", 268: "fchmodat", 316: "renameat2",
}  # fmt: skip
NAMES = {**BY_DESCRIPTOR, **BY_PATH, **BY_PLACE}
# what a full disk refuses, and a folder that may not be written
GROWING = {"write", "pwrite64", "writev", "sendfile", "fallocate", "pwritev", "copy_file_range"}
GROWING |= {"mkdir", "mkdirat", "creat", "link", "symlink"}
OPENING = {"open", "openat"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

_TRACEME, _CONT, _SETOPTIONS, _PEEKUSER, _POKEUSER = 0, 7, 0x4200, 3, 6
# follow threads and children, stop for the filter, and let nothing live longer than the tracer
_OPTIONS = 0x2 | 0x4 | 0x8 | 0x80 | 0x100000
_SECCOMP_STOP = signal.SIGTRAP | 7 << 8
# of the registers in the traced process, in bytes: rax, its number before, and the arguments
_RAX, _ORIG_RAX, _ARGUMENTS = 80, 120, (112, 104, 96, 56, 72, 44)


class Point(NamedTuple):
    """A call that is about to change something in the folder."""

    number: int
    name: str
    path: str


# what becomes of a call: None goes on, a number of errno fails it, 0 kills all
Decide = Callable[[Point], int | None]


class Outcome(NamedTuple):
    """How a traced process ended, 0 or minus a signal, and the calls that it made."""

    code: int
    points: list[Point]


def trace(work: Callable[[], object], folder: Path, decide: Decide) -> Outcome:
    """Runs `work` in a child and asks `decide` before each call that changes `folder`.

    Call it in a process without other threads or children.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.restype, libc.ptrace.argtypes = ctypes.c_long, [ctypes.c_long] * 4
    if (child := os.fork()) == 0:
        code = 1
        try:
            libc.ptrace(_TRACEME, 0, 0, 0)
            os.kill(os.getpid(), signal.SIGSTOP)
            _stop_before_changes(libc)
            work()
            code = 0
        except SystemExit as end:
            code = int(str(end.code))
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.waitpid(child, 0)
    libc.ptrace(_SETOPTIONS, child, 0, _OPTIONS)
    libc.ptrace(_CONT, child, 0, 0)
    return _follow(libc, child, folder.resolve(), decide)


def _follow(libc: ctypes.CDLL, child: int, folder: Path, decide: Decide) -> Outcome:
    points: list[Point] = []
    code, living = 0, {child}
    while True:
        try:
            process, status = os.waitpid(-1, 0x40000000)
        except ChildProcessError:
            return Outcome(code, points)
        if os.WIFEXITED(status) or os.WIFSIGNALED(status):
            living.discard(process)
            if process == child:
                code = os.waitstatus_to_exitcode(status)
            continue
        living.add(process)
        received = 0
        if status >> 8 == _SECCOMP_STOP:
            number, path = _read_call(libc, process)
            if str(path).startswith(f"{folder}/") or path == str(folder):
                points.append(Point(len(points), NAMES[number], os.path.relpath(path, folder)))
                answer = decide(points[-1])
                if answer == 0:
                    for other in living:
                        try:
                            os.kill(other, signal.SIGKILL)
                        except ProcessLookupError:
                            continue
                elif answer:
                    libc.ptrace(_POKEUSER, process, _ORIG_RAX, -1)
                    libc.ptrace(_POKEUSER, process, _RAX, -answer)
        elif os.WSTOPSIG(status) not in (signal.SIGTRAP, signal.SIGSTOP):
            received = os.WSTOPSIG(status)
        libc.ptrace(_CONT, process, 0, received)


def _read_call(libc: ctypes.CDLL, process: int) -> tuple[int, str]:
    """Number of the call that a process is about to make, and what it changes; "" for nothing."""
    number = libc.ptrace(_PEEKUSER, process, _ORIG_RAX, 0)
    first, second, third, *_ = (libc.ptrace(_PEEKUSER, process, r, 0) for r in _ARGUMENTS[:3])
    try:
        if number in BY_DESCRIPTOR:
            # copy_file_range writes to its third
            target = ctypes.c_int(third if number == 326 else first).value
            return number, os.readlink(f"/proc/{process}/fd/{target}")
        place = f"/proc/{process}/cwd"
        if number in BY_PLACE:
            if ctypes.c_int(first).value >= 0:
                place = f"/proc/{process}/fd/{ctypes.c_int(first).value}"
            first, second = second, third
        if NAMES[number] in OPENING and not second & _WRITES:
            return number, ""
        text = _read_text(process, first)
    except OSError:
        return number, ""
    return number, os.path.normpath(os.path.join(os.readlink(place), text))


def _read_text(process: int, address: int) -> str:
    with open(f"/proc/{process}/mem", "rb", buffering=0) as memory:
        memory.seek(address)
        # a text may end where readable memory does
        found = memory.read(4096 - address % 4096)
        if b"\0" not in found:
            found += memory.read(4096)
    return os.fsdecode(found.partition(b"\0")[0])


def _stop_before_changes(libc: ctypes.CDLL) -> None:
    """Has the kernel stop this process and all that it starts before the calls in NAMES."""
    load, equal, give = 0x20, 0x15, 0x06
    lines = [(load, 0, 0, 0)]
    for i, number in enumerate(NAMES):
        lines.append((equal, len(NAMES) - i, 0, number))
    lines += [(give, 0, 0, 0x7FFF0000), (give, 0, 0, 0x7FF00000)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
    program = struct.pack("HxxxxxxQ", len(lines), ctypes.addressof(code))
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, program, 0, 0):
        raise OSError(ctypes.get_errno(), "no filter of system calls")


def count(work: Callable[[], object], folder: Path) -> list[Point]:
    """All points of an undisturbed `work`."""
    found = trace(work, folder, lambda _: None)
    assert found.code == 0 and found.points, found
    return found.points


def kill_at(number: int) -> Decide:
    """Kills everything before the call of this number."""
    return lambda point: 0 if point.number == number else None


def fail_at(number: int, reason: int) -> Decide:
    """Fails this call alone, whatever it is."""
    return lambda point: reason if point.number == number else None


def fill_at(number: int, folder: Path) -> Decide:
    """From this call on nothing that grows finds room."""

    def decide(point: Point) -> int | None:
        is_growing = point.name in GROWING or (
            point.name in OPENING and not (folder / point.path).exists()
        )
        return errno.ENOSPC if point.number >= number and is_growing else None

    return decide
