"""What a person is asked, and what becomes of the answer."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from airflow.providers.standard.operators.empty import EmptyOperator
from airflow.sdk import DAG
from airflow.sdk.exceptions import AirflowSkipException

from operators.people.approval import PromotionApproval, question, read_answer
from operators.prepare import asks_for_approval, build_request, pipeline_key, with_approval
from stages.artifacts.manifests import fingerprint
from stages.config.closing import Approval, PromoteConfig, Verdict
from stages.config.decision_table import HEAD
from stages.config.errors import ConfigError, DamagedArtifactError
from stages.config.graph import GRAPH, Stage
from stages.config.pipeline import PipelineConfig, stage_config_from_json
from stages.config.request import ArtifactRef, RunInfo
from stages.config.resolve import resolve
from tests import pipeline_records
from tests.comparisons import CHAMPION, TIE, compared, win_over_start, with_comparisons
from tests.pipeline_records import EVALUATION, SAMPLES, publish_run, run_info
from tests.registry import RegisteredModels, serving

ANSWERED = datetime(2026, 11, 24, 9, 30, 15, 123, tzinfo=UTC)


def config(**params: Any) -> PipelineConfig:
    return resolve({"recipe": "tiny", "promotion": "approval", **params})


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[RunInfo, ArtifactRef]:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    _, made = publish_run(tmp_path, evaluation=win_over_start(EVALUATION, level=0.025))
    return run_info(airflow_url="http://airflow/dags/llm_pipeline/runs/1", parent_run_id="p1"), made[Stage.EVALUATE]


def answer(option: str, comment: str | None = None, user: dict[str, str] | None = None) -> dict[str, Any]:
    return {
        "chosen_options": [option],
        "params_input": {"comment": comment},
        "responded_at": ANSWERED,
        "responded_by_user": user,
    }


def test_the_question_shows_every_model_side_by_side_and_proposes_the_one_that_promote_would_choose(asked) -> None:
    subject, body = question(asked[0], config(), asked[1])
    assert subject == "demo: promote the PPO model to champion?"
    assert "|  | Base | SFT | PPO | DPO |" in body
    assert "| eval/win\\_rate ↑ | – | – | 0.71 | 0.64 |" in body
    assert body.index("win\\_rate ↑ | –") < body.index("eval/perplexity ↓")
    assert "proposed: **PPO**, the best of its aligned models." in body


def test_the_question_shows_the_table_that_decides_without_a_person(asked) -> None:
    _, body = question(asked[0], config(), asked[1])
    assert "By the numbers it would become champion: PPO against the model that it started from" in body
    head, _, *rows = body[body.index("| model |") :].split("\n\n")[0].splitlines()
    assert [cell.strip() for cell in head.strip("|").split("|")] == list(HEAD)
    numbers = r"\+0\.06 | \+0\.03 to \+0\.09 | 0\.001 | 400 | 120"
    assert rows[0] == f"| PPO | SFT | pairs, accuracy ↑ | {numbers} | better | passes |"
    assert "| at most 1 worse | held |" in rows[1]
    assert rows[2].startswith("| DPO | SFT | pairs")
    assert rows[2].endswith("| fails |")
    assert "| pairs, accuracy ↑ | 0\\.6 \\[0\\.55, 0\\.65\\] |" in body, "suites with their intervals"


def test_a_tie_is_told_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tie = with_comparisons(EVALUATION, compared(against="sft", **TIE))
    _, made = publish_run(tmp_path, evaluation=tie)
    _, body = question(run_info(), config(), made[Stage.EVALUATE])
    assert "it would **not** become champion" in body
    assert "3000 items would show it with power 0\\.9" in body


def test_a_measured_champion_stands_next_to_the_models_and_is_the_opponent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    champion = {**CHAMPION, "name": "tiny-aligned"}
    models = {**EVALUATION["models"], "champion": {"eval/perplexity": 71.0}}
    evaluation = with_comparisons({**EVALUATION, "models": models}, compared(), champion=champion)
    _, made = publish_run(tmp_path, evaluation=evaluation)
    registered = RegisteredModels({("tiny-aligned", "4"): {"lineage.fingerprint": "old"}})
    registered.aliases["tiny-aligned", "champion"] = "4"
    with serving(registered) as url:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        _, body = question(run_info(), config(run_name="tiny"), made[Stage.EVALUATE])
        registered.versions["tiny-aligned", "5"] = {"lineage.fingerprint": "newer"}
        registered.aliases["tiny-aligned", "champion"] = "5"
        _, later = question(run_info(), config(run_name="tiny"), made[Stage.EVALUATE])
    assert "|  | Base | SFT | PPO | DPO | Champion |" in body
    assert "| PPO | Champion | pairs, accuracy ↑ |" in body
    assert "The champion is version 4 of tiny\\-aligned" in body
    assert "and version 5 is champion now" in later


@pytest.mark.usefixtures("imaginary_stage")
def test_a_model_that_only_the_graph_knows_is_in_the_table_and_may_be_proposed(tmp_path: Path) -> None:
    models = {**EVALUATION["models"], "ipo": {"eval/win_rate": 0.99}}
    evaluation = with_comparisons({**EVALUATION, "models": models}, compared("ipo", "sft", level=0.01))
    _, made = publish_run(tmp_path, evaluation=evaluation)
    subject, body = question(run_info(), config(), made[Stage.EVALUATE])
    assert subject == "demo: promote the Imaginary PO model to champion?"
    assert "|  | Base | SFT | PPO | DPO | Imaginary PO |" in body
    assert "| eval/win\\_rate ↑ | – | – | 0.71 | 0.64 | 0.99 |" in body


def test_the_question_says_what_each_answer_and_silence_mean(asked) -> None:
    _, body = question(asked[0], config(overrides={"promote.approval_timeout_hours": 36}), asked[1])
    assert "No answer within 36 hours** counts as a rejection" in body
    assert "Your decision overrides the numbers" in body
    assert "never `champion`" in body


def test_what_models_wrote_is_shown_and_not_obeyed(asked) -> None:
    _, body = question(asked[0], config(), asked[1])
    assert SAMPLES[0]["prompt"] in body
    assert "<script>" not in body
    assert "&lt;/p&gt;&lt;script&gt;x\\(\\)" in body
    assert "PPO (0.9)" in body
    assert "*(empty)*" in body


def test_the_question_links_to_the_run_and_the_evidence(asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody answers there: the question stands anyway
    _, body = question(asked[0], config(), asked[1])
    assert "(http://127.0.0.1:9/#/runs/p1)" in body
    assert "(http://airflow/dags/llm_pipeline/runs/1)" in body
    assert asked[1].uri in body
    assert "Who is champion now is not known" in body


def test_a_damaged_evaluation_is_not_put_before_anybody(asked) -> None:
    path = Path(asked[1].uri.removeprefix("file://")) / "metrics.json"
    path.write_text(path.read_text().replace("0.71", "0.99"))
    with pytest.raises(DamagedArtifactError, match=r"metrics\.json"):
        question(asked[0], config(), asked[1])


@pytest.mark.parametrize(
    ("given", "timed_out", "expected"),
    [
        (answer("Approve", " good ", {"id": "1", "name": "ada"}), False, (Verdict.APPROVED, "ada", "good")),
        (answer("Reject", None, {"id": "1", "name": ""}), False, (Verdict.REJECTED, "1", "")),
        (answer("Reject"), True, (Verdict.TIMED_OUT, "", "")),
    ],
)
def test_an_answer_becomes_a_decision_with_name_time_and_reason(
    given: dict[str, Any], timed_out: bool, expected: tuple[Verdict, str, str]
) -> None:
    approval = read_answer(given, timed_out=timed_out)
    assert (approval.verdict, approval.by, approval.comment) == expected
    assert approval.at == "2026-11-24T09:30:15+00:00"


def test_a_rejection_does_not_skip_what_comes_after_it() -> None:
    """Airflow's own operator would call `skip`, which needs a task instance that this context does not have."""
    with DAG("probe", schedule=None):
        task = PromotionApproval(task_id="approve")
        task.set_downstream(EmptyOperator(task_id="promote"))
    given = task.execute_complete({}, {**answer("Reject", "no", {"id": "1", "name": "ada"}), "timedout": False})
    assert given == {"verdict": "rejected", "by": "ada", "at": "2026-11-24T09:30:15+00:00", "comment": "no"}


