"""docker-compose.yml as Compose itself reads it; no engine is needed for that."""

import json
import os
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.deploy.environment import SECRETS, parse, write
from tests.places import REPOSITORY

LOCAL_IMAGES = REPOSITORY / "infra" / "compose" / "local-images.yml"
PROFILES = ("s3", "cpu", "gpu", "demo")
ONCE = {"setup-databases", "setup-bucket", "setup-airflow", "setup-mlflow", "migrate-mlflow"}


@lru_cache
def compose_command() -> tuple[str, ...]:
    if given := os.environ.get("ATHANOR_TEST_COMPOSE"):
        return (given,)
    if shutil.which("docker"):
        asked = subprocess.run(["docker", "compose", "version"], capture_output=True, text=True, check=False)
        if asked.returncode == 0:
            return ("docker", "compose")
    pytest.skip(
        "no Docker Compose reads docker-compose.yml here: ATHANOR_TEST_COMPOSE may name the program; on Debian "
        "`python -m tests.compose.engine FOLDER` unpacks one, without root, and says where"
    )


def configure(*files: Path, env_file: Path) -> subprocess.CompletedProcess[str]:
    inherited = {name: os.environ[name] for name in ("PATH", "HOME", "DOCKER_CONFIG") if name in os.environ}
    words = [word for file in files for word in ("--file", str(file))]
    words += [word for profile in PROFILES for word in ("--profile", profile)]
    return subprocess.run(
        [*compose_command(), "--env-file", str(env_file), *words, "config", "--format", "json"],
        env=inherited,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def env_file(tmp_path: Path) -> Path:
    write(tmp_path / ".env")
    return tmp_path / ".env"


def read(env_file: Path, *files: Path) -> dict[str, Any]:
    done = configure(*(files or (REPOSITORY / "docker-compose.yml",)), env_file=env_file)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_compose_accepts_the_file_with_and_without_local_images(env_file: Path) -> None:
    usual = read(env_file)["services"]
    local = read(env_file, REPOSITORY / "docker-compose.yml", LOCAL_IMAGES)["services"]
    assert usual.keys() == local.keys()
    assert {name for name in usual if usual[name]["image"] != local[name]["image"]} == {"postgres", "s3"}


@pytest.mark.parametrize(
    ("right", "typo"),
    [
        ("services", "service"),
        ("services.mlflow.command", "comand"),
        ("services.mlflow.healthcheck.test", "tests"),
        ("services.mlflow.depends_on.setup-bucket", "setup-buket"),
        ("services.mlflow.depends_on.setup-bucket.condition", "conditions"),
        ("services.ray-worker-gpu.deploy.resources.reservations.devices", "device"),
        ("networks.database", "databases"),
        ("volumes.postgres", "postgre"),
        ("configs.s3-identities", "s3-identity"),
    ],
)
def test_a_misspelt_key_is_caught(right: str, typo: str, tmp_path: Path, env_file: Path) -> None:
    broken = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())
    *parents, leaf = right.split(".")
    node = broken
    for name in parents:
        node = node[name]
    node[typo] = node.pop(leaf)
    (tmp_path / "docker-compose.yml").write_text(yaml.safe_dump(broken))
    done = configure(tmp_path / "docker-compose.yml", env_file=env_file)
    assert done.returncode != 0
    assert typo in done.stderr or leaf in done.stderr


