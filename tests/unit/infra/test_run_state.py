"""Following a run: a small HTTP server plays Airflow, a folder is the store."""

import json
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from infra.airflow_api import AirflowApi, AirflowApiError
from infra.demo import Deployment, caution, follow, read_samples, read_suites, reasons, show_outcome
from infra.run_state import RunWatch
from infra.screen import PlainScreen, gate_lines, samples_panels, suites_table, summary_table
from stages.artifacts.folder import FileStore
from stages.config.gate_records import GateOverride, GateRecord, Outcome, failed, passed, skipped
from stages.config.graph import Stage
from stages.config.request import ArtifactRef, FileEntry, run_folder
from tests.answering import Asked, answering_json
from tests.pipeline_records import publish_run, tampered

RUN = "manual__2026-11-23T09:00:00+00:00"
KEY = run_folder("llm_pipeline", RUN)


class Airflow:
    """Answers like Airflow's API for one run; `tokens` counts logins, the first one is refused after one use."""

    def __init__(self) -> None:
        self.state = "running"
        self.tasks: dict[str, str] = {"resolve": "success"}
        self.tokens = 0
        self.expired: set[str] = set()
        self.requests: list[str] = []
        self.pools: dict[str, Any] = {}
        self.log: list[dict[str, Any]] = []
        self.locked = 0
        "So many answers are 500; what was asked is done all the same."

    def answer(self, method: str, path: str, body: Any, token: str) -> tuple[int, Any]:
        self.requests.append(f"{method} {path}")
        answer = self._answer(method, path, body, token)
        if self.locked and path != "/auth/token":
            self.locked -= 1
            return 500, {"detail": {"reason": "Database error"}}
        return answer

    def _answer(self, method: str, path: str, body: Any, token: str) -> tuple[int, Any]:
        if path == "/auth/token":
            self.tokens += 1
            return (
                (201, {"access_token": f"t{self.tokens}"}) if body["password"] == "right" else (401, {"detail": "no"})
            )
        if token != f"Bearer t{self.tokens}" or token in self.expired:
            return 401, {"detail": "expired"}
        path = path.removeprefix("/api/v2/")
        if path == "pools" and method == "POST":
            if body["name"] in self.pools:
                return 409, {"detail": "there is one"}
            self.pools[body["name"]] = body
            return 201, body
        if path.startswith("pools/"):
            pool = self.pools.get(path.removeprefix("pools/"))
            return (200, pool) if pool else (404, {"detail": "no such pool"})
        if path.endswith("/dagRuns") and method == "POST":
            return 400, {"detail": "Invalid input for param alignment: 'x' is not one of\n\nFailed validating: schema"}
        if path.endswith("/taskInstances"):
            return 200, {"task_instances": [self.task(name, state) for name, state in self.tasks.items()]}
        if "/xcomEntries/" in path:
            return 200, {"value": {}}
        if "/logs/" in path:
            return 200, {"content": self.log}
        return 200, {"state": self.state}

    def task(self, name: str, state: str) -> dict[str, Any]:
        ended = "2026-11-23T09:01:40Z" if state in ("success", "failed") else None
        return {
            "task_id": name,
            "state": state,
            "try_number": 1,
            "start_date": "2026-11-23T09:00:00Z",
            "end_date": ended,
            "map_index": -1,
        }


@pytest.fixture
def airflow() -> Iterator[tuple[Airflow, str]]:
    fake = Airflow()

    def answer(asked: Asked) -> tuple[int, Any]:
        path = asked.path.replace("%3A", ":").replace("%2B", "+")
        return fake.answer(asked.method, path, asked.value, asked.authorization)

    with answering_json(answer) as url:
        yield fake, url


def client(url: str, password: str = "right") -> AirflowApi:
    return AirflowApi(url, user="admin", password=password)


def store_with(tmp_path: Path, **records: Any) -> FileStore:
    """Records by `stage__name`, such as sft__result."""
    store = FileStore(tmp_path)
    for name, value in records.items():
        stage, _, record = name.partition("__")
        store.write_bytes(f"runs/{KEY}/{stage}/{record}.json", json.dumps(value).encode())
    return store


def result(stage: str, *, hit: bool, uri: str = "file:///nowhere", **metrics: float) -> dict[str, Any]:
    artifact = {"kind": stage, "uri": uri, "fingerprint": "f" * 64, "digest": "d" * 64}
    named = {name.replace("__", "/"): value for name, value in metrics.items()}
    return {"stage": stage, "hit": hit, "artifact": artifact, "metrics": named, "wall_seconds": 12.0}


