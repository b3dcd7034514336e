"""The file `.env` beside docker-compose.yml: secrets, generated and checked, and the settings one may change.

Standard library only, for `make compose-env` and `make compose-up` come before anything is installed.
"""

from __future__ import annotations

import argparse
import base64
import os
import re
import secrets
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from stages.config.servers import is_web_address

FILE = ".env"
SHORTEST = 16
# what people leave in such files, compared in lower case
DEFAULTS = frozenset(
    {"admin", "airflow", "change-me", "changeme", "default", "mlflow", "password", "postgres", "secret"}
)


class EnvironmentRefused(RuntimeError):
    """The file cannot be used; the message says which lines and what to do."""


def _token() -> str:
    return secrets.token_hex(24)  # hexadecimal, so that it needs no quoting in URLs, YAML or shells


def _long_token() -> str:
    return secrets.token_hex(48)


def _fernet_key() -> str:
    return base64.urlsafe_b64encode(secrets.token_bytes(32)).decode()


def _access_key() -> str:
    return secrets.token_hex(10).upper()


@dataclass(frozen=True)
class Secret:
    """A value that is different in every deployment."""

    name: str
    help: str
    make: Callable[[], str] = _token


SECRETS = (
    Secret("AIRFLOW_ADMIN_PASSWORD", "first login in Airflow, user admin; change it there afterwards"),
    Secret("MLFLOW_ADMIN_PASSWORD", "first login in MLflow, user admin; change it there afterwards"),
    Secret("MLFLOW_PASSWORD", "MLflow account `athanor`, with which Airflow and the stages log in"),
    Secret("RAY_TOKEN", "Ray's token: Airflow's connection ray_default, and Ray's dashboard"),
    Secret("S3_ACCESS_KEY", "object store: name of the key", _access_key),
    Secret("S3_SECRET_KEY", "object store: the key"),
    Secret("POSTGRES_PASSWORD", "Postgres superuser, used by the set-up alone"),
    Secret("AIRFLOW_DB_PASSWORD", "Airflow's own role in Postgres"),
    Secret("MLFLOW_DB_PASSWORD", "MLflow's own role in Postgres"),
    Secret("AIRFLOW_FERNET_KEY", "encrypts passwords of connections in Airflow's database", _fernet_key),
    Secret("AIRFLOW_API_SECRET", "signs Airflow's sessions", _long_token),
    Secret("AIRFLOW_JWT_SECRET", "signs tokens between Airflow's components", _long_token),
    Secret("MLFLOW_FLASK_SECRET", "signs MLflow's forms", _long_token),
    Secret("ATHANOR_SEAL_KEY", "seals keys of endpoints that jobs get from Airflow's connections", _fernet_key),
)

# name -> (default, what it is); docker-compose.yml has the same defaults
SETTINGS: dict[str, tuple[str, str]] = {
    "COMPOSE_PROFILES": ("s3,cpu", "s3: an object store of our own; cpu, gpu: Ray workers of that kind"),
    "COMPOSE_FILE": ("docker-compose.yml", "add :infra/compose/local-images.yml where no image can be pulled"),
    "ATHANOR_BIND": (
        "127.0.0.1",
        "where pages are published; anything else wants TLS in front, docs/DEPLOY.md",
    ),
    "AIRFLOW_PORT": ("8080", ""),
    "MLFLOW_PORT": ("5000", ""),
    "RAY_PORT": ("8265", ""),
    "AIRFLOW_URL": ("http://localhost:8080", "as browsers see it"),
    "MLFLOW_URL": ("http://localhost:5000", "as browsers see it"),
    "RAY_URL": ("http://localhost:8265", "as browsers see it"),
    "MLFLOW_HOSTS": ("localhost:5000", "Host headers that MLflow accepts from browsers, with commas between"),
    "S3_ENDPOINT": ("http://s3:8333", "another server's, without the profile s3"),
    "S3_REGION": ("us-east-1", ""),
    "S3_BUCKET": ("athanor", ""),
    "ATHANOR_ALLOW_REMOTE_CODE": ("", "digests of models' code that may run, docs/SECURITY.md"),
    "ATHANOR_ENDPOINTS": ("", "addresses where runs may ask models, with commas between, docs/SYNTHESIS.md"),
    "ATHANOR_ENDPOINT_API_KEY": ("", "key for them, where runs name it in api_key_env and no connection"),
    "ATHANOR_JUDGE_ENDPOINTS": ("", "more of them, for judges only, docs/EVALUATION.md"),
    "ATHANOR_JUDGE_API_KEY": ("", "key for them, where runs name it in evaluate.judge.api_key_env"),
    "ATHANOR_LOG_FORMAT": ("text", "of stages' jobs; json for Loki, Elastic and the like, docs/OPERATIONS.md"),
    "ATHANOR_SIGNING_KEY": (
        "",
        "private key in Ray's containers that signs artifacts, docs/LINEAGE.md; mount it there",
    ),
    "ATHANOR_SOURCE_ROOTS": ("", "folders that runs may read, with colons between, docs/CURATION.md"),
    "RAY_HEAD_CPUS": ("2", "cores for stages with num_workers=0"),
    "RAY_HEAD_MEMORY": ("8g", ""),
    "RAY_WORKERS": ("1", "containers of the profile cpu"),
    "RAY_WORKER_CPUS": ("2", ""),
    "RAY_WORKER_MEMORY": ("8g", ""),
}
ADDRESSES = ("AIRFLOW_URL", "MLFLOW_URL", "RAY_URL", "S3_ENDPOINT")


