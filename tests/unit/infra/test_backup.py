"""A backup of the local stack that is destroyed and restored; and backups that must not be restored."""

import json
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from infra.backup import (
    POSTGRES_DATABASES,
    BackupError,
    back_up,
    dump_local,
    dump_postgres,
    read_record,
    restore_local,
    restore_postgres,
    restore_store,
)
from infra.layout import DamagedStateError, Layout, StackSecrets
from stages.artifacts.addresses import open_store
from stages.artifacts.manifests import fetch, read_manifest
from stages.config.graph import Stage
from tests.pipeline_records import publish_run
from tests.postgres import missing_for_postgres, postgres_server


def say(line: str) -> None:
    pass


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """A checkout whose stack has run: databases with a row, MLflow's files, secrets."""
    made = Layout(tmp_path / "checkout")
    for folder in (made.airflow, made.mlflow / "artifacts" / "1"):
        folder.mkdir(parents=True)
    (made.mlflow / "artifacts" / "1" / "report.html").write_text("story")
    for path in (made.airflow / "airflow.db", made.mlflow / "mlflow.db"):
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("CREATE TABLE runs (name TEXT)")
            connection.execute("INSERT INTO runs VALUES ('first')")
            connection.commit()
    StackSecrets.load_or_generate(made)
    return made


def rows(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as connection:
        return [name for (name,) in connection.execute("SELECT name FROM runs")]


def test_what_was_destroyed_comes_back_as_it_was_while_it_was_in_use(layout: Layout, tmp_path: Path) -> None:
    store, made = publish_run(tmp_path)
    store.write_bytes("leases/x/1.json", b"{}")
    secrets = StackSecrets.load_or_generate(layout)
    backup = tmp_path / "backup"
    with closing(sqlite3.connect(layout.airflow / "airflow.db")) as busy:
        busy.execute("INSERT INTO runs VALUES ('second')")
        busy.commit()  # in the write-ahead log only: a copy of the file alone would miss it
        busy.execute("INSERT INTO runs VALUES ('not committed')")
        back_up(backup, store, dump_local(backup, layout), say)
        busy.rollback()
    assert backup.stat().st_mode & 0o077 == 0
    shutil.rmtree(layout.home)
    shutil.rmtree(tmp_path / "store")
    restore_local(backup, layout, store, say)
    assert rows(layout.airflow / "airflow.db") == ["first", "second"]
    assert rows(layout.mlflow / "mlflow.db") == ["first"]
    assert (layout.mlflow / "artifacts" / "1" / "report.html").read_text() == "story"
    assert StackSecrets.load_or_generate(layout) == secrets
    for ref in made.values():
        fetch(ref, tmp_path / "cache")  # raises unless every byte is as the manifest says
    assert list(store.list("leases")) == []


def test_a_second_backup_copies_what_is_new_and_what_was_built_anew(layout: Layout, tmp_path: Path) -> None:
    store, made = publish_run(tmp_path)
    backup, said = tmp_path / "backup", list[str]()
    back_up(backup, store, dump_local(backup, layout), said.append)
    back_up(backup, store, dump_local(backup, layout), said.append)
    assert said[2].startswith("0 objects copied")
    ref = made[Stage.SFT]
    manifest = read_manifest(ref)
    store.write_bytes(f"artifacts/{ref.kind}/{ref.fingerprint}/model.safetensors", b"SFT")  # as long as before
    text = manifest.model_copy(update={"created_at": "2027-01-01T00:00:00+00:00"}).model_dump_json()
    store.write_bytes(f"artifacts/{ref.kind}/{ref.fingerprint}/manifest.json", text.encode())
    back_up(backup, store, dump_local(backup, layout), said.append)
    copy = open_store((backup / "store").as_uri())
    assert copy.read_bytes(f"artifacts/{ref.kind}/{ref.fingerprint}/model.safetensors") == b"SFT"


def test_a_changed_an_unfinished_and_a_misplaced_backup_are_refused(layout: Layout, tmp_path: Path) -> None:
    store, _ = publish_run(tmp_path)
    backup = tmp_path / "backup"
    back_up(backup, store, dump_local(backup, layout), say)
    with pytest.raises(BackupError, match="exists and would be overwritten"):
        restore_local(backup, layout, store, say)
    shutil.rmtree(layout.home)
    other = open_store((tmp_path / "elsewhere").as_uri())
    with pytest.raises(BackupError, match="cannot be restored to"):
        restore_local(backup, layout, other, say)
    assert not (layout.airflow / "airflow.db").exists()
    with (backup / "mlflow.db").open("ab") as file:
        file.write(b"x")
    with pytest.raises(BackupError, match=r"mlflow\.db is missing or was changed"):
        restore_local(backup, layout, store, say)
    (backup / "backup.json").unlink()
    with pytest.raises(BackupError, match="no finished backup"):
        read_record(backup)


def test_without_postgres_tools_or_server_the_reason_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BackupError, match="pg_dump is not on PATH"):
        dump_postgres(tmp_path / "backup")


