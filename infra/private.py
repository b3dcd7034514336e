"""Files and folders that only this user may read."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from stages.job.scratch import owner_fault


class NotPrivateError(RuntimeError):
    """Another user could read or change the stack's files; the message says what to do."""


def make_private(folder: Path) -> None:
    """Make a folder that only we may enter, or close one that is there, whatever made it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if fault := owner_fault(folder):
        raise NotPrivateError(
            f"{folder} {fault}, you are user {os.getuid()}; run this as that user, or remove {folder.name}, "
            "or set ATHANOR_HOME to a folder of your own"
        )
    close(folder)


def close(path: Path) -> None:
    """Take from others what rights they have."""
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        path.chmod(mode & 0o700)


def is_open(path: Path) -> bool:
    """Whether others may read or enter it; some file systems cannot keep them out."""
    return bool(path.stat().st_mode & 0o077)


def write_private(path: Path, text: str) -> None:
    """Replace `path` in one step with a file only its owner may read; a power cut leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mkstemp makes it 0600
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(handle)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)  # a full disk
        raise
