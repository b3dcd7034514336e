"""A job's side of a key from a connection: opened at its start and again by every client, and sent to its endpoint."""

import json
import time
from pathlib import Path

import pytest

from stages.artifacts.addresses import open_store, run_key
from stages.artifacts.store import read_json
from stages.config.endpoints import EndpointConfig
from stages.config.errors import Category, ConfigError, ExitCode
from stages.config.graph import Stage
from stages.config.judging import JudgeConfig
from stages.config.resolve import resolve
from stages.config.seals import MAX_AGE_SECONDS, SEAL_KEY, SEALED_KEYS, seal
from stages.job.context import StageContext, StageOutcome
from stages.job.runner import run_stage
from stages.judge.endpoint import EndpointJudge
from stages.judge.pairwise import Question
from stages.models.endpoint.client import ChatClient
from tests.judge_server import Reply, judge_server
from tests.pipeline_records import request_for
from tests.unit.config.test_seals import FIRST, SECOND
from tests.unit.models.endpoint.test_client import questions

KEY = "sk-planted-7d11"
JOB = "athanor-synthesize"
"""As `request_for` calls it."""


@pytest.fixture(autouse=True)
def sealing_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SEAL_KEY, FIRST)


def sealed(monkeypatch: pytest.MonkeyPatch, *, job: str = JOB, connection: str = "llm", age: float = 0.0) -> None:
    monkeypatch.setenv(SEALED_KEYS, seal({connection: KEY}, job=job, now=time.time() - age))


def test_clients_and_judges_send_the_key_of_their_connection_however_old_its_seal_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The job's start was the time to look at its age: workers may be replaced after weeks."""
    sealed(monkeypatch, age=3 * MAX_AGE_SECONDS)
    with judge_server(lambda number, asked: Reply("A")) as server:
        monkeypatch.setenv("ATHANOR_ENDPOINTS", server.url)
        named = {"endpoint": server.url, "model": "m", "api_key_connection": "llm"}
        with EndpointJudge(JudgeConfig(**named)) as judge:
            judge.ask([Question("q", "a longer answer", "short")])
        with ChatClient(EndpointConfig(**named, max_retries=0), field="synthesize.generator") as client:
            client.ask(questions(1))
    assert [asked.headers["Authorization"] for asked in server.asked] == [f"Bearer {KEY}"] * 2


def test_a_job_that_airflow_did_not_start_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATHANOR_ENDPOINTS", "https://llm.example")
    monkeypatch.delenv(SEALED_KEYS, raising=False)
    config = EndpointConfig(endpoint="https://llm.example/v1", model="m", api_key_connection="llm")
    with pytest.raises(
        ConfigError, match=r"generator\.api_key_connection='llm' is a connection of Airflow's, and this"
    ):
        ChatClient(config, field="generator")


def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, dict[str, str], list[str]]:
    """Run `synthesize` of a run whose generator's key is in the connection `llm`: exit code, failure, verbs begun."""
    monkeypatch.setenv("ATHANOR_ENDPOINTS", "https://llm.example/v1")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    seeds = tmp_path / "seeds.jsonl"
    seeds.write_text(json.dumps({"instruction": "Add 1 and 1.", "output": "2"}))
    overrides = {"synthesize.generator.model": "m", "synthesize.generator.api_key_connection": "llm"}
    config = resolve(
        {
            **{"recipe": "tiny", "synthesis": "self_instruct", "synthesis_sources": [str(seeds)]},
            **{"generator": "https://llm.example/v1", "overrides": overrides},
        }
    )
    store, begun = open_store((tmp_path / "store").as_uri()), []
    request = request_for(Stage.SYNTHESIZE, store, {}, config.stage_config(Stage.SYNTHESIZE))
    key = run_key(request.run.run_id, Stage.SYNTHESIZE, "config.json")
    store.write_bytes(key, request.model_dump_json().encode())

    def verb(context: StageContext) -> StageOutcome:
        begun.append(context.request.stage.value)
        raise ConfigError("far enough")

    code = run_stage(f"{store.root_uri}/{key}", lambda stage: verb)
    return code, read_json(store, run_key(request.run.run_id, Stage.SYNTHESIZE, "failure.json")), begun


def test_a_job_with_its_keys_begins_its_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sealed(monkeypatch)
    _, failure, begun = started(tmp_path, monkeypatch)
    assert (begun, failure["message"]) == (["synthesize"], "far enough")


@pytest.mark.parametrize(
    ("wrong", "said", "category"),
    [
        ("no seal", "was started without ATHANOR_SEALED_KEYS", Category.CONFIG),
        ("no sealing key", "ATHANOR_SEAL_KEY is not set where Ray's processes run", Category.CONFIG),
        ("another sealing key", "was sealed with key", Category.CONFIG),
        ("another job's", "was sealed for job 'athanor-sft', and this is 'athanor-synthesize'", Category.CONFIG),
        ("another connection's", "'llm' is not among the sealed keys of this job: other", Category.CONFIG),
        ("expired", "s before the job started", Category.INFRASTRUCTURE),
    ],
)
def test_a_job_that_cannot_have_its_keys_fails_before_its_work_begins(
    wrong: str, said: str, category: Category, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sealed(
        monkeypatch,
        job="athanor-sft" if wrong == "another job's" else JOB,
        connection="other" if wrong == "another connection's" else "llm",
        age=MAX_AGE_SECONDS + 60 if wrong == "expired" else 0,
    )
    match wrong:
        case "no seal":
            monkeypatch.delenv(SEALED_KEYS)
        case "no sealing key":
            monkeypatch.delenv(SEAL_KEY)
        case "another sealing key":
            monkeypatch.setenv(SEAL_KEY, SECOND)
    code, failure, begun = started(tmp_path, monkeypatch)
    assert (begun, failure["category"]) == ([], category)
    assert said in failure["message"]
    assert code == (ExitCode.CONFIG if category is Category.CONFIG else ExitCode.INFRASTRUCTURE)
    assert KEY not in json.dumps(failure)
