"""Damaged and hostile input, and the watch that sees whether reading it reached anything that is not its own.

`FUZZ_CASES` is the number of cases of each test (100 by default). With `FUZZ_SEED=random` every run draws others; by
default they are the same in every run, so that a failure in CI is seen again.
"""

import json
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from stages.config.errors import Category, DamagedArtifactError, StageError

NUM_CASES = int(os.environ.get("FUZZ_CASES", "100"))

cases = settings(
    max_examples=NUM_CASES,
    deadline=None,
    database=None,
    derandomize=os.environ.get("FUZZ_SEED") != "random",
    suppress_health_check=(HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture),
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
)
"""For the tests of this folder; a `tmp_path` is shared by all cases of one test."""

SYSTEM_FILES = ("/proc/self/environ", "/etc/passwd")
"""What a hostile record points at; each test adds a file next to the folder that it may use."""

Returned = TypeVar("Returned")


def outcome(call: Callable[[], Returned]) -> Any:
    """Return what a call returns, or the StageError that it raises, which must be one that is not retried.

    Anything else that is raised is a traceback in front of a user, and fails the test as it is.
    """
    error: StageError
    try:
        return call()
    except StageError as raised:
        error = raised
    # Plain damage is retried, because the retry builds the artifact again.
    if type(error) is not DamagedArtifactError:
        assert error.category in (Category.CONFIG, Category.DATA), f"{error.category}: {error.message}"
    assert error.message.strip(), "an error without a message"
    assert "\n" not in error.message.strip(), f"more than one line: {error.message!r}"
    return error


_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "shutil.rmtree")
_COMMANDS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn")
_watches: list["_Watch"] = []


class _Watch:
    def __init__(self, inside: Path) -> None:
        self.inside, self.seen = inside.resolve(), list[str]()
        self.others = set(threading.enumerate()) - {threading.current_thread()}
        self.forbidden = {*SYSTEM_FILES, *map(os.path.realpath, SYSTEM_FILES), str(self.inside.parent / "secret")}

    def event(self, name: str, arguments: tuple[Any, ...]) -> None:
        if threading.current_thread() in self.others:  # left by an earlier test
            return
        if name == "open" and isinstance(arguments[0], str | bytes):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            writes = isinstance(arguments[2], int) and bool(arguments[2] & _WRITING)
            if path in self.forbidden or (writes and not self._is_ours(path)):
                self.seen.append(f"{name} {path}")
        elif name in _CHANGES:
            paths = [os.fsdecode(value) for value in arguments[:2] if isinstance(value, str | bytes)]
            # A path relative to an open folder is checked where that folder was opened.
            outside = [path for path in paths if os.path.isabs(path) and not self._is_ours(os.path.abspath(path))]
            self.seen += [f"{name} {path}" for path in outside]
        elif name in _COMMANDS:
            self.seen.append(f"{name} {arguments[:2]}")

    def _is_ours(self, path: str) -> bool:
        return path in ("/dev/null", "/dev/tty") or Path(path).is_relative_to(self.inside) or "__pycache__" in path


def _audit(name: str, arguments: tuple[Any, ...]) -> None:
    for watch in _watches:
        watch.event(name, arguments)


sys.addaudithook(_audit)


@contextmanager
def confined(inside: Path) -> Iterator[None]:
    """Fail if anything is written outside `inside`, a planted file is opened, or a program is started.

    Temporary files are made inside, too.
    """
    inside.mkdir(parents=True, exist_ok=True)
    secret = inside.parent / "secret"
    secret.write_text("theirs")
    watch = _Watch(inside)
    before, tempfile.tempdir = tempfile.tempdir, str(inside)
    _watches.append(watch)
    try:
        yield
    finally:
        _watches.remove(watch)
        tempfile.tempdir = before
    assert not watch.seen, watch.seen
    assert secret.read_text() == "theirs"


# JSON has no such values; these become tokens of the text.
_TOKENS = {"@nan@": "NaN", "@inf@": "Infinity", "@-inf@": "-Infinity", "@1e999@": "1e999", "@int@": "9" * 5000}

_HOSTILE_TEXTS = (
    *("", " ", ".", "..", "../../secret", "../secret", "/proc/self/environ", "/etc/passwd", "file:///etc/passwd"),
    *("a\0b", "a\nb", "\ud800", "\u202e", "x" * 10_000, "{{ 7 * 7 }}", "{% for x in y %}", "<script>x()</script>"),
    *("'; DROP TABLE runs; --", "$(touch secret)", "`id`", "%s%n", "s3://user:password@bucket/x", "http://[::1", "::1"),
    *("models:/x@champion", "hf://", "~/.ssh/id_rsa", "é" * 100, "2026-13-45T99:99:99", "NaN", "-1", "1e999"),
)
_hostile_text = st.sampled_from(_HOSTILE_TEXTS)

_hostile_value = st.one_of(
    _hostile_text,
    st.sampled_from([None, True, False, 0, -1, 2**63, -(2**70), 0.5, -0.0, 1e308, *_TOKENS]),
    st.sampled_from([[], {}, [None], {"": None}, [[[[]]]], {"kind": "x"}, ["a", 1]]),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=20),
)

_DEEP = "[" * 100_000


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value in a JSON document."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, child in children for place in _places(child, (*path, key)))]


def _replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = _replaced(value[path[0]], path[1:], new)
    return copy


def _removed(value: Any, path: tuple[Any, ...]) -> Any:
    if not path:
        return None
    copy = dict(value) if isinstance(value, dict) else list(value)
    if len(path) == 1:
        del copy[path[0]]
    else:
        copy[path[0]] = _removed(value[path[0]], path[1:])
    return copy


@st.composite
def damaged_values(draw: st.DrawFn, document: Any) -> Any:
    """Return the document with one to three values replaced, removed or added."""
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(_places(document)))
        match draw(st.sampled_from(["replace", "replace", "remove", "add"])):
            case "replace":
                document = _replaced(document, path, draw(_hostile_value))
            case "remove":
                document = _removed(document, path)
            case _:
                document = {**document, draw(_hostile_text): draw(_hostile_value)} if isinstance(document, dict) else {}
    return document


def as_json(document: Any) -> bytes:
    """Return the text of a document in which `damaged_values` may have put numbers that JSON cannot hold."""
    text = json.dumps(document)
    for name, token in _TOKENS.items():
        text = text.replace(json.dumps(name), token)
    return text.encode()


@st.composite
def damaged_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """Return the bytes cut, overwritten, doubled, or with something else in or around them."""
    place = draw(st.integers(0, max(0, len(data) - 1)))
    match draw(st.sampled_from(["cut", "overwrite", "insert", "double", "bom", "utf16", "deep", "junk", "empty"])):
        case "cut":
            return data[:place]
        case "overwrite":
            new = draw(st.binary(min_size=1, max_size=8))
            return data[:place] + new + data[place + len(new) :]
        case "insert":
            return data[:place] + draw(st.binary(min_size=1, max_size=16)) + data[place:]
        case "double":
            return data + data
        case "bom":
            return b"\xef\xbb\xbf" + data
        case "utf16":
            return data.decode("utf-8", "replace").encode("utf-16")
        case "deep":
            return _DEEP.encode()
        case "junk":
            return draw(st.binary(max_size=200))
        case _:
            return b""


def damaged_records(document: Any) -> st.SearchStrategy[bytes]:
    """A stored JSON record whose values or bytes are wrong."""
    return st.one_of(damaged_values(document).map(as_json), damaged_bytes(as_json(document)))
