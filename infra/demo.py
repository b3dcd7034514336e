"""`make demo` and `make compose-demo`: start a run of `llm_pipeline` through Airflow's REST API, follow it, show its
results. The run belongs to Airflow: ending this program does not end the run."""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
from rich.console import Console

from infra.airflow_api import AirflowApi
from infra.health import Health
from infra.layout import StackSecrets
from infra.real_model import with_real_model
from infra.run_state import DAG_ID, Row, RunWatch, Snapshot
from infra.screen import gate_lines, open_screen, samples_panels, suites_table, summary_table
from infra.stack import Stack, relative
from stages.artifacts.addresses import open_store
from stages.config.closing import read_samples as read_samples_of
from stages.config.errors import StageError
from stages.config.evaluation import Evaluation, SuiteResult
from stages.config.graph import GRAPH, Stage
from stages.config.places import local_path
from stages.config.records import parse_object
from stages.config.text import printable
from stages.reporting.sizes import size_at

POLL_SECONDS = 2.0
# an Airflow that restarts, or is busy for a moment, must not end a run of hours
PATIENCE_SECONDS = 120.0


EXPECTED = {
    "demo": "about 9 minutes and 4.1 GB of memory on two cores without AVX-512 (EPYC, Zen 3)",
    "smollm": "about 20 minutes and 8.4 GB of memory on two cores without AVX-512 (EPYC, Zen 3)",
}
"""Of whole runs that find nothing built, rounded from measured ones; the plan says it by stage."""


@dataclass(frozen=True)
class Deployment:
    """Where a run is started and followed; addresses are those for a browser."""

    api: AirflowApi
    artifact_store: str
    airflow_url: str
    mlflow_url: str
    login: str
    "Words that tell how to log in."
    stopping: str
    "Words that tell how to stop everything."
    task_logs: Path | None = None
    "Folder of Airflow's task logs, where this machine has it."
    asking: str = ""
    "Command that serves all models of a run, up to the run's id; empty where there is none."


def demo(stack: Stack, *, recipe: str, params: dict[str, Any]) -> int:
    """Bring the local stack up and run the recipe on it; returns the exit status."""
    begin = time.monotonic()
    params = with_real_model(recipe, params, stack.say)
    if (expected := EXPECTED.get(recipe)) and not params.get("dry_run"):
        stack.say(f"recipe {recipe}: {expected}")
    record = stack.up()
    deployment = Deployment(
        api=Health(record, StackSecrets.load_or_generate(stack.layout)).airflow,
        artifact_store=record.artifact_store,
        airflow_url=record.airflow_url,
        mlflow_url=record.mlflow_url,
        login=f"user admin, password in {relative(stack.layout.airflow_passwords)}",
        stopping="`make down`",
        task_logs=stack.layout.logs / "tasks",
        asking="make serve RUN=",
    )
    return run(deployment, recipe=recipe, params=params, begin=begin)


def run(deployment: Deployment, *, recipe: str, params: dict[str, Any], begin: float) -> int:
    """Returns the exit status: 0 when the run succeeded, 1 when it failed, 130 when the user stopped watching."""
    console = Console(soft_wrap=False)
    deployment.api.wait_for_dag(DAG_ID, seconds=90)
    run_id = deployment.api.trigger(DAG_ID, {"recipe": recipe, **params})
    page = f"{deployment.airflow_url}/dags/{DAG_ID}/runs/{quote(run_id)}"
    say(console, f"run {run_id}  ({deployment.login})\n  {page}")
    watch = RunWatch(deployment.api, open_store(deployment.artifact_store), run_id, airflow_url=deployment.airflow_url)
    try:
        snapshot = follow(watch, console)
    except KeyboardInterrupt:
        say(console, f"\nThe run goes on without this window: {page}")
        say(console, f"To stop it, mark the run as failed on that page, or stop everything with {deployment.stopping}.")
        return 130
    if snapshot.state == "success":
        show_outcome(watch, snapshot, deployment, console, page=page, seconds=time.monotonic() - begin)
        return 0
    show_failure(watch, snapshot, deployment, console, page=page)
    return 1


def say(console: Console, line: str, style: str | None = None) -> None:
    """Print a line without folding it, so that addresses and paths can be clicked and copied."""
    console.print(printable(line), style=style, markup=False, highlight=False, soft_wrap=True)


def follow(watch: RunWatch, console: Console) -> Snapshot:
    """Show the run until it ends; waits for a server that does not answer for a while."""
    answered = time.monotonic()
    with open_screen(console) as screen:
        while True:
            try:
                snapshot = watch.snapshot()
                answered = time.monotonic()
            except httpx.TransportError as error:
                if time.monotonic() - answered > PATIENCE_SECONDS:
                    raise RuntimeError(f"Airflow has not answered for {PATIENCE_SECONDS:.0f} s: {error}") from error
            else:
                screen.show(snapshot)
                if snapshot.finished:
                    return snapshot
            time.sleep(POLL_SECONDS)