def gate(stage: str, **changes: Any) -> dict[str, Any]:
    """The record of a gate that made three checks."""
    checks = [passed("reload", "alike"), skipped("x", "not about it"), passed("accept/ece", "0.1")]
    record = GateRecord(
        stage=Stage(stage),
        artifact=ArtifactRef(kind="k", uri="file:///nowhere", fingerprint="f", digest="d"),
        outcome=Outcome.PASSED,
        checks=tuple(checks),
        at="2026-11-29T15:00:00+00:00",
    )
    return record.model_copy(update=changes).model_dump(mode="json")


def test_gates_are_shown_in_a_few_words_and_on_a_live_screen_only_when_they_matter(
    airflow: tuple[Airflow, str], tmp_path: Path
) -> None:
    fake, url = airflow
    wrong = failed("accept/accuracy_low", "0.45", "> 0.5", "Bring more pairs.")
    override = {"by": "ada", "reason": "few pairs"}
    passed_over = gate(
        "reward", outcome=Outcome.FAILED, checks=(wrong,), override=GateOverride.model_validate(override)
    )
    failure = {"category": "data", "message": "gate_ppo: 1 of 1 checks failed: kl", "advice": "Look at it."}
    store = store_with(
        tmp_path,
        gate_sft__gate=gate("sft"),
        gate_reward__gate=passed_over,
        gate_ppo__gate=gate("ppo", outcome=Outcome.FAILED, checks=(wrong,)),
        gate_ppo__failure=failure,
    )
    fake.tasks = {
        "sft": "success",
        "gate_sft": "success",
        "gate_reward": "success",
        "gate_ppo": "failed",
        "gate_dpo": "running",
        "gate_evaluate": "none",
    }
    snapshot = RunWatch(client(url), store, RUN).snapshot()
    rows = {row.name: row for row in snapshot.rows}
    assert rows["gate_sft"].key_metric == "2 passed, 1 skipped"
    assert rows["gate_reward"].key_metric == "1 failed; passed by ada: few pairs"
    watch = RunWatch(client(url), store, RUN)
    assert reasons(watch, rows["gate_ppo"]) == [
        "data: gate_ppo: 1 of 1 checks failed: kl",
        "what to do: Look at it.",
    ]
    lines = [name for name, row in rows.items() if row.needs_a_line]
    assert lines == ["sft", "gate_reward", "gate_ppo", "gate_dpo"]
    assert [row.name for row in snapshot.stages] == ["sft"]
    assert gate_lines(snapshot) == [
        "3 gates: 5 checks, 2 failed",
        "  reward is passed over: accept/accuracy_low: 0.45; allowed: > 0.5. Bring more pairs.",
    ]


def test_an_expired_login_is_renewed_without_the_caller_noticing(airflow: tuple[Airflow, str]) -> None:
    fake, url = airflow
    api = client(url)
    assert api.run_state("llm_pipeline", RUN) == "running"
    fake.expired.add("Bearer t1")
    assert api.run_state("llm_pipeline", RUN) == "running"
    assert fake.tokens == 2


def test_a_wrong_password_is_said_not_retried(airflow: tuple[Airflow, str]) -> None:
    fake, url = airflow
    with pytest.raises(AirflowApiError, match=r"login at .* refused: 401"):
        client(url, "wrong").run_state("llm_pipeline", RUN)
    assert fake.tokens == 1


def test_a_refused_form_is_explained_without_the_schema(airflow: tuple[Airflow, str]) -> None:
    with pytest.raises(AirflowApiError) as caught:
        client(airflow[1]).trigger("llm_pipeline", {"alignment": "x"})
    assert "alignment: 'x' is not one of" in str(caught.value)
    assert "Failed validating" not in str(caught.value)


def test_the_pool_counts_deferred_tasks_and_keeps_what_the_user_set(airflow: tuple[Airflow, str]) -> None:
    fake, url = airflow
    client(url).ensure_pool("gpu", slots=1, description="heavy")
    assert fake.pools["gpu"]["include_deferred"] is True
    fake.pools["gpu"]["slots"] = 8
    client(url).ensure_pool("gpu", slots=1, description="heavy")
    assert fake.pools["gpu"]["slots"] == 8


