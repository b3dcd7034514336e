"""The process in which a response's code meets its tests: `python -I -B code_child.py`, standard library only.

It reads one line of JSON from its input, gives up what it must not have, and runs the code; each test that was run
becomes a line of its output. What it gives up cannot be taken back: limits of the kernel, and on Linux a filter of
system calls (seccomp), which holds for root too. With the filter there are no further processes and threads, no
sockets, no signals to others, and no file is written, changed or removed.

Code and tests share an interpreter, so code that is written for it can call itself right. docs/SCORERS.md says so.
"""

import ctypes
import json
import os
import platform
import resource
import struct
import sys
from typing import Any

_NOT_CONFINED = 3
"""Exit status when the filter cannot be set."""
_NO_NEW_PRIVILEGES, _SET_SECCOMP, _FILTER_MODE = 38, 22, 2
_ALLOW, _DENY, _ABSENT, _KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
"""Answers of a filter: run the call, EPERM, ENOSYS, end the process."""
_LOAD, _EQUAL, _GREATER_EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_X32 = 0x40000000
"""Numbers from here on are another interface to the same calls, which the list below does not know."""

# System calls by architecture: its number in a filter, the calls that are refused, those whose argument of flags opens
# a file for writing (number, position of that argument), and those that a library may try and replace (openat2).
_ARCHITECTURES: dict[str, tuple[int, tuple[int, ...], tuple[tuple[int, int], ...], tuple[int, ...]]] = {
    "x86_64": (
        0xC000003E,
        (
            *(41, 42, 43, 49, 50, 53, 288, 425, 426, 427),  # sockets; io_uring, which runs calls past a filter
            *(56, 57, 58, 59, 322),  # clone, fork, vfork, execve, execveat
            *(62, 129, 200, 234, 297, 424, 434, 438),  # kill and its kin, pidfd_*
            *(101, 310, 311, 312),  # ptrace, process_vm_*, kcmp
            *(82, 83, 84, 85, 86, 87, 88, 133, 258, 259, 263, 264, 265, 266, 316),  # rename, mkdir, link, unlink, ...
            *(76, 77, 285, 90, 91, 268, 452, 92, 93, 94, 260),  # truncate, fallocate, chmod, chown
            *(132, 235, 261, 280, 188, 189, 190, 197, 198, 199),  # times, extended attributes
            *(155, 161, 165, 166, 272, 308, 428, 429, 430, 442),  # mounts, chroot, namespaces
            *(141, 142, 144, 160, 203, 302, 314),  # priorities, limits, affinity
            *(29, 64, 68, 240, 319, 248, 249, 250, 298, 321, 323),  # shared memory, queues, keys, perf, bpf
        ),
        ((2, 1), (257, 2)),  # open, openat
        (435, 437),  # clone3, openat2
    ),
    "aarch64": (
        0xC00000B7,
        (
            *(198, 199, 200, 201, 202, 203, 242, 425, 426, 427),
            *(220, 221, 281),
            *(129, 130, 131, 138, 240, 424, 434, 438),
            *(117, 270, 271, 272),
            *(33, 34, 35, 36, 37, 38, 276),
            *(45, 46, 47, 52, 53, 54, 55, 452),
            *(88, 5, 6, 7, 14, 15, 16),
            *(39, 40, 41, 51, 97, 268, 428, 429, 430, 442),
            *(118, 119, 122, 140, 164, 261, 274),
            *(180, 186, 190, 194, 279, 217, 218, 219, 241, 280, 282),
        ),
        ((56, 2),),
        (435, 437),
    ),
}


def main() -> None:
    told = os.fdopen(os.dup(1), "w")
    question = json.loads(sys.stdin.readline())
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):  # what the code prints goes nowhere, and it has nothing to read
        os.dup2(null, stream)
    os.close(null)
    limit(question["limits"])
    if not confine():
        os._exit(_NOT_CONFINED)
    _tell(told, question["mark"], -1, "")  # from here on the clock runs
    run(question["code"], question["tests"], lambda number, reason: _tell(told, question["mark"], number, reason))
    os._exit(0)  # what the code left for the end of the interpreter is not run


def _tell(told: Any, mark: str, number: int, reason: str) -> None:
    told.write(json.dumps([mark, number, reason]) + "\n")
    told.flush()


def run(code: str, tests: list[str], tell: Any) -> None:
    """Run the code once and then each test in a namespace of its own; `tell` gets its number and why it failed, an
    empty text when it passed."""
    made: dict[str, Any] = {"__name__": "response"}
    reason = _reason_of(code, "response", made)
    for number, test in enumerate(tests):
        tell(number, reason or _reason_of(test, f"test {number}", dict(made)))


def _reason_of(code: str, name: str, namespace: dict[str, Any]) -> str:
    """Run code of others, which is what this process is for; any exception counts, SystemExit too."""
    try:
        exec(compile(code, name, "exec"), namespace)  # noqa: S102
    except BaseException as error:  # noqa: BLE001
        return type(error).__name__
    return ""


def limit(limits: dict[str, int]) -> None:
    """Set soft and hard limits: seconds of processor, bytes of memory, and no files and no dumps."""
    seconds, memory = limits["cpu_seconds"], limits["memory_bytes"]
    wanted = {
        resource.RLIMIT_CPU: (seconds, seconds + 1),  # SIGXCPU, and SIGKILL a second later
        resource.RLIMIT_AS: (memory, memory),
        resource.RLIMIT_FSIZE: (0, 0),
        resource.RLIMIT_CORE: (0, 0),
        resource.RLIMIT_NOFILE: (64, 64),
    }
    for what, (soft, hard) in wanted.items():
        most = resource.getrlimit(what)[1]
        if most != resource.RLIM_INFINITY:
            soft, hard = min(soft, most), min(hard, most)
        resource.setrlimit(what, (soft, hard))


def confine() -> bool:
    """Set the filter; False where this system has none."""
    if sys.platform != "linux" or (known := _ARCHITECTURES.get(platform.machine())) is None:
        return False
    program = _program(*known)

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))

    libc = ctypes.CDLL(None, use_errno=True)
    given = Program(len(program) // 8, program)
    return not (
        libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) or libc.prctl(_SET_SECCOMP, _FILTER_MODE, ctypes.byref(given), 0, 0)
    )


def _program(
    architecture: int, refused: tuple[int, ...], opening: tuple[tuple[int, int], ...], absent: tuple[int, ...]
) -> bytes:
    """The filter as instructions of classic BPF, which see the call's number and its arguments (struct seccomp_data:
    number at 0, architecture at 4, arguments of 8 bytes from 16)."""

    def step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("=HBBI", code, if_true, if_false, value)

    parts = [step(_LOAD, 4), step(_EQUAL, architecture, 1, 0), step(_RETURN, _KILL)]
    parts += [step(_LOAD, 0), step(_GREATER_EQUAL, _X32, 0, 1), step(_RETURN, _DENY)]
    for number in refused:
        parts += [step(_EQUAL, number, 0, 1), step(_RETURN, _DENY)]
    for number in absent:
        parts += [step(_EQUAL, number, 0, 1), step(_RETURN, _ABSENT)]
    for number, position in opening:
        flags = 16 + 8 * position  # the low half of the argument, on machines of either size little-endian
        parts += [step(_EQUAL, number, 0, 4), step(_LOAD, flags)]
        parts += [step(_ANY_BIT, _WRITING, 0, 1), step(_RETURN, _DENY), step(_RETURN, _ALLOW)]
    return b"".join([*parts, step(_RETURN, _ALLOW)])


if __name__ == "__main__":
    main()