@pytest.mark.parametrize(
    ("params", "asks"),
    [
        ({}, True),
        ({"promotion": "auto"}, False),
        ({"promotion": "never"}, False),
        ({"alignment": "none"}, False),
        ({"last_stage": "evaluate"}, False),
        ({"last_stage": "promote"}, True),
    ],
)
def test_a_person_is_asked_only_when_there_is_something_to_decide(params: dict[str, Any], asks: bool) -> None:
    assert asks_for_approval(config(**params)) is asks


class TaskInstance:
    def __init__(self, xcoms: dict[str, Any]) -> None:
        self.xcoms = xcoms

    def xcom_pull(self, task_ids: str) -> Any:
        return self.xcoms.get(task_ids)


def test_a_run_that_asks_nobody_skips_the_task(tmp_path: Path) -> None:
    store, _ = publish_run(tmp_path)
    store.write_bytes(pipeline_key("manual-1"), config(promotion="auto").model_dump_json().encode())
    ti = TaskInstance({"resolve": run_info().model_dump(mode="json")})
    with pytest.raises(AirflowSkipException, match="promotion=auto"):
        PromotionApproval(task_id="approve", store_uri=store.root_uri).execute({"ti": ti})


def promotion_request(tmp_path: Path, given: Any, **params: Any):
    store, made = publish_run(tmp_path)
    upstream = {source: made[source].model_dump(mode="json") for _, source in GRAPH[Stage.PROMOTE].inputs}
    run = run_info()
    chosen = config(**params)
    request = build_request(Stage.PROMOTE, run=run, store=store, config=chosen, upstream=upstream)
    return with_approval(request, chosen, given)


