"""The champion as an input of `evaluate`: which runs ask for it, and what becomes of one that cannot be read."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infra.ports import any_free
from operators.champion import with_champion
from operators.prepare import build_request
from stages.artifacts.manifests import fingerprint
from stages.artifacts.store import Store
from stages.config.closing import EvaluateConfig
from stages.config.errors import ConfigError, StageError
from stages.config.graph import GRAPH, Stage
from stages.config.pipeline import PipelineConfig, stage_config_from_json
from stages.config.request import ArtifactRef, StageRequest
from stages.config.resolve import resolve
from tests.pipeline_records import publish_run, run_info, tampered
from tests.registry import RegisteredModels, serving

NAME = "tiny-aligned"


class House:
    """A store with the models of two runs, and the registry that calls one of the earlier run's champion."""

    def __init__(self, root: Path) -> None:
        self.store: Store
        self.store, self.old = publish_run(root, salt="old")
        _, self.new = publish_run(root, salt="new")
        self.models = RegisteredModels()
        self.crown(self.old[Stage.DPO])

    def crown(self, ref: ArtifactRef, **tags: str) -> None:
        known = {"artifact.uri": ref.uri, "lineage.fingerprint": ref.fingerprint, "lineage.digest": ref.digest}
        self.models.versions[NAME, "4"] = {key: value for key, value in (known | tags).items() if value}
        self.models.aliases[NAME, "champion"] = "4"

    def request(self, config: PipelineConfig) -> StageRequest:
        made = {stage: self.new[stage] for stage in GRAPH if stage in self.new}
        plain = build_request(Stage.EVALUATE, run=run_info(), store=self.store, config=config, upstream=made)
        return with_champion(plain, config)


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    house = House(tmp_path)
    with serving(house.models) as url:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        yield house


def config(**params: Any) -> PipelineConfig:
    return resolve({"recipe": "tiny", "run_name": "tiny", **params})


def identity(request: StageRequest) -> str:
    settings = stage_config_from_json(request.stage, request.config)
    return fingerprint(request.stage, settings, inputs=request.inputs, store_uri=request.store_uri)


def test_the_champion_is_an_input_and_part_of_the_fingerprint(house: House) -> None:
    request = house.request(config())
    assert request.inputs["champion"].model_copy(update={"mlflow_run_id": None}) == house.old[Stage.DPO]
    assert request.config["champion"] == f"models:/{NAME}/4"
    assert request.config["champion_missing"] == ""
    with_old = identity(request)
    house.crown(house.old[Stage.PPO])
    assert identity(house.request(config())) != with_old


def test_without_a_champion_the_request_is_what_it_always_was(house: House) -> None:
    house.models.aliases.clear()
    request = house.request(config())
    assert "champion" not in request.inputs
    never = house.request(config(promotion="never"))
    assert identity(request) == identity(never)


@pytest.mark.parametrize(
    ("params", "asks"),
    [
        ({}, True),
        ({"promotion": "approval"}, True),
        ({"alignment": "dpo"}, True),
        ({"promotion": "never"}, False),
        ({"last_stage": "evaluate"}, False),
        ({"alignment": "none", "last_stage": "promote"}, False),
    ],
)
def test_only_a_run_that_promotes_asks_for_it(house: House, params: dict[str, Any], asks: bool) -> None:
    request = house.request(config(**params))
    assert ("champion" in request.inputs) is asks
    assert bool(house.models.calls) is asks, "other runs do not even ask MLflow"


def test_a_champion_of_this_very_run_is_no_input_so_that_an_identical_run_builds_nothing(house: House) -> None:
    house.models.aliases.clear()
    first = identity(house.request(config()))
    house.crown(house.new[Stage.PPO])
    assert identity(house.request(config())) == first


def gone(house: House) -> None:
    house.crown(house.old[Stage.DPO], **{"artifact.uri": f"{house.store.root_uri}/artifacts/dpo-model/{'0' * 64}"})


def replaced(house: House) -> None:
    house.crown(house.old[Stage.DPO], **{"lineage.digest": "e" * 64})


def not_ours(house: House) -> None:
    house.crown(house.old[Stage.DPO], **{"artifact.uri": ""})


def damaged(house: House) -> None:
    tampered(house.old[Stage.DPO], kind="ppo-model")


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (gone, "there is no artifact at"),
        (replaced, "was registered with content eeeeeeeeeeee"),
        (not_ours, "has no tag artifact.uri"),
        (damaged, "is not this artifact's manifest"),
    ],
)
def test_a_champion_that_cannot_be_read_is_no_input_and_the_reason_is_kept(
    house: House, harm: Any, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    harm(house)
    with caplog.at_level(logging.WARNING):
        request = house.request(config())
    assert "champion" not in request.inputs
    assert request.config["champion"] == f"models:/{NAME}/4"
    assert request.config["champion_missing"].startswith(f"models:/{NAME}/4: ")
    assert says in request.config["champion_missing"]
    assert says in caplog.text
    assert EvaluateConfig.model_validate(request.config).champion_missing


def test_an_mlflow_that_is_away_is_retried_and_not_taken_for_one_without_a_champion(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{any_free()}")
    with pytest.raises(StageError, match="could not be looked up") as caught:
        house.request(config())
    assert not isinstance(caught.value, ConfigError)


def test_the_evaluation_compares_at_the_share_of_the_level_that_each_candidate_has() -> None:
    both = config(overrides={"promote.level": 0.1, "promote.power": 0.8, "promote.least_difference": 0.02})
    found = both.evaluate.comparison
    assert (found.level, found.power, found.least_difference) == (0.05, 0.8, 0.02)
    assert config(alignment="dpo").evaluate.comparison.level == 0.05


@pytest.mark.parametrize("field", ["champion", "champion_missing", "comparison.level"])
def test_nobody_sets_what_athanor_fills(field: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot be set"):
        config(overrides={f"evaluate.{field}": 0.5})


def test_the_rule_that_is_gone_is_refused_with_what_to_use_instead() -> None:
    with pytest.raises(ConfigError, match=r"'promote\.min_win_rate' is no longer a setting") as caught:
        config(overrides={"promote.min_win_rate": 0.4})
    assert "promote.margin" in caught.value.advice
