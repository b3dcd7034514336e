"""A real Airflow (LocalExecutor) and a real Ray head for the chaos rows: every part can be killed and started again."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
import psutil

from infra.airflow_api import AirflowApi, AirflowApiError
from infra.components import PATIENT, airflow_components
from infra.environment import stack_environment
from infra.layout import Layout, StackRecord, StackSecrets, write_airflow_passwords
from infra.ports import any_free
from stages.artifacts.addresses import open_store, run_key
from stages.artifacts.store import Store, read_json
from stages.config.graph import Stage
from stages.config.request import run_folder
from tests.chaos.proxy import Proxy
from tests.places import REPOSITORY
from tests.servers import RayServer, ray_server, running

SHORT = {
    "AIRFLOW__TRIGGERER__JOB_HEARTBEAT_SEC": "1",
    "AIRFLOW__TRIGGERER__TRIGGERER_HEALTH_CHECK_THRESHOLD": "15",
    "AIRFLOW__SCHEDULER__SCHEDULER_HEARTBEAT_SEC": "1",
    "AIRFLOW__SCHEDULER__SCHEDULER_HEALTH_CHECK_THRESHOLD": "30",
    "AIRFLOW__SCHEDULER__ORPHANED_TASKS_CHECK_INTERVAL": "5",
    "AIRFLOW__SCHEDULER__TRIGGER_TIMEOUT_CHECK_INTERVAL": "2",
    "AIRFLOW__SCHEDULER__USE_JOB_SCHEDULE": "false",  # the reaper runs when a row asks for it
    "AIRFLOW__CORE__PARALLELISM": "12",
    "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "false",
}
COMPONENTS = ("api-server", "dag-processor", "scheduler", "triggerer")
CONNECTIONS = ("ray_lossy", "ray_late", "ray_flaky", "ray_cut", "ray_gone")
FINISHED = ("success", "failed")


@dataclass
class ChaosStack:
    """Airflow, Ray, a store and the proxies between them."""

    airflow: AirflowApi
    ray: RayServer
    home: Path
    store: Store
    logs: Path
    pids: Path
    proxies: dict[str, Proxy]
    environment: dict[str, str]
    port: int
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    revived: list[str] | None = None
    """While `supervised`: the names of what ended by itself and was started again."""
    _stacks: list[ExitStack] = field(default_factory=list)

    # ------------------------------------------------------------ processes

    def start(self, name: str) -> None:
        (component,) = [part for part in airflow_components(port=self.port) if part.name == name]
        stack = ExitStack()
        self.processes[name] = stack.enter_context(
            running(
                name,
                component.command,
                log=self.logs / f"{name}-{time.time():.0f}.log",
                environment={**self._fitting(component.environment), **self.environment},
                answers=self._answers if name == "api-server" else lambda: True,
            )
        )
        self._stacks.append(stack)

    def _fitting(self, environment: Mapping[str, str]) -> dict[str, str]:
        """Without what a component says to SQLite, where the database is another one."""
        is_sqlite = self.environment["AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"].startswith("sqlite")
        return {name: value for name, value in environment.items() if is_sqlite or name not in PATIENT}

    def _answers(self) -> bool:
        return bool(self.airflow.health())

    def kill(self, name: str) -> None:
        """SIGKILL. A triggerer dies with the process in which its triggers run; a scheduler leaves its executor's
        processes behind, as it does in real life, so that tasks that run go on."""
        self._kill(name, with_children=name == "triggerer")

    def kill_all(self) -> None:
        """SIGKILL to the whole Airflow, the processes of its tasks included."""
        for name in COMPONENTS:
            self._kill(name, with_children=True)

    def start_all(self) -> None:
        for name in COMPONENTS:
            self.start(name)

    @contextmanager
    def supervised(self) -> Iterator[list[str]]:
        """Inside, what ends by itself is started again while one waits, as Docker or Kubernetes would; yields the
        names of what was."""
        self.revived = []
        try:
            yield self.revived
        finally:
            self.revived = None

    def _kill(self, name: str, *, with_children: bool) -> None:
        server = self.processes.pop(name)
        process = psutil.Process(server.pid)
        for victim in (process, *(process.children(recursive=True) if with_children else ())):
            with contextlib.suppress(psutil.NoSuchProcess):  # a task's process may end meanwhile
                victim.kill()
        server.wait()

    def stop(self) -> None:
        for stack in reversed(self._stacks):
            stack.close()

    # ------------------------------------------------------------ runs

    def trigger(self, dag_id: str, behaviour: str = "", *, stage: Stage = Stage.CURATE, **conf: Any) -> Row:
        own = {"behaviour": behaviour} if behaviour else {}  # the product's DAGs do not know it
        body = {"logical_date": None, "conf": {**own, **conf}}
        run = self.ask("POST", f"dags/{dag_id}/dagRuns", json=body)
        return Row(self, dag_id, run["dag_run_id"], stage.value)

    def ask(self, method: str, path: str, **arguments: Any) -> Any:
        """One request, again when the database was locked: with SQLite, Airflow's api-server may wait for itself."""
        for _ in range(3):
            try:
                return self.airflow.call(method, path, **arguments)
            except AirflowApiError as error:
                if ": 500 " not in str(error):
                    raise
        return self.airflow.call(method, path, **arguments)

    def jobs(self) -> list[dict[str, Any]]:
        answer = httpx.get(f"{self.ray.url}/api/jobs/", headers=self.ray.headers, timeout=30)
        answer.raise_for_status()
        return [job for job in answer.json() if (job.get("metadata") or {}).get("airflow.run_id")]

    def wait(self, what: str, reached: Any, *, seconds: float = 400, pause: float = 0.7) -> Any:
        """Poll until `reached` returns something true."""
        deadline = time.monotonic() + seconds
        while not (found := reached()):
            dead = [name for name, process in list(self.processes.items()) if process.poll() is not None]
            assert not dead or self.revived is not None, f"died by itself: {dead}; see {self.logs}"
            for name in dead:
                self.start(name)
            if self.revived is not None:
                self.revived += dead
            assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
            time.sleep(pause)
        return found


