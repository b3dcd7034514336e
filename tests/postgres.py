"""A real PostgreSQL server for tests, on a Unix socket in a directory of its own."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.servers import Restartable, running


@dataclass(frozen=True)
class PostgresServer:
    """Its superuser is `postgres`, who needs no password on the socket."""

    host: Path
    """Directory of the socket, which libpq takes for a host."""
    server: Restartable

    def url(self, database: str) -> str:
        """For SQLAlchemy."""
        return f"postgresql+psycopg2://postgres@/{database}?host={self.host}"

    def sql(self, text: str, database: str = "postgres") -> str:
        words = ("psql", "-h", self.host, "-U", "postgres", "--no-psqlrc", "-At", "-v", "ON_ERROR_STOP=1", "-c", text)
        return subprocess.run((*words, database), check=True, capture_output=True, text=True).stdout.strip()


def missing_for_postgres() -> str:
    """Why this machine cannot run the server, in words; empty when it can."""
    if not _programs() or not shutil.which("psql") or _user() is None:
        return "PostgreSQL's server and client are not installed (Debian: postgresql)"
    return ""


@contextmanager
def postgres_server() -> Iterator[PostgresServer]:
    """Start it; gone when the block ends. The server refuses to run as root, and runs as user `postgres` then."""
    programs, user = _programs()[-1], _user()
    assert user is not None
    root = Path(tempfile.mkdtemp(prefix="ath-pg-", dir="/tmp"))  # its socket needs a short path
    os.chown(root, user.pw_uid, user.pw_gid)
    ids = (f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups")
    within = ("setpriv", *ids) if os.getuid() == 0 else ()
    data, ready = str(root / "data"), (str(programs / "pg_isready"), "-q", "-h", str(root))
    initdb = (str(programs / "initdb"), "-D", data, "-U", "postgres", "--auth=trust", "--no-sync", "-E", "UTF8")
    options = ("-c", "listen_addresses=", "-c", f"unix_socket_directories={root}", "-c", "fsync=off")
    server = Restartable(
        lambda: running(
            "postgres",
            (*within, str(programs / "postgres"), "-D", data, *options),
            log=root / "server.log",
            environment={},
            answers=lambda: subprocess.run(ready, check=False).returncode == 0,
        )
    )
    try:
        subprocess.run((*within, *initdb), check=True, capture_output=True)
        server.start()
        yield PostgresServer(root, server)
    finally:
        server.stop()
        shutil.rmtree(root, ignore_errors=True)


def _programs() -> list[Path]:
    """Folders of installed servers, the newest last."""
    return sorted(path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb"))


def _user() -> pwd.struct_passwd | None:
    if os.getuid() != 0:
        return pwd.getpwuid(os.getuid())
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        return None
