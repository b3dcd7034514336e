"""Creates what the first run needs: databases, the bucket, Airflow's schema and first user, MLflow's account.

Every part may be repeated, because it creates only what is missing; Compose runs them at each start, Kubernetes as a
job. What people have changed stays (their passwords, slots of the pool); accounts of machines follow the environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

from infra.deploy.probe import Unhealthy, check_store
from infra.deploy.roles import for_import
from stages.artifacts.s3_client import s3_client
from stages.config.errors import StageError, without_logins
from stages.config.places import bucket_and_key
from stages.config.servers import is_web_address

PATIENCE_SECONDS = 180.0
POOL = "gpu"
CONNECTION = "ray_default"


class SetupFailed(RuntimeError):
    """The message says what could not be set up, and why."""


def main(arguments: list[str]) -> int:
    try:
        match arguments:
            case ["databases"]:
                databases()
            case ["bucket"]:
                bucket()
            case ["airflow"]:
                airflow()
            case ["roles"]:
                roles()
            case ["mlflow"]:
                mlflow()
            case _:
                print("usage: python -m infra.deploy.setup databases|bucket|airflow|roles|mlflow", file=sys.stderr)
                return 2
    except SetupFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except StageError as error:
        print(f"error: {error.message} {error.advice}".rstrip(), file=sys.stderr)
        return 1
    return 0


def required(name: str) -> str:
    if not (value := os.environ.get(name)):
        raise SetupFailed(f"{name} is not set in the environment of this container")
    return value


def databases() -> None:
    """A role and its databases for Airflow and for MLflow; no other role may connect to them. libpq's variables name
    the server and its superuser."""
    import psycopg2
    from psycopg2 import sql

    connection = psycopg2.connect(dbname="postgres")
    connection.autocommit = True  # CREATE DATABASE refuses a transaction
    with connection.cursor() as cursor:
        for role, names in (("airflow", ("airflow",)), ("mlflow", ("mlflow", "mlflow_auth"))):
            password = required(f"{role.upper()}_DB_PASSWORD")
            cursor.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", [role])
            verb = "ALTER" if cursor.fetchone() else "CREATE"
            words = sql.SQL(f"{verb} ROLE {{}} LOGIN PASSWORD {{}}")
            cursor.execute(words.format(sql.Identifier(role), sql.Literal(password)))
            for name in names:
                cursor.execute("SELECT 1 FROM pg_database WHERE datname = %s", [name])
                if not cursor.fetchone():
                    words = sql.SQL("CREATE DATABASE {} OWNER {} ENCODING 'UTF8' TEMPLATE template0")
                    cursor.execute(words.format(sql.Identifier(name), sql.Identifier(role)))
                    print(f"database {name} made")
                cursor.execute(sql.SQL("REVOKE CONNECT ON DATABASE {} FROM PUBLIC").format(sql.Identifier(name)))
    connection.close()


def bucket() -> None:
    """The bucket of ARTIFACT_STORE, and proof that the server creates objects only once."""
    from botocore.exceptions import ClientError

    uri = required("ARTIFACT_STORE")
    if not uri.startswith("s3://"):
        raise SetupFailed(f"ARTIFACT_STORE={without_logins(uri)!r} has no bucket; expected s3://bucket/prefix")
    name, _ = bucket_and_key(uri, field="ARTIFACT_STORE")
    client = s3_client()
    try:
        client.head_bucket(Bucket=name)
    except ClientError as error:
        if error.response["Error"]["Code"] not in ("404", "NoSuchBucket"):
            raise SetupFailed(f"bucket {name}: {error}") from error
        region = client.meta.region_name
        # the first of Amazon's regions is the one that may not be named
        place = {} if region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": region}}
        client.create_bucket(Bucket=name, **place)
        print(f"bucket {name} made")
    try:
        check_store(uri)
    except Unhealthy as error:
        raise SetupFailed(str(error)) from error


def airflow() -> None:
    """Schema, first user, the role of raters, the connection to Ray and the pool of heavy stages."""
    _airflow("db", "migrate")
    password = required("AIRFLOW_ADMIN_PASSWORD")
    _airflow(
        *("users", "create", "--role", "Admin", "--username", "admin", "--email", "admin@localhost"),
        *("--firstname", "Athanor", "--lastname", "Administrator"),
        typed=f"{password}\n{password}\n",  # asked for twice; an existing user stays as it is
    )
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "connections.json"  # a file, because every user sees the arguments of processes
        file.touch(mode=0o600)
        file.write_text(json.dumps({CONNECTION: ray_connection()}))
        _airflow("connections", "import", "--overwrite", str(file))
    roles()
    if not _airflow("pools", "get", POOL, may_fail=True):
        _airflow("pools", "set", POOL, "1", "heavy stages, as many at a time as there are slots", "--include-deferred")


def roles() -> None:
    """The role of people who rate answers and approve promotions; one that exists stays as it is."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "roles.json"
        file.write_text(json.dumps(for_import()))
        _airflow("roles", "import", str(file))


def ray_connection() -> dict[str, object]:
    """The host is the whole address, since parts of it would lose a path and take port 8265 for 443."""
    ray, dashboard = required("RAY_JOBS_URL"), os.environ.get("RAY_URL", "")
    for name, address in (("RAY_JOBS_URL", ray), ("RAY_URL", dashboard)):
        if address and not is_web_address(address):
            raise SetupFailed(f"{name}={without_logins(address)!r} is not an address; expected http://host:port")
    return {
        "conn_type": "ray_jobs",
        "host": ray,
        "password": required("RAY_TOKEN"),
        "extra": json.dumps({"dashboard_url": dashboard}),
    }


def _airflow(*words: str, typed: str = "", may_fail: bool = False) -> bool:
    """Run Airflow's command line and print that; its output is shown only when it fails."""
    done = subprocess.run(["airflow", *words], input=typed, capture_output=True, text=True, check=False)
    if done.returncode and not may_fail:
        raise SetupFailed(f"`airflow {' '.join(words[:2])}` failed:\n{(done.stderr or done.stdout)[-2000:]}")
    if not done.returncode:
        print(f"airflow {' '.join(words[:2])}: done")
    return done.returncode == 0


def mlflow() -> None:
    """The account that Airflow and the stages use: no administrator, and with the password of the environment."""
    user, password = required("MLFLOW_TRACKING_USERNAME"), required("MLFLOW_TRACKING_PASSWORD")
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            status, text = _as_mlflow_admin("POST", "users/create", {"username": user, "password": password})
            break
        except httpx.TransportError as error:  # not listening yet
            if time.monotonic() > deadline:
                raise SetupFailed(f"MLflow has not answered for {PATIENCE_SECONDS:.0f} s: {error}") from error
            time.sleep(2)
        except httpx.InvalidURL as error:
            raise SetupFailed(f"MLFLOW_TRACKING_URI or NO_PROXY holds no valid address: {error}") from error
    if status != 200 and "RESOURCE_ALREADY_EXISTS" in text:
        status, text = _as_mlflow_admin("PATCH", "users/update-password", {"username": user, "password": password})
    if status != 200:
        raise SetupFailed(f"MLflow refused the account {user}: {status} {text[:500]}")
    print(f"MLflow account {user}: done")


def _as_mlflow_admin(method: str, path: str, body: dict[str, str]) -> tuple[int, str]:
    url = f"{required('MLFLOW_TRACKING_URI').rstrip('/')}/api/2.0/mlflow/{path}"
    login = ("admin", required("MLFLOW_AUTH_ADMIN_PASSWORD"))
    answer = httpx.request(method, url, json=body, auth=login, timeout=15)
    return answer.status_code, answer.text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
