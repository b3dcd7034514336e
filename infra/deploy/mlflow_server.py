"""Starts MLflow with logins: `migrate` brings its database to this version, `serve` runs the server.

MLflow takes the address of its account database from a file only, so `serve` writes one that only this user may read.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path

# on all interfaces of its container, behind a login; Compose and Kubernetes decide what is published
HOST = "0.0.0.0"  # noqa: S104
SERVER = ("mlflow", "server", "--app-name", "basic-auth", "--host", HOST, "--port", "5000", "--workers")

CONFIG = """[mlflow]
default_permission = READ
database_uri = {uri}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
"""


def account_database(backend: str) -> str:
    """`mlflow` -> `mlflow_auth` on the same server. Separate, because MLflow takes a database with other
    tables in it for an old one of its own."""
    # Not by urlsplit: a '#' or '?' may be in a password, which ends at the '@', or in a path of SQLite.
    return re.sub(r"(?s)^([^:]+://(?:[^:/@]*(?::[^@]*)?@)?[^?]*)", r"\1_auth", backend)


def write_config(folder: Path, backend: str) -> Path:
    uri = os.environ.get("MLFLOW_AUTH_DATABASE_URI") or account_database(backend)
    file = folder / "basic_auth.ini"
    file.touch(mode=0o600)
    file.write_text(CONFIG.format(uri=uri.replace("%", "%%")))
    return file


def migrate(backend: str) -> None:
    """In this process: on a command line the password would be in the process list."""
    from mlflow.db import upgrade

    assert upgrade.callback is not None
    upgrade.callback(backend)
    print("MLflow's database is at this version")


def serve(backend: str) -> None:
    folder = Path(tempfile.mkdtemp(prefix="mlflow-"))
    os.environ["MLFLOW_AUTH_CONFIG_PATH"] = str(write_config(folder, backend))
    # its job runner is seven more processes and 1.8 GB for features that nothing here uses
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    os.execvp(SERVER[0], [*SERVER, os.environ.get("MLFLOW_WORKERS", "1")])


def main(arguments: list[str]) -> int:
    backend = os.environ.get("MLFLOW_BACKEND_STORE_URI", "")
    if not backend:
        print("error: MLFLOW_BACKEND_STORE_URI is not set", file=sys.stderr)
        return 1
    match arguments:
        case ["migrate"]:
            migrate(backend)
        case ["serve"]:
            serve(backend)
        case _:
            print("usage: python -m infra.deploy.mlflow_server migrate|serve", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