@pytest.fixture
def postgres(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A real server with the three databases, named by libpq's variables."""
    if (reason := missing_for_postgres()) or not shutil.which("pg_dump"):
        pytest.skip(reason or "pg_dump is not on PATH (Debian: postgresql-client)")
    with postgres_server() as server:
        monkeypatch.setenv("PGHOST", str(server.host))
        monkeypatch.setenv("PGUSER", "postgres")
        for name in POSTGRES_DATABASES:
            server.sql(f'CREATE DATABASE "{name}"')
            server.sql("CREATE TABLE runs (name TEXT); INSERT INTO runs VALUES ('first')", name)
        yield


def sql(text: str, database: str) -> str:
    words = ("psql", "--no-psqlrc", "-At", "-v", "ON_ERROR_STOP=1", "-c", text, database)
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.integration
def test_postgres_databases_come_back_as_they_were(postgres: None, tmp_path: Path) -> None:
    store, made = publish_run(tmp_path)
    backup = tmp_path / "backup"
    back_up(backup, store, dump_postgres(backup), say)
    sql("DROP TABLE runs", "airflow")
    sql("INSERT INTO runs VALUES ('later')", "mlflow")
    shutil.rmtree(tmp_path / "store")
    restore_store(backup, store, say)
    restore_postgres(backup)
    assert [sql("SELECT name FROM runs", name) for name in POSTGRES_DATABASES] == ["first"] * 3
    fetch(made[Stage.DPO], tmp_path / "cache")


@pytest.mark.parametrize("damaged", ["", "{}"])
def test_damaged_secrets_do_not_overwrite_the_good_ones_of_an_earlier_backup(
    layout: Layout, tmp_path: Path, damaged: str
) -> None:
    store, _ = publish_run(tmp_path)
    backup = tmp_path / "backup"
    back_up(backup, store, dump_local(backup, layout), say)
    layout.secrets.write_text(damaged)
    with pytest.raises(DamagedStateError, match=r"secrets\.json is damaged"):
        dump_local(backup, layout)
    layout.secrets.unlink()
    with pytest.raises(BackupError, match=r"secrets\.json does not exist"):
        dump_local(backup, layout)
    read_record(backup)


@pytest.mark.parametrize("last", ["airflow.db", "mlflow.db"])
def test_a_restore_that_was_cut_off_leaves_no_half_database_and_may_be_repeated(
    layout: Layout, tmp_path: Path, last: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = publish_run(tmp_path)
    backup = tmp_path / "backup"
    back_up(backup, store, dump_local(backup, layout), say)
    secrets = StackSecrets.load_or_generate(layout)
    shutil.rmtree(layout.home)
    whole = shutil.copyfile

    def cut_off(source: Path, target: Path, *, follow_symlinks: bool = True) -> Path:
        if Path(source) == backup / last:
            Path(target).write_bytes(Path(source).read_bytes()[:100])
            raise OSError(28, "No space left on device")
        return whole(source, target, follow_symlinks=follow_symlinks)

    with monkeypatch.context() as patch:
        patch.setattr("infra.backup.shutil.copyfile", cut_off)
        with pytest.raises(OSError, match="No space left"):
            restore_local(backup, layout, store, say)
    assert not (layout.home / last.removesuffix(".db") / last).exists()
    assert StackSecrets.load_or_generate(layout) == secrets
    assert layout.home.stat().st_mode & 0o077 == 0
    restore_local(backup, layout, store, say)
    assert rows(layout.airflow / "airflow.db") == rows(layout.mlflow / "mlflow.db") == ["first"]


@pytest.mark.parametrize("where", ["infra.backup.shutil.copytree", "infra.backup._copy", "infra.backup.Record"])
def test_a_second_backup_that_was_cut_off_leaves_the_first(
    layout: Layout, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = publish_run(tmp_path)
    backup = tmp_path / "backup"
    back_up(backup, store, dump_local(backup, layout), say)
    with closing(sqlite3.connect(layout.airflow / "airflow.db")) as connection:
        connection.execute("INSERT INTO runs VALUES ('second')")
        connection.commit()

    def cut_off(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(where, cut_off)
        with pytest.raises(OSError, match="No space left"):
            back_up(backup, store, dump_local(backup, layout), say)
    shutil.copytree(backup, tmp_path / "first")
    back_up(backup, store, dump_local(backup, layout), say)
    assert not (backup / "unfinished").exists()
    for folder, expected in ((tmp_path / "first", ["first"]), (backup, ["first", "second"])):
        shutil.rmtree(layout.home)
        restore_local(folder, layout, store, say)
        assert rows(layout.airflow / "airflow.db") == expected
        assert (layout.mlflow / "artifacts" / "1" / "report.html").read_text() == "story"


def test_a_backup_of_a_server_is_not_restored_into_a_local_stack(layout: Layout, tmp_path: Path) -> None:
    folder, store = tmp_path / "backup", open_store((tmp_path / "store").as_uri())
    back_up(folder, store, dump_local(folder, layout), say)
    record = json.loads((folder / "backup.json").read_text())
    record["databases"] = {}
    (folder / "backup.json").write_text(json.dumps(record))
    with pytest.raises(BackupError, match=r"holds no airflow\.db, mlflow\.db"):
        restore_local(folder, layout, store, say)