def test_the_decision_is_part_of_what_promote_is_asked_to_do_and_of_its_fingerprint(tmp_path: Path) -> None:
    prints = set()
    for number, verdict in enumerate(("approved", "rejected", "timed_out")):
        given = Approval(verdict=Verdict(verdict), by="ada", at="2026-11-24T09:30:15+00:00").model_dump(mode="json")
        request = promotion_request(tmp_path / str(number), given)
        asked = stage_config_from_json(Stage.PROMOTE, json.loads(request.model_dump_json())["config"])
        assert isinstance(asked, PromoteConfig)
        assert asked.approval is not None
        assert asked.approval.verdict == verdict
        prints.add(fingerprint(Stage.PROMOTE, asked, inputs=request.inputs, store_uri=request.store_uri))
    assert len(prints) == 3


def test_promote_does_not_start_without_the_decision_it_needs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="left no decision"):
        promotion_request(tmp_path / "a", None)
    assert promotion_request(tmp_path / "b", None, promotion="auto").config["approval"] is None


def test_the_question_can_be_stored_and_encoded_whatever_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL refuses NUL in a text, and UTF-8 has no half characters."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    sample = {"prompt": "a\x00\ud800", "responses": {"sft": "b\x00\udfff", "ppo": "c\x1b"}}
    monkeypatch.setattr(pipeline_records, "SAMPLES", [sample])
    _, made = publish_run(tmp_path)
    _, body = question(run_info(), config(), made[Stage.EVALUATE])
    assert b"\0" not in body.encode()
    assert "a\\u0000\\ud800" in body
    assert "| b\\\\u0000\\\\udfff | c\\\\u001b |" in body


def test_no_answer_of_a_model_becomes_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Airflow links bare addresses after it has undone the escapes."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    sample = {"prompt": "Where?", "responses": {"sft": "http://evil.example/login", "ppo": "www.evil.example"}}
    monkeypatch.setattr(pipeline_records, "SAMPLES", [sample])
    _, made = publish_run(tmp_path)
    _, body = question(run_info(), config(), made[Stage.EVALUATE])
    assert "| http<!---->\\://evil\\.example/login | www<!---->\\.evil\\.example |" in body


def test_without_a_reward_model_the_question_speaks_of_no_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    models = {"base": {"eval/response_loss": 2.0}, "dpo": {"eval/preference_accuracy": 0.7}}
    evaluation = {**EVALUATION, "models": models, "reward": {}, "reward_fingerprint": None}
    _, made = publish_run(tmp_path, evaluation=with_comparisons(evaluation, compared("dpo", "base")))
    subject, body = question(run_info(), config(alignment="dpo"), made[Stage.EVALUATE])
    assert "promote the DPO model" in subject
    assert "| DPO | Base | pairs, accuracy ↑ |" in body
    assert "win rate" not in body
    assert "Scores come from" not in body
    assert "| eval/preference\\_accuracy ↑ | – | 0.7 |" in body
