"""What `evaluate_model` looks up before it measures; the store is real, its artifacts have no files."""

import json
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from operators.evaluation import conclude, evaluation_config, tag_version
from operators.failures import RunIncomplete
from operators.prepare import build_request, input_stages
from stages.artifacts.manifests import read_manifest, settings_digest
from stages.config.errors import ConfigError
from stages.config.evaluation import Conditions
from stages.config.forms import EvaluationParams
from stages.config.graph import Stage, StageSpec
from stages.config.request import SourceKind
from tests.answering import answering
from tests.imaginary import publish_imaginary
from tests.pipeline_records import EVALUATION, publish_run
from tests.unit.operators.test_given import RUN, House, put


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def test_an_aligned_model_comes_with_its_reference_and_the_data_of_its_run(house: House):
    config = evaluation_config(EvaluationParams(model=house.dpo.uri, recipe="tiny"))
    request = build_request(Stage.EVALUATE, run=RUN, store=house.store, config=config, upstream={})
    assert request.inputs == {"dpo": house.dpo, "sft": house.sft, "tokens": house.tokens}
    assert request.sources == ()
    assert config.selected == {Stage.EVALUATE}
    assert input_stages(Stage.EVALUATE, config) == {}


def test_data_and_judge_may_be_others(house: House):
    config = evaluation_config(
        EvaluationParams(model=house.base.uri, data=house.sft.uri, reward=house.reward.uri, recipe="tiny")
    )
    assert config.given == {"base": house.base, "tokens": house.tokens, "reward": house.reward}


def test_it_may_be_judged_by_a_gold_scorer_and_a_model(house: House) -> None:
    gold = put(house.store, Stage.GOLD, "g", tokens=house.tokens, model=house.sft)
    params = EvaluationParams(
        model=house.dpo.uri, gold_model=gold.uri, judge=house.base.uri, reward=house.reward.uri, recipe="tiny"
    )
    config = evaluation_config(params)
    assert config.given["gold_model"] == gold
    assert config.given["judge"] == house.base
    outside = EvaluationParams(model=house.dpo.uri, judge="/models/judge", recipe="tiny")
    sources = evaluation_config(outside).stage_sources(Stage.EVALUATE)
    assert [(source.role, source.uri) for source in sources] == [("judge", "/models/judge")]
    with pytest.raises(ConfigError, match=r"gold_model=.* is of kind 'dpo-model'; allowed: reward-model, gold-model"):
        evaluation_config(EvaluationParams(model=house.dpo.uri, gold_model=house.dpo.uri, recipe="tiny"))
    with pytest.raises(ConfigError, match=r"gold_model=.* and the reward model at .* have the same content"):
        evaluation_config(params.model_copy(update={"gold_model": house.reward.uri}))


def test_somebody_elses_model_is_left_to_the_job(house: House):
    config = evaluation_config(EvaluationParams(model="/models/llama", data=house.tokens.uri, recipe="tiny"))
    request = build_request(Stage.EVALUATE, run=RUN, store=house.store, config=config, upstream={})
    assert (request.source_uris, request.inputs) == (("/models/llama",), {"tokens": house.tokens})


def test_a_model_that_only_the_graph_knows_is_measured_beside_its_reference(house: House, imaginary_stage: StageSpec):
    model = publish_imaginary(house.store, house.dpo)
    config = evaluation_config(EvaluationParams(model=model.uri, recipe="tiny"))
    assert config.given == {imaginary_stage.role: model, "sft": house.sft, "tokens": house.tokens}


class Version(BaseHTTPRequestHandler):
    """One registered version, whose tags can be set."""

    tags: ClassVar[dict[str, str]] = {}

    def do_GET(self) -> None:
        tags = [{"key": key, "value": value} for key, value in self.tags.items()]
        self.answer({"model_version": {"version": "3", "tags": tags}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.tags[body["key"]] = body["value"]
        self.answer({})

    def answer(self, body: dict[str, Any]) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, format: str, *args: object) -> None: ...


def test_a_version_measured_again_says_by_what_and_where_its_scores_lie(tmp_path: Path, monkeypatch):
    unjudged = {**EVALUATION, "reward_fingerprint": None}
    _, made = publish_run(tmp_path, evaluation=unjudged)
    judged = Conditions("d" * 64, "r" * 64, settings_digest(read_manifest(made[Stage.EVALUATE])), "file:///before")
    monkeypatch.setattr(Version, "tags", {"lineage.fingerprint": made[Stage.SFT].fingerprint, **judged.tags()})
    with answering(Version) as url:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        tag_version("models:/n-sft/3", made[Stage.EVALUATE])
    assert Version.tags["eval/perplexity"] == "70.0"
    after = Conditions.from_tags(Version.tags)
    assert after == Conditions("d" * 64, "", judged.settings_digest, made[Stage.EVALUATE].uri)


def test_numbers_of_other_content_are_not_written_on_a_version_with_the_same_fingerprint(tmp_path: Path, monkeypatch):
    _, made = publish_run(tmp_path)
    registered = {"lineage.fingerprint": made[Stage.SFT].fingerprint, "lineage.digest": "e" * 64}
    monkeypatch.setattr(Version, "tags", dict(registered))
    with answering(Version) as url:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        with pytest.raises(ConfigError, match="is no longer the model that was evaluated"):
            tag_version("models:/n-sft/3", made[Stage.EVALUATE])
    assert Version.tags == registered


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"model": "/models/llama"}, "has no run of its own to take data from, and data is empty"),
        ({"model": "REWARD"}, "is of kind 'reward-model'; allowed: base-model, sft-model, ppo-model, dpo-model"),
        ({"model": "DPO", "reward": "DPO"}, "is of kind 'dpo-model'; allowed: reward-model"),
        ({"model": "DPO", "data": "CURATED"}, "was made from no 'tokens' artifact"),
    ],
)
def test_what_cannot_be_measured_is_refused(house: House, params: dict[str, str], says: str):
    places = {"REWARD": house.reward.uri, "DPO": house.dpo.uri, "CURATED": house.curated.uri}
    with pytest.raises(ConfigError, match=says):
        evaluation_config(
            EvaluationParams.model_validate({"recipe": "tiny"} | {k: places.get(v, v) for k, v in params.items()})
        )


def test_the_end_of_a_run_that_never_started_says_so_whatever_stood_in_its_form():
    context = {"params": {"model": "models:/", "bogus": 1}, "ti": SimpleNamespace(xcom_pull=lambda **_: None)}
    with pytest.raises(RunIncomplete, match="never started"):
        conclude(context, None)


def test_a_model_measured_again_is_measured_by_the_benchmarks_that_are_named(house: House):
    chosen = ["refusals", "/data/items.jsonl#rule=number"]
    config = evaluation_config(EvaluationParams(model=house.dpo.uri, recipe="tiny", benchmarks=chosen))
    assert config.evaluate.benchmarks == tuple(chosen)
    (source,) = config.stage_sources(Stage.EVALUATE)
    assert (source.kind, source.uri) == (SourceKind.BENCHMARK, "/data/items.jsonl")
