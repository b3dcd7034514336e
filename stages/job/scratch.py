"""Where attempts write before they publish: a folder of this user, with one folder below it for each attempt.

The folder of an attempt is locked while the attempt lives. SIGKILL leaves the folder behind and frees the lock, so that
the next attempt on the machine, and `make down`, can tell what is left over from what is in use. Where the disk has no
locks, age tells.
"""

import fcntl
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stages.config.errors import ConfigError

logger = logging.getLogger("athanor")

_LOCKED = "attempt-"
_NEW = ".new-"  # not locked, so swept by age alone
_BEFORE_LOCKS = "stage-"  # the name that an earlier release gave
_UNCHANGED_DAYS = 30  # longer than a stage runs without a file in its folder that changes


def scratch_home() -> Path:
    return Path(os.environ.get("ATHANOR_SCRATCH") or Path(tempfile.gettempdir()) / f"athanor-{os.getuid()}")


def owner_fault(folder: Path) -> str:
    """Why another user could choose what lies in a folder; empty when none can. A link counts as a folder does: whoever
    made it may turn it elsewhere at any time, although what it leads to is ours today."""
    named, meant = folder.lstat(), folder.stat()
    if named.st_uid != os.getuid():
        return f"{'is a link that' if stat.S_ISLNK(named.st_mode) else ''} belongs to user {named.st_uid}".strip()
    return "" if meant.st_uid == os.getuid() else f"leads to {folder.resolve()}, which belongs to user {meant.st_uid}"


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder of this attempt; downloads go next to it and stay for the next stage on the same machine."""
    home = scratch_home()
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    if fault := owner_fault(home):
        raise ConfigError(
            f"the scratch folder {home} {fault}, who could change what is trained",
            advice="Remove it, or set ATHANOR_SCRATCH to a folder of the user that Ray runs as.",
        )
    if not os.environ.get("ATHANOR_SCRATCH") and stat.S_IMODE(home.stat().st_mode) & 0o077:
        home.chmod(0o700)  # made by hand; a folder that was named keeps its mode, others may have business there
    sweep_scratch(home)
    work_dir = Path(tempfile.mkdtemp(dir=home, prefix=_NEW))
    handle = os.open(work_dir, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if _locked(handle, work_dir):
            work_dir = work_dir.rename(work_dir.with_name(_LOCKED + work_dir.name.removeprefix(_NEW)))
        yield work_dir
    finally:
        shutil.rmtree(work_dir, ignore_errors=True)
        os.close(handle)


def _locked(handle: int, folder: Path) -> bool:
    """Lock a new folder; False where the disk has no locks, as NFS has none for what cannot be opened for writing."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError as error:
        logger.warning(
            "The disk of %s has no locks (%s): if this attempt is killed, its folder stays for %d days. Set "
            "ATHANOR_SCRATCH to a folder on a local disk.",
            folder,
            error.strerror,
            _UNCHANGED_DAYS,
        )
        return False
    return True


def sweep_scratch(home: Path) -> int:
    """Remove the folders of attempts that no process holds, or without a lock, those that have not changed for a month;
    return their number."""
    swept = 0
    if not home.is_dir() or owner_fault(home):
        return swept
    for folder in home.glob(f"{_LOCKED}*"):
        try:
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue  # gone meanwhile, or no folder
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue  # in use, or a file system without locks
        else:
            shutil.rmtree(folder, ignore_errors=True)
            swept += 1
        finally:
            os.close(handle)
    for folder in (*home.glob(f"{_NEW}*"), *home.glob(f"{_BEFORE_LOCKS}*")):
        if _is_abandoned(folder):
            shutil.rmtree(folder, ignore_errors=True)
            swept += 1
    return swept


def _is_abandoned(folder: Path) -> bool:
    try:
        newest = max(path.lstat().st_mtime for path in (folder, *folder.rglob("*")))
    except OSError:
        return False  # in use, or not ours to read
    return newest < time.time() - _UNCHANGED_DAYS * 24 * 3600
