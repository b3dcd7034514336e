"""Paths of the local stack: everything is under `.athanor/` of the checkout or of ATHANOR_HOME. Only Unix sockets move
to a short directory under the system's temporary one when that path is too long for them or has odd characters."""

from __future__ import annotations

import base64
import json
import os
import secrets
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from infra.plain_paths import is_plain, plain
from infra.ports import PREFERRED
from infra.private import close, make_private, write_private

CHECKOUT = Path(__file__).resolve().parent.parent

# sockaddr_un holds 107 characters; Ray appends session name, pid and socket name, 64 at most, to its directory
LONGEST_SOCKET_ROOT = 36


@dataclass(frozen=True)
class Layout:
    """Paths of one local stack; a path is not created by asking for it."""

    checkout: Path
    state: Path | None = None
    "Folder that holds `.athanor` when it is not the checkout, which may be read-only."

    @classmethod
    def of_environment(cls) -> Self:
        """This checkout, with its state where ATHANOR_HOME says."""
        named = os.environ.get("ATHANOR_HOME")
        return cls(CHECKOUT, Path(named).expanduser().absolute() if named else None)

    @property
    def home(self) -> Path:
        return (self.state or self.checkout) / ".athanor"

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

    def close_to_others(self) -> None:
        """Make the folder, and take from others the rights that older versions, or a copy, left them.

        Only what lies at the top and what holds secrets: below a closed folder nothing can be reached.
        """
        make_private(self.home)
        files = (self.record, self.secrets, self.airflow_passwords, self.supervisor_config, *self.databases)
        for path in (self.airflow, self.mlflow, self.logs, *files):
            if path.exists() and not path.is_symlink():
                close(path)

    @property
    def databases(self) -> tuple[Path, Path]:
        return self.airflow / "airflow.db", self.mlflow / "mlflow.db"

    def through_links(self, links: Path) -> Self:
        """The same folders under plain names, for the programs of the stack."""
        state = None if self.state is None else plain(self.state, links=links, name="state")
        return type(self)(plain(self.checkout, links=links, name="code"), state)


class DamagedStateError(RuntimeError):
    """A file of the stack holds something else than the stack wrote."""

    def __init__(self, what: str, advice: str) -> None:
        super().__init__(f"{what}. {advice}")
        self.what = what


class StackRecord(BaseModel):
    """The decisions of one start of the stack; written before the first process starts."""

    model_config = ConfigDict(frozen=True)

    stack_id: str = Field(min_length=1)
    "Marks every process of this stack in its environment, so that none is mistaken and none is left."
    ports: dict[str, int]
    runtime_dir: str
    "Short directory for Unix sockets and Ray's session files."
    artifact_store: str
    airflow_version: str = ""
    "Version whose database migration has run; empty before the first one."
    home: str = ""
    "The `.athanor` that this record was written into; a copy of a checkout has the record of the original."
    checkout: str = ""
    "Whose code runs: checkouts may share an ATHANOR_HOME by mistake."

    @field_validator("ports")
    @classmethod
    def _all_ports(cls, value: dict[str, int]) -> dict[str, int]:
        if missing := PREFERRED.keys() - value.keys():
            raise ValueError(f"no port for {', '.join(sorted(missing))}")
        return value

    @property
    def airflow_url(self) -> str:
        return f"http://127.0.0.1:{self.ports['airflow']}"

    @property
    def ray_url(self) -> str:
        return f"http://127.0.0.1:{self.ports['ray_dashboard']}"

    @property
    def ray_agent_url(self) -> str:
        return f"http://127.0.0.1:{self.ports['ray_agent_http']}"

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
        """The record of the last start; None when there is none. Raises DamagedStateError."""
        try:
            return cls.model_validate_json(layout.record.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise DamagedStateError(
                f"{layout.record} is damaged ({error.errors()[0]['msg']})",
                "`make down` finds and ends what runs all the same; then `make up` writes a new one",
            ) from None

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
    seal_key: str = ""
    "Seals keys of endpoints for jobs; empty only in files that are older than it."

    @classmethod
    def load_or_generate(cls, layout: Layout) -> Self:
        """Raises DamagedStateError: new secrets in the place of lost ones would make databases unreadable unasked."""
        try:
            found = cls.model_validate_json(layout.secrets.read_bytes())
            return found if found.seal_key else found._with_seal_key(layout)
        except ValidationError as error:
            raise DamagedStateError(
                f"{layout.secrets} is damaged ({error.errors()[0]['msg']})",
                "It holds the login, and the key that encrypts Airflow's connections. Put it back from a backup "
                "(secrets.json there), or run `make down`, delete it and run `make up`: that makes a new password, and "
                "connections made in Airflow have to be entered again",
            ) from None
        except FileNotFoundError:
            made = cls(
                admin_password=secrets.token_urlsafe(12),
                fernet_key=_fernet_key(),
                api_secret=secrets.token_urlsafe(48),
                jwt_secret=secrets.token_urlsafe(72),
                ray_token=secrets.token_hex(32),
                seal_key=_fernet_key(),
            )
            made._save(layout)
            return made

    def _with_seal_key(self, layout: Layout) -> Self:
        """Nothing was ever kept under it, so a new one loses nothing."""
        completed = self.model_copy(update={"seal_key": _fernet_key()})
        completed._save(layout)
        return completed

    def _save(self, layout: Layout) -> None:
        write_private(layout.secrets, self.model_dump_json(indent=2) + "\n")


def _fernet_key() -> str:
    return base64.urlsafe_b64encode(secrets.token_bytes(32)).decode()


def write_airflow_passwords(layout: Layout, admin_password: str) -> None:
    write_private(layout.airflow_passwords, json.dumps({"admin": admin_password}) + "\n")


def choose_runtime_dir(layout: Layout, recorded: str | None) -> Path:
    """A directory of our own, short enough for Unix sockets; the recorded one while it is still there and ours."""
    near = layout.home / "run"
    if len(str(near)) <= LONGEST_SOCKET_ROOT and is_plain(near):
        make_private(near)
        return near
    if recorded and is_ours(Path(recorded)):
        return Path(recorded)
    shared = (tempfile.gettempdir(), "/tmp")  # noqa: S108 - mkdtemp below makes a folder of our own there
    base = next((d for d in shared if len(d) <= LONGEST_SOCKET_ROOT - 18 and is_plain(Path(d))), None)
    if base is None:
        raise RuntimeError(
            f"no directory short enough for Unix sockets: {near} has {len(str(near))} characters, at most "
            f"{LONGEST_SOCKET_ROOT} plain ones are possible; set TMPDIR to a short path"
        )
    return Path(tempfile.mkdtemp(prefix="athanor-", dir=base))


def is_ours(directory: Path) -> bool:
    """Whether it exists, is no link, and belongs to us: a name in a shared temporary directory proves nothing."""
    return directory.is_dir() and not directory.is_symlink() and directory.stat().st_uid == os.getuid()
