"""`python -m infra backup FOLDER` and `restore FOLDER`: databases, keys and the artifact store, in a folder.

The databases are copied before the store, so that everything that a database refers to is in the copy. The record of
what was copied is written last, with the SHA-256 of the databases, which is checked before anything is restored. A
SQLite database may be in use while it is copied, and so may Postgres: `pg_dump` reads a consistent snapshot. Artifacts
that the folder has already are not copied again, so a second backup into it is quick.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from infra.layout import Layout, StackSecrets
from infra.private import write_private
from stages.artifacts.folder import FileStore
from stages.artifacts.manifests import MANIFEST, hash_file
from stages.artifacts.store import Store

RECORD = "backup.json"
UNFINISHED = "unfinished"
POSTGRES_DATABASES = ("airflow", "mlflow", "mlflow_auth")
# short-lived; a restored lease or probe would only be in the way
_LEFT_OUT = ("leases/", "probe/")
Say = Callable[[str], None]


class BackupError(RuntimeError):
    """Says what could not be copied or restored, and what to do."""


class Record(BaseModel):
    """What a backup holds; written last."""

    model_config = ConfigDict(frozen=True)

    made_at: str
    store: str
    databases: dict[str, str]
    "File below the backup -> SHA-256."
    objects: int


@dataclass(frozen=True)
class Place:
    """Files of the local stack, by their names in the backup."""

    layout: Layout

    @property
    def databases(self) -> dict[str, Path]:
        return {"airflow.db": self.layout.airflow / "airflow.db", "mlflow.db": self.layout.mlflow / "mlflow.db"}


def back_up(folder: Path, store: Store, databases: Iterable[Path], say: Say) -> Record:
    """Copy the store, next to the `databases` that `dump_local` or `dump_postgres` has made, and finish the backup."""
    new = folder / UNFINISHED
    hashes = {path.relative_to(new).as_posix(): hash_file(path) for path in databases}
    number = _copy(store, FileStore(folder.resolve() / "store"), say)
    record = Record(
        made_at=datetime.now(UTC).isoformat(timespec="seconds"),
        store=store.root_uri,
        databases=hashes,
        objects=number,
    )
    (new / RECORD).write_text(record.model_dump_json(indent=1))
    _replace_earlier(folder, new)
    say(f"{folder}: {len(hashes)} databases and files, {number} objects of {store.root_uri}")
    return record


def _begin(folder: Path) -> Path:
    """An empty folder for the new copies: until all are there, an earlier backup in `folder` stays what it is."""
    new = folder / UNFINISHED
    if new.exists():
        shutil.rmtree(new)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    new.mkdir(mode=0o700)
    return new


def _replace_earlier(folder: Path, new: Path) -> None:
    """Nothing is copied here, so it takes an instant; without its record, what is half replaced is no backup."""
    (folder / RECORD).unlink(missing_ok=True)
    for path in sorted(new.iterdir(), key=lambda path: path.name == RECORD):
        target = folder / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.replace(target)
    new.rmdir()


def read_record(folder: Path) -> Record:
    """The record of a whole backup, its databases verified."""
    try:
        record = Record.model_validate_json((folder / RECORD).read_text())
    except FileNotFoundError:
        raise BackupError(f"{folder} holds no finished backup: {RECORD} is missing") from None
    except ValidationError as error:
        raise BackupError(f"{folder / RECORD} cannot be read: {error}") from error
    for name, expected in record.databases.items():
        path = folder / name
        if not path.is_file() or hash_file(path) != expected:
            raise BackupError(f"{path} is missing or was changed since the backup; take another backup")
    return record


def dump_local(folder: Path, layout: Layout) -> list[Path]:
    """Copy SQLite databases, MLflow's files and the secrets: without its key, Airflow's connections are lost."""
    # before anything in the folder changes: it may hold the only good copy
    for path in Place(layout).databases.values():
        if not path.exists():
            raise BackupError(f"{path} does not exist: nothing has run here yet, so there is nothing to back up")
    if not layout.secrets.exists():
        raise BackupError(f"{layout.secrets} does not exist; put it back from an earlier backup, or run `make up`")
    StackSecrets.load_or_generate(layout)
    new = _begin(folder)
    written = []
    for name, path in Place(layout).databases.items():
        target = new / name
        with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(target)) as copy:
            source.backup(copy)
        written.append(target)
    shutil.copyfile(layout.secrets, new / "secrets.json")
    (new / "secrets.json").chmod(0o600)
    shutil.copytree(layout.mlflow / "artifacts", new / "mlflow-artifacts")
    return [*written, new / "secrets.json", *_files(new / "mlflow-artifacts")]


def restore_local(folder: Path, layout: Layout, store: Store, say: Say) -> None:
    """Put everything back into a stack that is stopped and has no databases. Repeat it after it was cut off."""
    record = read_record(folder)
    if missing := sorted(Place(layout).databases.keys() - record.databases.keys()):
        raise BackupError(f"{folder} holds no {', '.join(missing)}; restore one that was made by --postgres with it")
    for name, path in Place(layout).databases.items():
        if path.exists() and hash_file(path) != record.databases[name]:
            raise BackupError(f"{path} exists and would be overwritten; move {layout.home} away first")
    layout.close_to_others()
    restore_store(folder, store, say)  # first: the databases name what is in it
    write_private(layout.secrets, (folder / "secrets.json").read_text())
    shutil.copytree(folder / "mlflow-artifacts", layout.mlflow / "artifacts", dirs_exist_ok=True)
    for name, path in Place(layout).databases.items():  # last, and each in one step: half a database would look whole
        path.parent.mkdir(parents=True, exist_ok=True)
        half = path.with_name(f"{path.name}.restoring")
        shutil.copyfile(folder / name, half)
        half.replace(path)


def restore_store(folder: Path, store: Store, say: Say) -> None:
    """Other objects in the store stay; garbage collection finds those that are not needed."""
    record = read_record(folder)
    if record.store != store.root_uri:
        raise BackupError(
            f"{folder} is a backup of {record.store}, and its manifests contain that address; "
            f"it cannot be restored to {store.root_uri}. Set ARTIFACT_STORE={record.store}"
        )
    number = _copy(FileStore(folder.resolve() / "store"), store, say)
    say(f"restored from {folder}: {number} objects are in {store.root_uri}")


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def dump_postgres(folder: Path) -> list[Path]:
    """Each database by `pg_dump`; libpq's variables (PGHOST, PGUSER, PGPASSWORD) name the server."""
    new = _begin(folder)
    written = []
    for name in POSTGRES_DATABASES:
        target = new / f"{name}.dump"
        _postgres("pg_dump", "--format=custom", f"--file={target}", name)
        target.chmod(0o600)
        written.append(target)
    return written


