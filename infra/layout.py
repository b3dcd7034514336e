"""Paths of the local stack: everything is under `.athanor/` of the checkout, except that Unix sockets move to a short
directory under the system's temporary one when the checkout's path is too long for them."""

from __future__ import annotations

import base64
import json
import os
import secrets
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict

CHECKOUT = Path(__file__).resolve().parent.parent

# sockaddr_un holds 107 characters; Ray appends session name, pid and socket name, 64 at most, to its directory
LONGEST_SOCKET_ROOT = 36


@dataclass(frozen=True)
class Layout:
    """Paths of one local stack; a path is not created by asking for it."""

    checkout: Path

    @property
    def home(self) -> Path:
        return self.checkout / ".athanor"

    @property
    def record(self) -> Path:
        return self.home / "stack.json"

    @property
    def secrets(self) -> Path:
        return self.home / "secrets.json"

    @property
    def logs(self) -> Path:
        return self.home / "logs"

    @property
    def airflow(self) -> Path:
        return self.home / "airflow"

    @property
    def airflow_passwords(self) -> Path:
        return self.airflow / "passwords.json"

    @property
    def mlflow(self) -> Path:
        return self.home / "mlflow"

    @property
    def store(self) -> Path:
        return self.home / "store"

    @property
    def supervisor_config(self) -> Path:
        return self.home / "supervisord.conf"

    def log_of(self, component: str) -> Path:
        return self.logs / f"{component}.log"


class StackRecord(BaseModel):
    """The decisions of one start of the stack; written before the first process starts."""

    model_config = ConfigDict(frozen=True)

    stack_id: str
    "Marks every process of this stack in its environment, so that none is mistaken and none is left."
    ports: dict[str, int]
    runtime_dir: str
    "Short directory for Unix sockets and Ray's session files."
    artifact_store: str
    airflow_version: str = ""
    "Version whose database migration has run; empty before the first one."

    @property
    def airflow_url(self) -> str:
        return f"http://127.0.0.1:{self.ports['airflow']}"

    @property
    def ray_url(self) -> str:
        return f"http://127.0.0.1:{self.ports['ray_dashboard']}"

    @property
    def mlflow_url(self) -> str:
        return f"http://127.0.0.1:{self.ports['mlflow']}"

    @property
    def ray_dir(self) -> Path:
        return Path(self.runtime_dir) / "ray"

    @property
    def supervisor_socket(self) -> Path:
        return Path(self.runtime_dir) / "supervisor.sock"

    @classmethod
    def load(cls, layout: Layout) -> Self | None:
        """The record of the last start; None when there is none or the file is damaged."""
        try:
            return cls.model_validate_json(layout.record.read_text())
        except (FileNotFoundError, ValueError):
            return None

    def save(self, layout: Layout) -> None:
        write_private(layout.record, self.model_dump_json(indent=2) + "\n")


class StackSecrets(BaseModel):
    """Generated once per checkout, readable by the owner alone, kept over restarts so that logins stay valid."""

    model_config = ConfigDict(frozen=True)

    admin_password: str
    fernet_key: str
    api_secret: str
    jwt_secret: str
    ray_token: str

    @classmethod
    def load_or_generate(cls, layout: Layout) -> Self:
        try:
            return cls.model_validate_json(layout.secrets.read_text())
        except FileNotFoundError:
            made = cls(
                admin_password=secrets.token_urlsafe(12),
                fernet_key=base64.urlsafe_b64encode(secrets.token_bytes(32)).decode(),
                api_secret=secrets.token_urlsafe(48),
                jwt_secret=secrets.token_urlsafe(72),
                ray_token=secrets.token_hex(32),
            )
            write_private(layout.secrets, made.model_dump_json(indent=2) + "\n")
            return made


def write_private(path: Path, text: str) -> None:
    """Replace `path` in one step with a file only its owner may read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mkstemp makes it 0600
    with os.fdopen(handle, "w") as file:
        file.write(text)
    os.replace(temporary, path)


def write_airflow_passwords(layout: Layout, admin_password: str) -> None:
    write_private(layout.airflow_passwords, json.dumps({"admin": admin_password}) + "\n")


def choose_runtime_dir(layout: Layout, recorded: str | None) -> Path:
    """A directory of our own, short enough for Unix sockets; the recorded one while it is still there and ours."""
    near = layout.home / "run"
    if len(str(near)) <= LONGEST_SOCKET_ROOT:
        near.mkdir(parents=True, exist_ok=True, mode=0o700)
        return near
    if recorded and is_ours(Path(recorded)):
        return Path(recorded)
    shared = (tempfile.gettempdir(), "/tmp")  # noqa: S108 - mkdtemp below makes a folder of our own there
    base = next((d for d in shared if len(d) <= LONGEST_SOCKET_ROOT - 18), None)
    if base is None:
        raise RuntimeError(
            f"no directory short enough for Unix sockets: {near} has {len(str(near))} characters, at most "
            f"{LONGEST_SOCKET_ROOT} are possible; set TMPDIR to a short path"
        )
    return Path(tempfile.mkdtemp(prefix="athanor-", dir=base))


def is_ours(directory: Path) -> bool:
    """Whether it exists, is no link, and belongs to us: a name in a shared temporary directory proves nothing."""
    return directory.is_dir() and not directory.is_symlink() and directory.stat().st_uid == os.getuid()