def parse(text: str) -> dict[str, str]:
    """The assignments of an env file; the last one of a name counts, as in Compose."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        name, separator, value = line.strip().partition("=")
        if separator and not name.startswith("#"):
            quoted = re.match(r"""\s*(["'])(.*?)\1\s*(#.*)?$""", value)  # in quotes, '#' belongs to the value
            found[name.strip()] = quoted[2] if quoted else re.sub(r"\s#.*", "", value).strip().strip("'\"")
    return found


def problems(values: Mapping[str, str]) -> list[str]:
    """What is wrong with secrets and addresses, one line each; empty when nothing is."""
    found = []
    owners: dict[str, str] = {}
    for secret in SECRETS:
        value = values.get(secret.name, "")
        if not value:
            found.append(f"{secret.name} is missing")
        elif value.lower() in DEFAULTS or "change" in value.lower():
            found.append(f"{secret.name} is left at a default")
        elif len(value) < SHORTEST:
            found.append(f"{secret.name} has {len(value)} characters; at least {SHORTEST} are needed")
        elif other := owners.get(value):
            found.append(f"{secret.name} is the same as {other}")
        owners.setdefault(value, secret.name)
    for name in ADDRESSES:
        # Compose fills in variables, so what holds one is not known here.
        if (value := values.get(name, "")) and "$" not in value and not is_web_address(value):
            found.append(f"{name}={value!r} is not an address; expected http://host:port")
    return found


def check(path: Path) -> None:
    """Raise EnvironmentRefused unless every secret of the file may be used and only its owner may read it."""
    try:
        values = parse(path.read_text())
    except FileNotFoundError:
        raise EnvironmentRefused(f"{path} is not there; make it with `make compose-env`") from None
    found = problems(values)
    if path.stat().st_mode & 0o077:
        found.append(f"others may read {path}: chmod 600 {path}")
    if found:
        lines = "\n  ".join(found)
        raise EnvironmentRefused(f"{path} is refused:\n  {lines}\n`make compose-env` generates what is missing")


def write(path: Path) -> list[str]:
    """Generate the secrets that the file lacks, keep all else, and return the names of the new ones."""
    text = path.read_text() if path.exists() else _heading()
    known = parse(text)
    missing = [secret for secret in SECRETS if not known.get(secret.name)]
    if missing:
        text = text.rstrip("\n") + "\n" + "".join(f"# {s.help}\n{s.name}={s.make()}\n" for s in missing)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    with os.fdopen(handle, "w") as file:
        os.fchmod(handle, 0o600)
        file.truncate()
        file.write(text)
    return [secret.name for secret in missing]


def _heading() -> str:
    lines = ["# Secrets and settings of docker-compose.yml; made by `make compose-env`, never in Git.", ""]
    active = ("COMPOSE_PROFILES",)
    for name, (default, help_) in SETTINGS.items():
        lines += [f"# {help_}"] if help_ else []
        lines.append(f"{'' if name in active else '# '}{name}={default}")
    return "\n".join([*lines, "", ""])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m infra.deploy.environment", description=__doc__)
    parser.add_argument("command", choices=["write", "check"])
    parser.add_argument("--file", type=Path, default=Path(FILE))
    options = parser.parse_args()
    try:
        if options.command == "write":
            made = write(options.file)
            print(f"{options.file}: {f'generated {len(made)} secrets' if made else 'nothing was missing'}")
        check(options.file)
    except EnvironmentRefused as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