def restore_postgres(folder: Path) -> None:
    """Restore into databases that `infra.deploy.setup databases` has created; their content is replaced."""
    read_record(folder)
    for name in POSTGRES_DATABASES:
        words = ("--clean", "--if-exists", "--single-transaction", f"--dbname={name}")
        _postgres("pg_restore", *words, str(folder / f"{name}.dump"))


def _postgres(*command: str) -> None:
    if not shutil.which(command[0]):
        raise BackupError(f"{command[0]} is not on PATH; install PostgreSQL's client, of the server's version or newer")
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    if done.returncode:
        raise BackupError(f"{command[0]} failed: {done.stderr.strip()[-800:]}")


def _copy(source: Store, target: Store, say: Say) -> int:
    """Copy every object, manifests last, so that an artifact is in the copy as a whole or not at all."""
    sizes = {entry.key: entry.size for entry in target.listing()}
    entries = [entry for entry in source.listing() if not entry.key.startswith(_LEFT_OUT)]
    entries.sort(key=lambda entry: (entry.key.endswith("/manifest.json"), entry.key))
    published: dict[str, bool] = {}
    copied, skipped = 0, 0
    for entry in entries:
        artifact = _artifact(entry.key)
        if artifact and artifact not in published:
            published[artifact] = _same_manifest(source, target, artifact)
        if artifact and published[artifact] and sizes.get(entry.key) == entry.size:
            continue
        try:
            _copy_one(source, target, entry.key)
            copied += 1
        except FileNotFoundError:
            skipped += 1  # superseded while we were copying: a checkpoint, a record of progress
    say(f"{copied} objects copied, {len(entries) - copied - skipped} were there already, {skipped} had gone")
    return len(entries) - skipped


def _artifact(key: str) -> str:
    """The artifact that an object belongs to; empty for objects that may change at any time."""
    parts = key.split("/")
    return "/".join(parts[:3]) if parts[0] == "artifacts" and len(parts) > 3 else ""


def _same_manifest(source: Store, target: Store, artifact: str) -> bool:
    """Whether both have published the same artifact; then its files are the same, too."""
    try:
        key = f"{artifact}/{MANIFEST}"
        return source.read_bytes(key) == target.read_bytes(key)
    except FileNotFoundError:
        return False


def _copy_one(source: Store, target: Store, key: str) -> None:
    if path := source.local_path(key):
        target.upload(path, key)
    elif path := target.local_path(key):
        source.download(key, path)
    else:
        target.write_bytes(key, source.read_bytes(key))
