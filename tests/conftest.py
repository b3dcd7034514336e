"""Fixtures every test may use: real servers, started when the first test asks and stopped at the end of the session, or
of the file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.config.graph import StageSpec
from stages.config.seals import SEAL_KEY
from tests.canaries import SEALING_KEY
from tests.live_stack import PIPELINE, LiveStack, live_stack
from tests.s3 import S3Server, best_kind, missing_of_ceph
from tests.s3 import s3_server as start_s3
from tests.servers import RayServer, end_leftovers, mlflow_tracking, ray_server

# Before anything imports Airflow or MLflow: tests never touch the user's homes, and nothing phones home.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Several test processes share the cores, and the models are tiny: a second thread of torch would wait, not help.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    """End servers that a killed test session left behind, before their ports and memory get in our way."""
    end_leftovers()
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Failures(config))


class Failures:
    """Names each failure when it happens: a session that is stopped by force prints no summary."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and terminal is not None:
            crash = getattr(report.longrepr, "reprcrash", None)
            why = (crash.message if crash else report.longreprtext).strip().partition("\n")[0]
            terminal.write_line(
                f"\n{report.nodeid} failed in {report.when}, after {report.duration:.0f} s: {why[:200]}"
            )


LONGEST = ("test_tiny_pipeline.py", "test_retrain.py", "test_llm_pipeline_dag.py", "test_stack.py", "test_gate.py")
"""Files that take minutes: they begin first, so that no process still has one when the others are through."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; all else keeps its order."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONGEST)))


@pytest.fixture(scope="module")
def ray_head() -> Iterator[RayServer]:
    """A Ray head with token authentication and 2 CPUs, which opens keys of endpoints. It ends with the file, because an
    idle one costs a tenth of a core."""
    with ray_server(environment={SEAL_KEY: SEALING_KEY}) as server:
        yield server


@pytest.fixture(scope="session")
def mlflow_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the MLflow server keeps its database, its artifacts and its log."""
    return tmp_path_factory.mktemp("mlflow")


@pytest.fixture(scope="session")
def mlflow_server(mlflow_home: Path) -> Iterator[str]:
    """URL of an MLflow server with its own database."""
    with mlflow_tracking(mlflow_home) as url:
        yield url


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveStack]:
    """Airflow, Ray and MLflow with the real DAGs and stages, shared by `make test-live` and `make test-browser`."""
    with live_stack(tmp_path_factory.mktemp("live")) as stack:
        yield stack


@pytest.fixture(scope="session")
def first_run(live: LiveStack) -> str:
    """The pipeline run that built every stage once and made the first champion of `athanor`; later runs hit."""
    run_id = live.pipeline("athanor")
    assert live.wait_end(PIPELINE, run_id, seconds=600) == "success"
    return run_id


@pytest.fixture(scope="session")
def ceph_server() -> Iterator[S3Server]:
    """Ceph's S3 gateway: creates objects only once, ignores checksums."""
    if missing := missing_of_ceph():
        pytest.skip(f"Ceph is not installed: {', '.join(missing)} not on PATH")
    with start_s3("ceph") as server:
        yield server


@pytest.fixture(scope="session")
def swift_server() -> Iterator[S3Server]:
    """OpenStack Swift: checks checksums, looks before it creates an object and may create it twice."""
    with start_s3("swift") as server:
        yield server


@pytest.fixture(scope="session")
def s3_server(request: pytest.FixtureRequest) -> S3Server:
    """Ceph's S3 gateway where it is installed, OpenStack Swift otherwise."""
    return request.getfixturevalue(f"{best_kind()}_server")


@pytest.fixture
def s3_store(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty s3:// bucket URI, with the AWS variables of this process pointing at its server."""
    return enter(s3_server, monkeypatch)


def enter(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """URI of a new bucket, with the AWS variables of this process pointing at its server."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{server.new_bucket()}"


@pytest.fixture
def file_store(tmp_path: Path) -> str:
    """An empty file:// store URI."""
    store = tmp_path / "store"
    store.mkdir()
    return store.as_uri()


S3_KINDS = [pytest.param(kind, marks=pytest.mark.integration) for kind in ("ceph", "swift")]


@pytest.fixture(params=["file", *S3_KINDS])
def every_store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty store of each kind, below a prefix."""
    if request.param == "file":
        return request.getfixturevalue("file_store")
    return f"{enter(request.getfixturevalue(f'{request.param}_server'), monkeypatch)}/a/prefix"


@pytest.fixture(params=S3_KINDS)
def every_server(request: pytest.FixtureRequest) -> S3Server:
    """Each real S3 server."""
    return request.getfixturevalue(f"{request.param}_server")


@pytest.fixture
def imaginary_stage() -> Iterator[StageSpec]:
    """A trained stage that stands in the graph for the length of a test."""
    from tests.imaginary import imaginary

    with imaginary() as spec:
        yield spec