@dataclass(frozen=True)
class Row:
    """One run of a chaos DAG: its stage task, its Ray jobs, its log."""

    stack: ChaosStack
    dag_id: str
    run_id: str
    stage: str = Stage.CURATE.value

    @property
    def name(self) -> str:
        return f"{self.dag_id} {self.run_id}"

    @property
    def path(self) -> str:
        return f"dags/{self.dag_id}/dagRuns/{quote(self.run_id)}"

    def task(self, map_index: int = -1) -> dict[str, Any]:
        suffix = "" if map_index < 0 else f"/{map_index}"
        return self.stack.ask("GET", f"{self.path}/taskInstances/{self.stage}{suffix}")

    def started_at(self) -> float:
        """When the task's first attempt started, in seconds since the epoch."""
        return datetime.fromisoformat(self.task()["start_date"]).timestamp()

    def state(self) -> str:
        return str(self.task()["state"])

    def run_state(self) -> str:
        return self.stack.ask("GET", self.path)["state"]

    def run_ended_at(self) -> float:
        """In seconds since the epoch."""
        return datetime.fromisoformat(self.stack.ask("GET", self.path)["end_date"]).timestamp()

    def wait_state(self, *states: str, seconds: float = 400) -> str:
        return self.stack.wait(
            f"{self.name} is {states}", lambda: (state := self.state()) in states and state, seconds=seconds
        )

    def finish(self, seconds: float = 600) -> str:
        """Wait for the end of the run and return the task's state."""
        self.stack.wait(f"{self.name} ends", lambda: self.run_state() in FINISHED, seconds=seconds)
        return self.state()

    def jobs(self) -> list[dict[str, Any]]:
        """Jobs of this run, in the order of their generations."""
        mine = [job for job in self.stack.jobs() if job["metadata"]["airflow.run_id"] == self.run_id]
        return sorted(mine, key=lambda job: int(job["metadata"]["airflow.generation"]))

    def statuses(self) -> list[str]:
        return [job["status"] for job in self.jobs()]

    def wait_running(self, *, try_number: int = 1) -> dict[str, Any]:
        """Until the newest job prints lines, and return it."""
        return self.stack.wait(f"{self.name} runs", lambda: self._printing(try_number))

    def _printing(self, count: int) -> dict[str, Any] | None:
        jobs = self.jobs()
        if len(jobs) < count or jobs[-1]["status"] != "RUNNING" or not self.lines(jobs[-1]["submission_id"]):
            return None
        return jobs[-1]

    def process(self, role: str, submission_id: str) -> psutil.Process:
        """The job's driver or its worker."""
        key = run_key(run_folder(self.dag_id, self.run_id), Stage(self.stage), f"{role}-{submission_id}.json")
        self.stack.wait(f"{role} of {self.name}", lambda: self.stack.store.exists(key), seconds=240)
        return psutil.Process(read_json(self.stack.store, key)["pid"])

    def task_process(self, try_number: int = 1) -> psutil.Process:
        name = f"{self.dag_id}--{self.run_id}---1--{try_number}.json".replace(":", "_").replace("+", "_")
        path = self.stack.pids / name
        self.stack.wait(f"task process of {self.name}", path.exists)
        return psutil.Process(json.loads(path.read_text())["pid"])

    def mark(self, state: str) -> None:
        self.stack.ask("PATCH", f"{self.path}/taskInstances/{self.stage}", json={"new_state": state})

    def clear(self) -> None:
        self.stack.ask(
            "POST",
            f"dags/{self.dag_id}/clearTaskInstances",
            json={"dag_run_id": self.run_id, "task_ids": [self.stage], "dry_run": False, "only_failed": False},
        )

    def stop_in_ray(self, submission_id: str) -> None:
        """What somebody does who looks at Ray's dashboard."""
        address = f"{self.stack.ray.url}/api/jobs/{submission_id}/stop"
        httpx.post(address, headers=self.stack.ray.headers, timeout=30).raise_for_status()

    def fail_run(self) -> None:
        self.stack.ask("PATCH", self.path, json={"state": "failed"})

    def seconds_until_stopped(self, submission_id: str, *, since: float) -> float:
        """Until Ray says that the job has ended and its process is gone."""
        driver = self.process("driver", submission_id)

        def ended() -> bool:
            status = {job["submission_id"]: job["status"] for job in self.jobs()}[submission_id]
            return status == "STOPPED" and not driver.is_running()

        self.stack.wait(f"{submission_id} of {self.name} stopped", ended, seconds=120, pause=0.2)
        return time.monotonic() - since

    def seconds_over(self, since: float) -> float:
        """How long after a moment, in seconds since the epoch, the last job ended."""
        return self.jobs()[-1]["end_time"] / 1000 - since

    # ------------------------------------------------------------ log

    def entries(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.task_log().splitlines() if line.startswith("{")]

    def logged_at(self, event: str) -> float:
        """When the task log first says this, in seconds since the epoch."""
        found = [entry["timestamp"] for entry in self.entries() if entry["event"].startswith(event)]
        return datetime.fromisoformat(found[0]).timestamp()

    def shown(self) -> str:
        """What people read: the entries' texts, without what Airflow adds to them, such as a trigger's event."""
        return "\n".join(str(entry["event"]) for entry in self.entries())

    def job_log(self, submission_id: str) -> str:
        answer = httpx.get(
            f"{self.stack.ray.url}/api/jobs/{submission_id}/logs", headers=self.stack.ray.headers, timeout=30
        )
        return (answer.json().get("logs") or "") if answer.is_success else ""

    def lines(self, submission_id: str) -> list[str]:
        """The numbered lines that Ray has of a job."""
        return _numbered(self.job_log(submission_id), submission_id)

    def task_log(self) -> str:
        folder = self.stack.logs / "tasks" / f"dag_id={self.dag_id}" / f"run_id={self.run_id}" / f"task_id={self.stage}"
        return "\n".join(path.read_text(errors="replace") for path in sorted(folder.glob("attempt=*")))

    def lost_lines(self) -> int:
        """Lines of jobs that ended by themselves which the task log does not have."""
        shown, lost = self.shown(), 0
        for job in self.jobs():
            if job["status"] == "SUCCEEDED":
                known = set(_numbered(shown, job["submission_id"]))
                lost += len(set(self.lines(job["submission_id"])) - known)
        return lost

    def repeated_lines(self) -> int:
        shown, repeated = self.shown(), 0
        for job in self.jobs():
            numbers = _numbered(shown, job["submission_id"])
            repeated += len(numbers) - len(set(numbers))
        return repeated


