"""The folder that an export makes: whole or not at all, and never in place of what somebody else put there."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stages.config.errors import ConfigError
from stages.config.text import byte_size

RECORD = "athanor.json"
"""What an export writes about itself; only folders that have it are overwritten."""
_ROOM = 1.05


def check_target(folder: Path, *, overwrite: bool) -> None:
    """Raise ConfigError when the folder may not be made here, before anything is read."""
    if folder.is_symlink() and not folder.exists():
        raise ConfigError(f"{folder} is a link to nothing", advice="Remove it, or name another folder.")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ConfigError(f"{folder} is a file", advice="Name a folder that does not exist yet.")
    if not any(folder.iterdir()):
        return
    if not overwrite:
        raise ConfigError(
            f"{folder} is not empty", advice="Name another folder, or replace an earlier export with --overwrite."
        )
    if not _is_export(folder):
        raise ConfigError(
            f"{folder} holds something else than an export ({RECORD} is missing), so --overwrite does not replace it",
            advice="Name another folder, or remove this one yourself.",
        )


def _is_export(folder: Path) -> bool:
    try:
        return isinstance(json.loads((folder / RECORD).read_bytes()), dict)
    except (OSError, ValueError):
        return False


def check_room(folder: Path, size: int) -> None:
    """Raise ConfigError when the disk is too small for the export."""
    parent = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(parent).free
    if free < size * _ROOM:
        raise ConfigError(
            f"the export needs {byte_size(size * _ROOM)}, and the disk of {parent} has {byte_size(free)} left",
            advice="Make room, or name a folder on another disk.",
        )


@contextmanager
def published_folder(folder: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a hidden folder next to `folder` that takes its name at the end; an error leaves nothing behind."""
    folder = folder.resolve()  # a link keeps pointing to where it does
    folder.parent.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex[:8]
    work, earlier = (folder.with_name(f".{folder.name}.{mark}.{what}") for what in ("exporting", "replaced"))
    work.mkdir()
    try:
        yield work
        check_target(folder, overwrite=overwrite)  # it took a while: somebody may have put something there
        if folder.exists() and any(folder.iterdir()):
            os.rename(folder, earlier)
        os.rename(work, folder)
    finally:
        if not folder.exists() and earlier.exists():
            os.rename(earlier, folder)
        shutil.rmtree(earlier, ignore_errors=True)
        shutil.rmtree(work, ignore_errors=True)
