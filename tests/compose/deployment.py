"""docker-compose.yml brought up as a project of its own, with ports, secrets and volumes of its own, and taken down."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from infra.airflow_api import AirflowApi
from infra.deploy.environment import SECRETS, parse, write
from infra.ports import any_free
from tests.compose.engine import BASE_IMAGE, Engine
from tests.places import REPOSITORY

LOCAL_INPUTS = REPOSITORY / "infra" / "images" / "local"
BUILD_SECONDS = 3600
START_SECONDS = 1200


@dataclass
class Deployment:
    """A running project: what the tests ask it, from outside as a user would and from inside as an operator."""

    engine: Engine
    project: str
    env_file: Path
    commit: str
    seconds: dict[str, float] = field(default_factory=dict)
    "How long each part took."

    @cached_property
    def values(self) -> Mapping[str, str]:
        return parse(self.env_file.read_text())

    @property
    def secrets(self) -> dict[str, str]:
        return {secret.name: self.values[secret.name] for secret in SECRETS}

    @property
    def airflow_url(self) -> str:
        return f"http://127.0.0.1:{self.values['AIRFLOW_PORT']}"

    @property
    def mlflow_url(self) -> str:
        return f"http://localhost:{self.values['MLFLOW_PORT']}"

    @property
    def ray_url(self) -> str:
        return f"http://127.0.0.1:{self.values['RAY_PORT']}"

    @cached_property
    def airflow(self) -> AirflowApi:
        return AirflowApi(self.airflow_url, user="admin", password=self.values["AIRFLOW_ADMIN_PASSWORD"])

    def compose(self, *words: str, **arguments: Any) -> str:
        settings = ("--project-name", self.project, "--env-file", str(self.env_file))
        return self.engine.docker("compose", *settings, *words, cwd=REPOSITORY, **arguments)

    def inside(self, service: str, program: str, *, seconds: float = 300) -> Any:
        """Run a Python program in a service's container; it prints JSON on its last line."""
        said = self.compose("exec", "--no-TTY", service, "python", "-c", program, seconds=seconds)
        return json.loads(said.splitlines()[-1])

    def containers(self) -> list[dict[str, Any]]:
        names = self.compose("ps", "--all", "--quiet").split()
        return json.loads(self.engine.docker("inspect", *names))

    def timed(self, name: str, *words: str, seconds: float) -> None:
        begin = time.monotonic()
        try:
            self.compose(*words, seconds=seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.compose('ps', '--all')}\n{self.last_words()}") from None
        finally:
            self.seconds[name] = time.monotonic() - begin

    def last_words(self) -> str:
        return self.compose("logs", "--no-color", "--tail", "25", check=False)[-12_000:]

    def memory(self) -> dict[str, str]:
        """Service -> memory in use, as the engine counts it (page cache left out)."""
        lines = self.engine.docker("stats", "--no-stream", "--format", "{{json .}}").splitlines()
        rows = [json.loads(line) for line in lines]
        return {
            row["Name"].removeprefix(f"{self.project}-"): row["MemUsage"].split(" / ")[0]
            for row in rows
            if row["Name"].startswith(self.project)
        }


@contextmanager
def deployment(engine: Engine, folder: Path) -> Iterator[Deployment]:
    """Build the images, bring everything up, yield it healthy, and remove all but images and build cache."""
    env_file = folder / ".env"
    commit = _commit()
    ports = {name: str(any_free()) for name in ("AIRFLOW_PORT", "MLFLOW_PORT", "RAY_PORT")}
    settings = {
        **ports,
        "COMPOSE_PROFILES": "s3,cpu",
        "MLFLOW_HOSTS": f"localhost:{ports['MLFLOW_PORT']}",
        "AIRFLOW_URL": f"http://127.0.0.1:{ports['AIRFLOW_PORT']}",
        "MLFLOW_URL": f"http://localhost:{ports['MLFLOW_PORT']}",
        "RAY_URL": f"http://127.0.0.1:{ports['RAY_PORT']}",
        "ATHANOR_GIT_COMMIT": commit,
        "RAY_WORKER_CPUS": "1",
        **(_local_images() if engine.local_images else {}),
    }
    env_file.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
    write(env_file)
    made = Deployment(engine, f"athanor-test-{os.getpid()}", env_file, commit)
    try:
        made.timed("build", "build", seconds=BUILD_SECONDS)
        made.timed("up", "up", "--detach", "--wait", seconds=START_SECONDS)
        yield made
    finally:
        if os.environ.get("ATHANOR_TEST_KEEP"):
            print(f"kept: docker compose --project-name {made.project} --env-file {env_file}")
        else:
            made.timed("down", "down", "--volumes", "--timeout", "20", seconds=300)


def _commit() -> str:
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def _local_images() -> dict[str, str]:
    """Settings for a machine that pulls nothing; wheels and certificates it was given go where builds look for them."""
    wheels = Path(os.environ.get("PIP_FIND_LINKS", "/nowhere"))
    found = [*wheels.glob("torch-*.whl")] if wheels.is_dir() else []
    for source, target in (
        *((wheel, LOCAL_INPUTS / "wheels" / wheel.name) for wheel in found),
        *(
            (file, LOCAL_INPUTS / "certificates" / file.name)
            for file in Path("/usr/local/share/ca-certificates").glob("*.crt")
        ),
    ):
        if not target.exists():
            shutil.copy(source, target)
    links = {"ATHANOR_FIND_LINKS": "/src/infra/images/local/wheels", "TORCH_BACKEND": ""} if found else {}
    return {
        "COMPOSE_FILE": "docker-compose.yml:infra/compose/local-images.yml",
        "ATHANOR_BASE_IMAGE": BASE_IMAGE,
        **links,
    }
