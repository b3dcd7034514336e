"""`backup` and `restore`: choose the databases and the store, then call `infra.backup`."""

from __future__ import annotations

from pathlib import Path

from infra.backup import (
    BackupError,
    back_up,
    dump_local,
    dump_postgres,
    read_record,
    restore_local,
    restore_postgres,
    restore_store,
)
from infra.layout import StackRecord
from infra.stack import Stack, StackError
from infra.supervisor import Supervisor
from stages.artifacts.addresses import open_default_store, open_store
from stages.config.errors import StageError


def keep(stack: Stack, command: str, folder: Path, *, postgres: bool) -> None:
    """Back up into `folder`, or restore from it; raises BackupError or StackError."""
    try:
        match command, postgres:
            case "backup", True:
                store = open_default_store()
                back_up(folder, store, dump_postgres(folder), stack.say)
            case "backup", False:
                record = StackRecord.load(stack.layout)
                if record is None:
                    raise StackError("there is no local stack here; for a server's databases add --postgres")
                back_up(folder, open_store(record.artifact_store), dump_local(folder, stack.layout), stack.say)
            case _, True:
                restore_store(folder, open_default_store(), stack.say)
                restore_postgres(folder)
            case _:
                record = StackRecord.load(stack.layout)
                if record is not None and Supervisor(stack.layout, record).answers():
                    raise StackError("the stack runs; stop it with `make down` before you restore")
                restore_local(folder, stack.layout, open_store(read_record(folder).store), stack.say)
    except StageError as error:
        raise BackupError(f"{error.message}\n{error.advice}") from error
