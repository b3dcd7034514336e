"""The object store as a local or shared folder.

Objects are written aside under a hidden name, synced and then renamed, so that a reader sees a whole object or none.
"""

import errno
import os
import re
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from stages.artifacts.store import Listed, Unfinished, check_key
from stages.config.errors import ConfigError

_LONGEST_NAME, _LONGEST_PATH = 255, 4095  # bytes, of Linux
_ASIDE = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{32}")


def _led_to(path: Path) -> Path | None:
    """Where a path leads; None when its links lead in a circle."""
    try:
        return path.resolve()
    except RuntimeError:  # until Python 3.13
        return None


def _check_length(path: Path, key: str) -> None:
    longest = max(len(part.encode(errors="replace")) for part in path.parts)
    for what, length, limit in (
        ("a part", longest, _LONGEST_NAME),
        ("a path", len(str(path).encode(errors="replace")), _LONGEST_PATH),
    ):
        if length > limit:
            raise ConfigError(
                f"key={key[:80]!r}... has {what} of more than {limit} bytes, which no folder can hold",
                advice="Use shorter names; this one may have been written to do harm.",
            )


class FileStore:
    """The `Store` of a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.root_uri = root.as_uri()

    def _path(self, key: str) -> Path:
        """The file of a key. A link on the way is refused, even to elsewhere in the store: what is done to one object
        must not happen to another."""
        path = self.root.resolve() / check_key(key, self.root_uri)
        _check_length(path, key)
        if _led_to(path) != path:
            raise ConfigError(
                f"key={key!r} leads elsewhere in or out of the store {self.root_uri} through a link",
                advice="Put the files themselves into the store.",
            )
        return path

    def exists(self, key: str) -> bool:
        return self._path(key).is_file()

    def size(self, key: str) -> int | None:
        path = self._path(key)
        return path.stat().st_size if path.is_file() else None

    def read_bytes(self, key: str) -> bytes:
        path = self._path(key)
        no_file = ConfigError(
            f"key={key!r} is not a regular file in the store {self.root_uri}", advice="Remove it; see who made it."
        )
        try:
            opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe would wait for its writer
        except NotADirectoryError:
            raise FileNotFoundError(f"{self.root_uri}/{key} does not exist: its folder is a file") from None
        except OSError as error:
            if error.errno == errno.ENXIO:  # a socket
                raise no_file from None
            raise
        mode = os.fstat(opened).st_mode
        if stat.S_ISREG(mode):
            with open(opened, "rb") as file:
                return file.read()
        os.close(opened)
        if stat.S_ISDIR(mode):
            raise FileNotFoundError(f"{self.root_uri}/{key} is a folder, not an object")
        raise no_file

    def write_bytes(self, key: str, data: bytes) -> None:
        aside = self._write_aside(key, data)
        os.replace(aside, self._path(key))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        aside = self._write_aside(key, data)
        try:
            os.link(aside, self._path(key))
        except FileExistsError:
            return False
        finally:
            aside.unlink()
        return True

    def _write_aside(self, key: str, data: bytes) -> Path:
        aside = self._aside(key)
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return aside

    def _aside(self, key: str) -> Path:
        path = self._path(key)
        aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        _check_length(aside, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        return aside

    def upload(self, path: Path, key: str) -> None:
        aside = self._aside(key)
        shutil.copyfile(path, aside)
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, self._path(key))

    def download(self, key: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self._path(key), path)

    def list(self, prefix: str) -> Iterator[str]:
        folder = self._path(prefix.rstrip("/"))
        if not folder.is_dir():
            return
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not path.is_symlink() and not path.name.startswith("."):
                yield path.relative_to(self.root.resolve()).as_posix()

    def listing(self) -> Iterator[Listed]:
        root = self.root.resolve()
        for folder, folders, names in os.walk(root):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in names:
                path = Path(folder, name)
                if name.startswith("."):
                    continue
                try:
                    found = path.lstat()
                except FileNotFoundError:
                    continue  # removed since the directory was read
                if not stat.S_ISREG(found.st_mode):
                    continue  # a link or a device is no object
                modified = datetime.fromtimestamp(found.st_mtime, UTC)
                yield Listed(path.relative_to(root).as_posix(), found.st_size, str(found.st_mtime_ns), modified)

    def delete(self, key: str) -> None:
        path = self._path(key)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def local_path(self, key: str) -> Path | None:
        return self._path(key)

    def clock(self) -> datetime:
        # not this machine's clock: a shared folder's files are stamped by the machine that serves it
        self.root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.root) as file:
            return datetime.fromtimestamp(os.fstat(file.fileno()).st_mtime, UTC)

    def unfinished(self) -> Iterator[Unfinished]:
        for path in self.root.resolve().rglob(".*.*"):
            name = _ASIDE.fullmatch(path.name)
            if name is None:
                continue
            try:
                started = datetime.fromtimestamp(path.stat().st_mtime, UTC)
            except FileNotFoundError:
                continue  # finished since the directory was read
            key = path.with_name(name["name"]).relative_to(self.root.resolve()).as_posix()
            yield Unfinished(key, started, path.name)

    def discard(self, upload: Unfinished) -> None:
        self._path(upload.key).with_name(upload.id).unlink(missing_ok=True)
