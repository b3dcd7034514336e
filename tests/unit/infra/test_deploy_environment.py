"""`.env` of the Compose deployment: what is generated, what is refused."""

import re
import stat
from pathlib import Path

import pytest
from cryptography.fernet import Fernet

from infra.deploy.environment import SECRETS, SETTINGS, EnvironmentRefused, check, parse, write
from tests.places import REPOSITORY

COMPOSE = (REPOSITORY / "docker-compose.yml").read_text()


def test_a_new_file_is_accepted_and_only_its_owner_may_read_it(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    assert len(write(file)) == len(SECRETS)
    check(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_every_deployment_gets_its_own_secrets(tmp_path: Path) -> None:
    files = [tmp_path / "one", tmp_path / "two"]
    for file in files:
        write(file)
    one, two = (parse(file.read_text()) for file in files)
    assert not [secret.name for secret in SECRETS if one[secret.name] == two[secret.name]]


def test_airflow_can_encrypt_with_the_generated_key(tmp_path: Path) -> None:
    write(tmp_path / ".env")
    fernet = Fernet(parse((tmp_path / ".env").read_text())["AIRFLOW_FERNET_KEY"])
    assert fernet.decrypt(fernet.encrypt(b"token")) == b"token"


def test_what_is_there_stays_and_what_is_missing_comes(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    mine = "m" * 20
    file.write_text(f"# mine\nAIRFLOW_PORT=9090\nRAY_TOKEN={mine}\n")
    made = write(file)
    assert "RAY_TOKEN" not in made
    assert len(made) == len(SECRETS) - 1
    values = parse(file.read_text())
    assert (values["RAY_TOKEN"], values["AIRFLOW_PORT"]) == (mine, "9090")
    assert write(file) == []


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("RAY_TOKEN=change-me", "RAY_TOKEN is left at a default"),
        ("RAY_TOKEN=please-change-this-token", "RAY_TOKEN is left at a default"),
        ("POSTGRES_PASSWORD=postgres", "POSTGRES_PASSWORD is left at a default"),
        ("S3_SECRET_KEY=short", "S3_SECRET_KEY has 5 characters"),
        ("MLFLOW_PASSWORD=", "MLFLOW_PASSWORD is missing"),
    ],
)
def test_a_weak_secret_is_refused_by_name(tmp_path: Path, line: str, complaint: str) -> None:
    file = tmp_path / ".env"
    write(file)
    file.write_text(file.read_text() + line + "\n")  # the last assignment counts, as in Compose
    with pytest.raises(EnvironmentRefused, match=complaint):
        check(file)


@pytest.mark.parametrize(
    ("line", "value"),
    [("A=x # y", "x"), ('A="x #y"', "x #y"), ("A='x #y' # z", "x #y"), ("A=x#y", "x#y"), ('A=""', ""), ('A="x', "x")],
)
def test_a_comment_ends_a_value_that_has_no_quotes(line: str, value: str) -> None:
    assert parse(line) == {"A": value}


def test_the_same_value_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    write(file)
    password = parse(file.read_text())["MLFLOW_PASSWORD"]
    file.write_text(file.read_text() + f"MLFLOW_ADMIN_PASSWORD={password}\n")
    with pytest.raises(EnvironmentRefused, match="is the same as"):
        check(file)


def test_a_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    write(file)
    file.chmod(0o644)
    with pytest.raises(EnvironmentRefused, match="chmod 600"):
        check(file)


def test_every_secret_is_demanded_by_the_compose_file_and_none_has_a_default() -> None:
    used = dict(re.findall(r"\$\{([A-Z][A-Z0-9_]*)(:?[-?])", COMPOSE))
    assert {name for name, operator in used.items() if operator == ":?"} == {secret.name for secret in SECRETS}


def test_every_setting_has_the_default_that_the_compose_file_has() -> None:
    defaults = dict(re.findall(r"\$\{([A-Z][A-Z0-9_]*):-([^}]*)\}", COMPOSE))
    own = {name: value for name, (value, _) in SETTINGS.items() if not name.startswith("COMPOSE_")}
    assert own == {name: defaults.get(name) for name in own}