def test_a_locked_database_is_asked_again_but_no_run_is_started_twice(
    airflow: tuple[Airflow, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infra.airflow_api._PAUSE_SECONDS", 0.0)
    fake, url = airflow
    api = client(url)
    fake.locked = 3  # the look, the look again, and the pool's creation, whose repetition finds it there
    api.ensure_pool("gpu", slots=1, description="heavy")
    assert list(fake.pools) == ["gpu"]
    fake.locked = 4
    assert api.run_state("llm_pipeline", RUN) == "running"
    fake.locked = 5
    with pytest.raises(AirflowApiError, match=r"500 .*Database error"):
        api.run_state("llm_pipeline", RUN)
    fake.locked, fake.requests = 1, []
    with pytest.raises(AirflowApiError, match=r"500 .*Database error"):
        api.trigger("llm_pipeline", {})
    assert len(fake.requests) == 1


def test_rows_come_in_pipeline_order_with_progress_results_and_failures(
    airflow: tuple[Airflow, str], tmp_path: Path
) -> None:
    fake, url = airflow
    fake.tasks = {
        "sft": "deferred",
        "reward": "failed",
        "tokenize": "success",
        "resolve": "success",
        "curate": "success",
    }
    store = store_with(
        tmp_path,
        curate__result=result("curate", hit=True, curate__documents_kept=1234.0),
        tokenize__result=result("tokenize", hit=False, tokens__train=5e6),
        sft__progress={"done": 30, "total": 120, "unit": "step", "rate": 2.5, "rate_unit": "steps/s", "loss": 4.25},
        reward__failure={"category": "data", "message": "no pairs", "advice": "bring pairs"},
    )
    rows = RunWatch(client(url), store, RUN).snapshot().rows
    assert [(row.name, row.state) for row in rows] == [
        ("resolve", "success"),
        ("curate", "hit"),
        ("tokenize", "built"),
        ("sft", "deferred"),
        ("reward", "failed"),
    ]
    assert [row.fraction for row in rows] == [1.0, 1.0, 1.0, 0.25, None]
    assert [row.key_metric for row in rows][1:4] == ["documents 1,234", "tokens 5,000,000", "loss 4.25"]
    assert rows[4].failure is not None
    assert rows[1].seconds == 100.0


def test_a_failure_is_told_with_its_advice_or_from_the_tasks_log(airflow: tuple[Airflow, str], tmp_path: Path) -> None:
    fake, url = airflow
    fake.tasks = {"resolve": "failed", "reward": "failed"}
    fake.log = [
        {"event": "starting", "level": "info"},
        {
            "event": "failed",
            "level": "error",
            "error_detail": [{"exc_type": "ConfigFailed", "exc_value": "recipe='x'"}],
        },
    ]
    words = {"category": "data", "message": "no pairs", "advice": "bring pairs"}
    watch = RunWatch(client(url), store_with(tmp_path, reward__failure=words), RUN)
    resolve, reward = watch.snapshot().rows
    assert reasons(watch, resolve) == ["ConfigFailed: recipe='x'"]
    assert reasons(watch, reward) == ["data: no pairs", "what to do: bring pairs"]


def test_without_a_terminal_every_change_is_one_line(airflow: tuple[Airflow, str], tmp_path: Path) -> None:
    fake, url = airflow
    watch = RunWatch(client(url), store_with(tmp_path, curate__result=result("curate", hit=True)), RUN)
    output = StringIO()
    console = Console(file=output, width=100)
    with PlainScreen(console) as screen:
        for tasks in ({"curate": "none"}, {"curate": "deferred"}, {"curate": "deferred"}, {"curate": "success"}):
            fake.tasks = tasks
            screen.show(watch.snapshot())
    assert [line.split() for line in output.getvalue().splitlines()] == [
        ["curate", "running"],
        ["curate", "hit", "1", "min", "40", "s"],
    ]


def test_following_ends_with_the_run(airflow: tuple[Airflow, str], tmp_path: Path) -> None:
    fake, url = airflow
    fake.state = "failed"
    snapshot = follow(RunWatch(client(url), FileStore(tmp_path), RUN), Console(file=StringIO()))
    assert snapshot.finished
    assert snapshot.state == "failed"


def test_samples_are_read_from_the_evaluation_and_shown_side_by_side(
    airflow: tuple[Airflow, str], tmp_path: Path
) -> None:
    fake, url = airflow
    fake.tasks = {"evaluate": "success"}
    samples = [{"prompt": "What is x?", "responses": {"base": "b", "sft": "s" * 900}, "scores": {}}]
    (tmp_path / "samples.json").write_text(json.dumps(samples))
    store = store_with(tmp_path, evaluate__result=result("evaluate", hit=False, uri=tmp_path.as_uri()))
    snapshot = RunWatch(client(url), store, RUN).snapshot()
    assert read_samples(snapshot) == samples
    output = StringIO()
    console = Console(file=output, width=100)
    for panel in samples_panels(read_samples(snapshot)):
        console.print(panel)
    console.print(summary_table(snapshot))
    assert "What is x?" in output.getvalue()
    assert "…" in output.getvalue()
    assert "built" in output.getvalue()


def test_suites_are_shown_with_their_intervals_as_on_the_page(airflow: tuple[Airflow, str], tmp_path: Path) -> None:
    fake, url = airflow
    fake.tasks = {"evaluate": "success"}

    def suite(metric: str, chance: float | None, **roles: float) -> dict[str, Any]:
        scores = {role: {"value": v, "low": v - 0.05, "high": v + 0.05, "items": 96} for role, v in roles.items()}
        return {"metric": metric, "better": "higher", "chance": chance, "items": 96, "roles": scores}

    report = {
        "models": {"sft": {}, "ppo": {}},
        "suites": {
            "score": suite("score", None, sft=0.1, ppo=0.9),
            "gold": suite("score", None, sft=0.1, ppo=0.3),
            "gold_agreement": suite("accuracy", 0.5, gold=0.7),
            "questions": suite("accuracy", 0.25, sft=0.27, ppo=0.421),
        },
    }
    (tmp_path / "metrics.json").write_text(json.dumps(report))
    store = store_with(tmp_path, evaluate__result=result("evaluate", hit=False, uri=tmp_path.as_uri()))
    suites = read_suites(RunWatch(client(url), store, RUN).snapshot())
    output = StringIO()
    Console(file=output, width=100).print(suites_table(suites))
    head, *rows = [line.split() for line in output.getvalue().splitlines()]
    assert head == ["suite", "SFT", "PPO"]
    # A scorer's agreement is no model's; what PPO was trained against comes last.
    assert [row[0] for row in rows[:3]] == ["questions,", "gold,", "score,"]
    assert rows[0][3:] == ["0.27", "[0.22,", "0.32]", "0.421", "[0.371,", "0.471]"]
    assert " ".join(word for row in rows[3:] for word in row) == "with 95 % intervals; green is better than chance"
    table = suites_table(suites, at_most=1)
    assert table is not None
    assert "2 more suites are in the report" in str(table.caption)
    cells: list[Any] = [next(iter(column.cells)) for column in table.columns[1:]]
    assert [cell.style for cell in cells] == ["", "green"]  # 0.22 is below chance, 0.371 above


@pytest.mark.parametrize("damaged", ["{", "[]", '{"models": 3}', '{"models": {}, "suites": {"x": {"roles": 3}}}'])
def test_a_damaged_evaluation_costs_the_table_and_not_the_screen(
    airflow: tuple[Airflow, str], tmp_path: Path, damaged: str
) -> None:
    fake, url = airflow
    fake.tasks = {"evaluate": "success"}
    (tmp_path / "metrics.json").write_text(damaged)
    store = store_with(tmp_path, evaluate__result=result("evaluate", hit=False, uri=tmp_path.as_uri()))
    assert read_suites(RunWatch(client(url), store, RUN).snapshot()) == {}
    assert suites_table({}) is None


def test_with_the_samples_of_a_small_model_the_screen_says_what_to_judge_it_by(
    airflow: tuple[Airflow, str], tmp_path: Path
) -> None:
    fake, url = airflow
    _, made = publish_run(tmp_path)
    tampered(made[Stage.PRETRAIN], ledger={"tokens_trained": 5e6})
    file = FileEntry(path="model.safetensors", size=4 * 2_600_000, sha256="0" * 64)
    tampered(made[Stage.DPO], files=[file.model_dump()])
    fake.tasks = {"sft": "success", "dpo": "success"}
    records = {
        f"{stage.value}__result": result(stage.value, hit=False, uri=made[stage].uri)
        for stage in (Stage.SFT, Stage.DPO)
    }
    snapshot = RunWatch(client(url), store_with(tmp_path / "records", **records), RUN).snapshot()
    assert caution(snapshot).startswith("A model of 2.6 M parameters trained on 5 M tokens cannot write sentences")


def test_a_dry_run_says_where_its_plan_is_and_does_not_speak_of_earlier_runs(
    airflow: tuple[Airflow, str], tmp_path: Path
) -> None:
    fake, url = airflow
    fake.tasks = {"resolve": "success", "plan": "success", "sft": "skipped"}
    store = FileStore(tmp_path)
    store.write_bytes(f"runs/{KEY}/plan.md", b"# Plan")
    api = client(url)
    watch = RunWatch(api, store, RUN)
    shown = StringIO()
    deployment = Deployment(
        api=api,
        artifact_store=store.root_uri,
        airflow_url=url,
        mlflow_url=url,
        login="",
        stopping="",
        task_logs=tmp_path,
    )
    show_outcome(watch, watch.snapshot(), deployment, Console(file=shown, width=400), page="", seconds=3.0)
    assert f"plan     {store.root_uri}/runs/{KEY}/plan.md" in shown.getvalue()
    assert "0 stages executed; 3 s in all" in shown.getvalue()
