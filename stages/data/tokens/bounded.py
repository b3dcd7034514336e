"""Runs what may never end, a chat template, with a limit on its steps and on its memory.

A template is a program by whoever published the model. Jinja's sandbox keeps it from the machine, but not from loops
inside loops, from macros that call themselves, or from a text that doubles with every step. Steps are counted by
Python's tracing, which sees the code that Jinja generates, in whatever thread it runs; so the limit is the same on
every machine. What Jinja computes in a single step has no limit in time; a power, the one operation where a few digits
are enough for hours, is refused before.
"""

import contextlib
import resource
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

Result = TypeVar("Result")

STEPS = 1_000_000
"""Lines of the template's code, and calls. A hundred lines need about 20,000 for a conversation of a hundred turns."""
_LOOKED_AT_EVERY = 8
"""Steps from one look at the template's variables to the next one."""
_BYTES = 768 << 20
"""How much the process may grow meanwhile. Another thread may import mlflow, which takes 320 MiB of it."""
_ALONE = threading.Lock()
"""The limit on memory is the process's: two threads would restore each other's."""
_SIZE = 10_000_000
"""Characters and items of the template's variables together."""
_LOOKED_INTO = 8
"""First items of a list that are looked into for lists and texts, of which a few lines can nest billions."""
_BITS = 100_000
"""Of a whole number: larger ones take long to multiply."""
_TEMPLATE = "<template>"


class Endless(BaseException):
    """Not an Exception, so that nothing on the way out takes it for a failure of its own and continues untraced."""


def bounded(run: Callable[[], Result], *, steps: int = STEPS) -> Result:
    """Return what `run` returns; raises Endless, RecursionError or MemoryError for what would not end."""
    from jinja2.utils import Namespace  # only tokenizing needs it

    left = steps

    def too_large(values: Mapping[str, object]) -> bool:
        size = 0
        for value in list(values.values()):
            inside = value._Namespace__attrs if isinstance(value, Namespace) else {"": value}  # type: ignore[attr-defined]
            for item in inside.values():
                if isinstance(item, str | list | tuple):
                    size += _extent(item, {})
                elif isinstance(item, int) and item.bit_length() > _BITS:
                    return True
        return size > _SIZE

    def trace(frame: FrameType, _event: str, _argument: object) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise Endless(f"it has not ended after {steps} steps")
        is_template = frame.f_code.co_filename == _TEMPLATE
        if is_template and left % _LOOKED_AT_EVERY == 0 and too_large(frame.f_locals):
            raise Endless(f"its variables are larger than {_SIZE} characters, or than {_BITS} bits")
        return trace if is_template else None  # of the library, calls are counted and not lines

    before = sys.gettrace()
    with _ALONE, _limited_memory():
        sys.settrace(trace)
        try:
            return run()
        finally:
            sys.settrace(before)


def _extent(value: object, known: dict[int, int]) -> int:
    """Characters and items, those of inner lists included as often as they occur; `known` has lists by their id."""
    if isinstance(value, str):
        return len(value)
    if not isinstance(value, list | tuple):
        return 0
    if id(value) not in known:
        known[id(value)] = _SIZE + 1  # a list within itself
        known[id(value)] = len(value) + sum(_extent(item, known) for item in value[:_LOOKED_INTO])
    return known[id(value)]


def computes_powers(template: str) -> bool:
    """Whether a template has the operator `**`; what is no template at all fails later, with its own message."""
    from jinja2 import Environment, TemplateError

    try:
        # Only split into words, never rendered: nothing to escape.
        words = list(Environment(autoescape=True).lex(template))
    except TemplateError:
        return False
    return any(kind == "operator" and text == "**" for _, kind, text in words)


@contextlib.contextmanager
def _limited_memory() -> Iterator[None]:
    """Let this process grow only so much; where the system cannot say how large it is, there is no limit."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = pages * resource.getpagesize() + _BYTES
        if soft != resource.RLIM_INFINITY:
            limit = min(limit, soft)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    except (OSError, ValueError):
        yield
        return
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
