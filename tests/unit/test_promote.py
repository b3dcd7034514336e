"""`promote` against an MLflow that is away or not configured; tests/integration/test_mlflow.py has the real one."""

import json
from pathlib import Path

import pytest

from infra.ports import any_free
from stages.artifacts.manifests import settings_digest
from stages.config.closing import PromoteConfig
from stages.config.decision import Champion, Decision
from stages.config.errors import Category, ConfigError, StageError
from stages.config.graph import Stage, StageSpec
from stages.promote import _move_aliases, read_evaluation, run
from stages.tracking.client import connect
from stages.tracking.registry import Registered
from tests.comparisons import compared, with_comparisons
from tests.imaginary import publish_imaginary
from tests.pipeline_records import EVALUATION, context_for, publish_artifact, publish_run, refs_for, request_for

AUTO = PromoteConfig(run_name="demo")


def test_an_evaluation_is_read_with_the_settings_that_it_was_made_with(tmp_path: Path) -> None:
    store, made = publish_run(tmp_path)
    folder = tmp_path / f"content-{Stage.EVALUATE.value}"
    _, manifest = publish_artifact(store, Stage.EVALUATE, refs_for(Stage.EVALUATE, made), folder, salt="2")
    evaluation = read_evaluation(folder, manifest, uri="file:///there")
    assert evaluation.of("ppo") == EVALUATION["models"]["ppo"]
    assert evaluation.of("reward") == EVALUATION["reward"]
    assert evaluation.conditions.settings_digest == settings_digest(manifest)
    assert evaluation.conditions.tags()["evaluation.uri"] == "file:///there"


@pytest.mark.slow
def test_an_unreachable_mlflow_is_a_failure_that_is_retried(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{any_free()}")
    store, made = publish_run(tmp_path)
    request = request_for(Stage.PROMOTE, store, refs_for(Stage.PROMOTE, made), AUTO)
    context = context_for(request, store, AUTO, tmp_path)
    with pytest.raises(StageError, match="models were not registered") as caught:
        run(context)
    context.progress.close()
    assert caught.value.category is Category.INFRASTRUCTURE


def test_no_tracking_uri_is_a_mistake_in_the_configuration(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store, made = publish_run(tmp_path)
    context = context_for(request_for(Stage.PROMOTE, store, refs_for(Stage.PROMOTE, made), AUTO), store, AUTO, tmp_path)
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI"):
        run(context)
    context.progress.close()


@pytest.mark.slow
def test_a_stage_that_only_the_graph_knows_is_registered_and_may_become_champion(
    tmp_path: Path, monkeypatch, imaginary_stage: StageSpec
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    models = {**EVALUATION["models"], "ipo": {"eval/score_mean": 0.5}}
    evaluation = with_comparisons({**EVALUATION, "models": models}, compared("ipo", "sft"))
    store, made = publish_run(tmp_path, without=frozenset({Stage.PPO}), evaluation=evaluation)
    inputs = {**refs_for(Stage.PROMOTE, made), "ipo": publish_imaginary(store, made[Stage.DPO])}
    context = context_for(request_for(Stage.PROMOTE, store, inputs, AUTO), store, AUTO, tmp_path)
    run(context)
    context.progress.close()
    record = json.loads((context.output_dir / "promotion.json").read_text())
    assert (record["chosen"], record["promoted"]) == ("ipo", True)
    registered = next(model for model in record["models"] if model["role"] == "ipo")
    assert registered["name"] == f"demo-{imaginary_stage.registered_as}"
    client = connect()
    assert client.get_registered_model("demo-aligned").aliases["champion"] == int(registered["version"])
    assert client.get_model_version("demo-aligned", registered["version"]).tags["alignment"] == "ipo"


class Recorder:
    """Takes down what the registry would be told."""

    def __init__(self) -> None:
        self.aliases: list[tuple[str, str]] = []
        self.decided: list[str] = []

    def set_alias(self, name: str, alias: str, version: str) -> None:
        self.aliases.append((alias, version))

    def record_decision(self, model: Registered, decision: Decision) -> None:
        self.decided.append(model.version)


@pytest.mark.parametrize(
    "decision",
    [
        Decision(False, "rejected by ada", "person", "ppo"),
        Decision(False, "promotion=never: the models are registered as candidates only", "none", "ppo"),
        Decision(True, "the model is champion already", "same_model", "ppo"),
    ],
    ids=["a person rejects it", "nothing is promoted", "it stays"],
)
def test_what_made_a_model_champion_stays_on_record_whatever_is_said_about_it_later(decision: Decision) -> None:
    model = Registered("ppo", "demo-aligned", "4", "m-1", "f" * 64, is_new=False)
    registry = Recorder()
    _move_aliases(registry, [model], Champion("4", model.fingerprint), decision)  # pyright: ignore[reportArgumentType]
    assert (registry.aliases, registry.decided) == ([("candidate", "4")], [])
    other = Recorder()
    _move_aliases(other, [model], Champion("3", "e" * 64), decision)  # pyright: ignore[reportArgumentType]
    assert other.decided == ["4"]