def test_nothing_starts_without_secrets(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    done = configure(REPOSITORY / "docker-compose.yml", env_file=tmp_path / "empty")
    assert done.returncode != 0
    assert "make compose-env" in done.stderr


def test_only_loopback_is_published(env_file: Path) -> None:
    services = read(env_file)["services"]
    published = {name: [port["host_ip"] for port in s["ports"]] for name, s in services.items() if s.get("ports")}
    assert published == {"airflow-api-server": ["127.0.0.1"], "mlflow": ["127.0.0.1"], "ray-head": ["127.0.0.1"]}


def test_servers_are_probed_restarted_and_bounded_in_memory(env_file: Path) -> None:
    for name, service in read(env_file)["services"].items():
        assert int(service["mem_limit"]) > 0, name
        if name not in ONCE | {"demo"}:
            assert service["restart"] == "unless-stopped", name
            assert service["healthcheck"]["test"], name


@pytest.mark.parametrize("files", [(), (REPOSITORY / "docker-compose.yml", LOCAL_IMAGES)], ids=["official", "local"])
def test_no_container_has_privileges_and_none_runs_as_root(files: tuple[Path, ...], env_file: Path) -> None:
    """The images of our own name their user themselves; see tests/compose."""
    for name, service in read(env_file, *files)["services"].items():
        assert "no-new-privileges:true" in service["security_opt"], name
        assert service["cap_drop"] == ["ALL"], name
        assert not service.get("cap_add"), name
        assert not service.get("privileged"), name
        if name in ("postgres", "s3"):
            assert service["user"] in ("999:999", "1000:1000"), name
            # the engine copies inline configs into the container's own file system
            assert service.get("read_only", False) is not bool(service.get("configs")), name


def test_of_the_object_store_only_what_asks_for_a_key_is_on_the_network(env_file: Path) -> None:
    """SeaweedFS's master, volume server and filer read and write everything without one."""
    words = read(env_file)["services"]["s3"]["command"]
    flags = dict(word.removeprefix("-").partition("=")[::2] for word in words[1:])
    assert flags["ip.bind"] == "127.0.0.1"
    assert flags["s3.ip.bind"] == "0.0.0.0"
    assert (flags["s3.port.iceberg"], flags["s3.port.lance"]) == ("0", "0")
    assert not {"webdav", "iam", "sftp", "mq.broker", "debug", "metricsPort"} & flags.keys()


def test_each_program_holds_only_the_secrets_it_needs(env_file: Path) -> None:
    """Who reads one container's environment must not get all the others."""
    values = parse(env_file.read_text())
    allowed = {
        "ray-head": {"RAY_TOKEN", "S3_ACCESS_KEY", "S3_SECRET_KEY", "MLFLOW_PASSWORD", "ATHANOR_SEAL_KEY"},
        "ray-worker": {"RAY_TOKEN", "S3_ACCESS_KEY", "S3_SECRET_KEY", "MLFLOW_PASSWORD", "ATHANOR_SEAL_KEY"},
        "postgres": {"POSTGRES_PASSWORD"},
        "airflow-triggerer": {
            *("S3_ACCESS_KEY", "S3_SECRET_KEY", "MLFLOW_PASSWORD", "AIRFLOW_DB_PASSWORD"),
            *("AIRFLOW_FERNET_KEY", "AIRFLOW_API_SECRET", "AIRFLOW_JWT_SECRET"),
        },
        # its task processes seal what jobs open
        "airflow-scheduler": {
            *("S3_ACCESS_KEY", "S3_SECRET_KEY", "MLFLOW_PASSWORD", "AIRFLOW_DB_PASSWORD"),
            *("AIRFLOW_FERNET_KEY", "AIRFLOW_API_SECRET", "AIRFLOW_JWT_SECRET", "ATHANOR_SEAL_KEY"),
        },
    }
    services = read(env_file)["services"]
    for name, names in allowed.items():
        text = json.dumps(services[name]["environment"])
        assert {secret.name for secret in SECRETS if values[secret.name] in text} == names, name


def test_ray_cannot_reach_the_databases(env_file: Path) -> None:
    document = read(env_file)
    assert document["networks"]["database"]["internal"] is True
    members = {name for name, service in document["services"].items() if "database" in service["networks"]}
    assert not any(name.startswith(("ray", "s3", "demo")) for name in members)
    assert document["services"]["postgres"]["networks"].keys() == {"database"}