def show_outcome(
    watch: RunWatch, snapshot: Snapshot, deployment: Deployment, console: Console, *, page: str, seconds: float
) -> None:
    console.print(summary_table(snapshot))
    if (table := suites_table(read_suites(snapshot))) is not None:
        console.print(table)
    samples = read_samples(snapshot)
    for panel in samples_panels(samples):
        console.print(panel)
    if samples and (note := caution(snapshot)):
        say(console, note)
    built = [row.name for row in snapshot.stages if row.state == "built"]
    hits = [row.name for row in snapshot.stages if row.state == "hit"]
    if built:
        say(console, f"{len(built)} stages executed, {len(hits)} taken from earlier runs; {seconds:.0f} s in all")
    elif hits:
        say(console, f"0 stages executed: all {len(hits)} were already built by earlier runs; {seconds:.0f} s in all")
    else:
        say(console, f"0 stages executed; {seconds:.0f} s in all")
    if not built and (plan := watch.plan_key()):
        say(console, f"plan     {deployment.artifact_store}/{plan}")
    for line in gate_lines(snapshot):
        say(console, line)
    for line in addresses(watch, snapshot, deployment, page=page):
        say(console, line)


def evaluation_uri(snapshot: Snapshot) -> str:
    """Where the run's evaluation lies; empty when it has none."""
    return next((row.result.artifact.uri for row in snapshot.rows if row.name == Stage.EVALUATE and row.result), "")


def read_suites(snapshot: Snapshot) -> dict[str, SuiteResult]:
    """What `evaluate` measured, suite by suite; empty when the run had no evaluation."""
    if not (uri := evaluation_uri(snapshot)):
        return {}
    try:
        report = parse_object(open_store(uri).read_bytes("metrics.json"), f"{uri}/metrics.json")
        return Evaluation.from_report(report, settings_digest="").suites
    except (FileNotFoundError, StageError):  # the report and the log of `evaluate` tell of damage
        return {}


def read_samples(snapshot: Snapshot) -> list[dict[str, Any]]:
    """The prompts that `evaluate` answered with every model; empty when the run had no evaluation."""
    if not (uri := evaluation_uri(snapshot)):
        return []
    try:
        return [sample.model_dump() for sample in read_samples_of(open_store(uri).read_bytes("samples.json"), uri)]
    except (FileNotFoundError, StageError):  # the report and the log of `evaluate` tell of damage
        return []


def caution(snapshot: Snapshot) -> str:
    """What to think of the models' sentences, if they are too small for any; the report says the same."""
    models = [row.result for row in snapshot.stages if row.result and GRAPH[row.result.stage].is_language_model]
    try:
        return size_at(models[-1].artifact.uri).note() if models else ""
    except (FileNotFoundError, StageError):
        return ""


def addresses(watch: RunWatch, snapshot: Snapshot, deployment: Deployment, *, page: str) -> list[str]:
    """Where to look next: the run in Airflow, the parent run in MLflow, the report."""
    lines = [f"Airflow  {page}"]
    parent = watch.parameters().get("parent_run_id")
    if parent:
        lines.append(f"MLflow   {deployment.mlflow_url}/#/runs/{parent}")
    reported = next((row.result for row in snapshot.rows if row.name == Stage.REPORT and row.result), None)
    if reported:
        link = watch.links(Stage.REPORT).get("Report")
        lines += [f"report   {link}"] if link else []
        if reported.artifact.uri.startswith("file://"):
            lines.append(f"         {relative(local_path(reported.artifact.uri) / 'report.html')}")
    if deployment.asking and any(row.result and GRAPH[row.result.stage].is_language_model for row in snapshot.stages):
        serve = f"{deployment.asking}{shlex.quote(watch.run_id)}"
        lines.append(f"ask all  {serve}   (a page that asks the models of this run side by side)")
    return lines


def show_failure(watch: RunWatch, snapshot: Snapshot, deployment: Deployment, console: Console, *, page: str) -> None:
    """Which task failed, why, what to do, and where its log is."""
    if any(row.result for row in snapshot.stages):
        console.print(summary_table(snapshot))
    failed = [row for row in snapshot.rows if row.state == "failed"]
    for row in failed:
        say(console, f"\n{row.name} failed", style="bold red")
        for line in reasons(watch, row):
            say(console, f"  {line}")
        for log in task_logs(deployment, watch.run_id, row):
            say(console, f"  log: {log}")
    if not failed:
        say(console, "\nno task failed: the run was marked as failed, or timed out", style="bold red")
    say(console, f"\nAirflow  {page}")


def reasons(watch: RunWatch, row: Row) -> list[str]:
    if row.failure:
        lines = [f"{row.failure.category}: {row.failure.message}"]
        return [*lines, f"what to do: {row.failure.advice}"] if row.failure.advice else lines
    return watch.last_errors(row) or ["no error message was logged"]


def task_logs(deployment: Deployment, run_id: str, row: Row) -> list[str]:
    """The log files of the task's last attempt."""
    if deployment.task_logs is None:
        return []
    folder = deployment.task_logs / f"dag_id={DAG_ID}" / f"run_id={run_id}" / f"task_id={row.name}"
    return [relative(file) for file in sorted(folder.glob(f"attempt={row.try_number}.log*"))]