def _numbered(text: str, submission_id: str) -> list[str]:
    return re.findall(rf"line (\d+) of {re.escape(submission_id)}\b", text)


@contextmanager
def chaos_stack(
    root: Path,
    dag_files: list[Path],
    *,
    ray: RayServer | None = None,
    store_uri: str = "",
    variables: Mapping[str, str] | None = None,
) -> Iterator[ChaosStack]:
    """Everything up; ended with all its processes when the block ends.

    Without `ray` it starts a head of its own, without `store_uri` the store is a folder. `variables` are what Airflow
    and that head find in their environment besides.
    """
    layout = Layout(root)
    for folder in (root / "dags", layout.airflow, layout.store, layout.logs / "tasks", root / "pids"):
        folder.mkdir(parents=True)
    for path in dag_files:
        (root / "dags" / path.name).write_text(path.read_text())
    secrets = StackSecrets.load_or_generate(layout)
    write_airflow_passwords(layout, secrets.admin_password)
    store_uri, variables = store_uri or layout.store.as_uri(), variables or {}
    with ExitStack() as stack:
        for_jobs = {**variables, "ARTIFACT_STORE": store_uri, "PYTHONPATH": str(REPOSITORY)}
        ray = ray or stack.enter_context(ray_server(num_cpus=8, environment=for_jobs))
        at = urlsplit(ray.url)
        assert at.hostname
        assert at.port
        proxies = {name: stack.enter_context(Proxy(at.hostname, at.port)) for name in CONNECTIONS}
        record = StackRecord(
            stack_id="chaos",
            ports={"airflow": any_free(), "ray_dashboard": at.port, "mlflow": any_free()},
            runtime_dir=str(root),
            artifact_store=store_uri,
        )
        environment = {**_environment(layout, record, secrets, ray, proxies), **variables}
        migrate = [sys.executable, "-m", "airflow", "db", "migrate"]
        subprocess.run(migrate, env=environment, check=True, capture_output=True, timeout=240)
        chaos = ChaosStack(
            airflow=AirflowApi(record.airflow_url, user="admin", password=secrets.admin_password, timeout_seconds=90),
            ray=ray,
            home=layout.store.parent,
            store=open_store(store_uri),
            logs=layout.logs,
            pids=root / "pids",
            proxies=proxies,
            environment=environment,
            port=record.ports["airflow"],
        )
        stack.callback(chaos.stop)
        chaos.start_all()
        yield chaos


def _environment(
    layout: Layout, record: StackRecord, secrets: StackSecrets, ray: RayServer, proxies: dict[str, Proxy]
) -> dict[str, str]:
    environment = {**stack_environment(layout, record, secrets), **SHORT}
    # tests.servers marks what it starts, and a marker of ours would hide it
    environment.pop("ATHANOR_STACK")
    environment.pop("MLFLOW_TRACKING_URI")
    connection = {"conn_type": "ray_jobs", "host": "127.0.0.1", "password": ray.token}
    direct = {**connection, "host": urlsplit(ray.url).hostname, "port": record.ports["ray_dashboard"]}

    patient = {"ray_late": {"extra": {"timeout_seconds": 280}}}  # longer than its proxy holds the answer back
    ways = {name: {**connection, "port": proxy.port, **patient.get(name, {})} for name, proxy in proxies.items()}
    for name, way in {"ray_default": direct, **ways}.items():
        environment[f"AIRFLOW_CONN_{name.upper()}"] = json.dumps(way)
    return {
        **environment,
        "PYTHONPATH": str(REPOSITORY),
        "RAY_AUTH_TOKEN": ray.token,
        "CHAOS_PIDS": str(layout.checkout / "pids"),
    }
