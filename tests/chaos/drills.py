"""What the drills share: a real Airflow and Ray whose store is a real S3 server behind a line of ours, and what every
drill must show in the end."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from stages.artifacts.addresses import open_store, run_key, split_artifact_uri
from stages.artifacts.manifests import find_manifest, read_file, verify
from stages.artifacts.store import Store
from stages.config.graph import GRAPH, Stage
from stages.config.request import ArtifactRef, StageResult, run_folder
from tests.chaos.proxy import Proxy
from tests.chaos.stack import ChaosStack, Row, chaos_stack
from tests.s3 import S3Server
from tests.small_world import make_tokens

NUM_STEPS = 24
DAG = Path(__file__).with_name("drill_dags.py")


@dataclass(frozen=True)
class World:
    """Airflow and its jobs reach the S3 server through `line`; the test itself goes straight."""

    stack: ChaosStack
    server: S3Server
    line: Proxy
    slow_line: Proxy
    "For a drill that gives its job another address."
    bucket: str
    tokens: ArtifactRef

    def start(self, name: str, *, bucket: str = "", tokens: ArtifactRef | None = None, **conf: Any) -> Drill:
        """A run in a store of its own."""
        store_uri = f"s3://{bucket or self.bucket}/{name}"
        given = (tokens or self.tokens).model_dump(mode="json")
        row = self.stack.trigger("drill", stage=Stage.PRETRAIN, store=store_uri, tokens=given, **conf)
        return Drill(name, row, open_store(store_uri), time.monotonic())

    def copy(self, artifact: ArtifactRef, name: str) -> ArtifactRef:
        """Put an artifact into the store of a run."""
        there, key = split_artifact_uri(artifact.uri)
        here = open_store(f"s3://{self.bucket}/{name}")
        for each in there.list(key):
            here.write_bytes(each, there.read_bytes(each))
        return artifact.model_copy(update={"uri": f"{here.root_uri}/{key}"})


@dataclass(frozen=True)
class Drill:
    """One run that is disturbed."""

    name: str
    row: Row
    store: Store
    started: float

    def driver(self) -> psutil.Process:
        """The job's own process."""
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if words[1:3] == ["-m", "stages"] and words[3].startswith(f"{self.store.root_uri}/"):
                return process
        raise AssertionError(f"no process of {self.name}")

    def job_log(self) -> str:
        """Of the newest job."""
        return self.row.job_log(self.row.jobs()[-1]["submission_id"])

    def told(self) -> str:
        """Why the last attempt failed, as the task says it."""
        return [entry["error_detail"][-1]["exc_value"] for entry in self.row.entries() if "error_detail" in entry][-1]

    def worker(self) -> psutil.Process:
        """Of a job with one Ray Train worker."""
        return psutil.Process(int(re.findall(r"\(RayTrainWorker pid=(\d+)\)", self.job_log())[-1]))

    def result(self) -> StageResult:
        run_id = run_folder(self.row.dag_id, self.row.run_id)
        return StageResult.model_validate_json(self.store.read_bytes(run_key(run_id, Stage.PRETRAIN, "result.json")))

    def digest(self) -> str:
        """Of the artifact, which is whole and tells of every step."""
        artifact = self.result().artifact
        manifest = find_manifest(self.store, GRAPH[Stage.PRETRAIN].kind, artifact.fingerprint)
        assert manifest is not None
        verify(self.store, manifest, hashes=True)
        steps = [json.loads(line)["step"] for line in read_file(artifact, "history.jsonl").splitlines()]
        assert steps == list(range(1, NUM_STEPS + 1)), "a step is lost"
        assert list(self.store.list(f"checkpoints/{artifact.fingerprint}")) == [], "checkpoints are left"
        assert list(self.store.list(f"leases/{artifact.fingerprint}")) == [], "a lease is left"
        return manifest.digest


@contextmanager
def drill_world(root: Path, server: S3Server) -> Iterator[World]:
    """All of it up, until the block ends."""
    host, _, port = server.endpoint.removeprefix("http://").partition(":")
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in server.environment.items():
            patch.setenv(name, value)
        line, slow_line = (stack.enter_context(Proxy(host, int(port))) for _ in range(2))
        bucket = server.new_bucket()
        variables = {**server.environment, "AWS_ENDPOINT_URL": address(line)}
        made = stack.enter_context(chaos_stack(root, [DAG], store_uri=f"s3://{bucket}/airflow", variables=variables))
        made.airflow.wait_for_dag("drill", seconds=120)
        tokens = make_tokens(root / "world", f"s3://{bucket}/world")
        yield World(made, server, line, slow_line, bucket, tokens)


def address(line: Proxy) -> str:
    return f"http://127.0.0.1:{line.port}"


def note(drill: Drill, fault: str, *, sees: str, seconds: float, undisturbed: str) -> None:
    """Check what every drill must have in the end, and write its line of the table."""
    assert drill.row.state() == "success"
    assert drill.digest() == undisturbed, "the artifact is not that of an undisturbed run"
    write_line(fault, sees, equal="yes", seconds=seconds)


def write_line(fault: str, sees: str, *, equal: str, seconds: float) -> None:
    """A drill gets here when nothing is lost."""
    if table := os.environ.get("CHAOS_TABLE"):
        with open(table, "a") as file:
            file.write(f"| {fault} | {sees} | nothing | {equal} | {seconds:.0f} |\n")
