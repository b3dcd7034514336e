"""Whether to retrain and with what: a real store and folder, a small server for the registry."""

from types import SimpleNamespace

import pytest
from airflow.sdk import Asset

from operators.pending import Watermark, read_watermark
from operators.prepare import params_key
from operators.retrain import Skip, announced_data, pipeline_run_id, record
from stages.artifacts.store import write_json
from stages.config.errors import ConfigError, StageError
from stages.config.resolve import resolve
from tests.retrain_world import CHAMPION_PARAMS, World


def test_new_documents_continue_from_the_champion_with_the_settings_of_its_run(world: World):
    (world.raw / "a.txt").write_text("text")
    conf = world.go(overrides={"sft.seed": 1}).conf
    assert conf == {
        **CHAMPION_PARAMS,
        "base_model": "models:/athanor-aligned/3",
        "continue_pretraining": True,
        "previous_data": "models:/athanor-aligned/3",
        "documents": [world.raw.as_uri()],
        "instructions": [],
        "preferences": [],
        "override_gates": [],
        "override_reason": "",
        "overrides": {"sft.num_epochs": 1, "pretrain.max_epochs": 4.0, "sft.seed": 1},
    }
    assert resolve(conf).pretrain.max_epochs == 4


def test_what_a_retraining_went_through_with_is_not_new_and_what_failed_is(world: World):
    (world.raw / "a.txt").write_text("text")
    first = world.go()
    assert world.go().conf == first.conf  # the first one failed: nothing was remembered
    record("athanor", first.watermark.model_dump())
    assert world.decide() == Skip(
        f"Nothing new: {world.raw.as_uri()} is as the last retraining saw it, and no preference data came."
    )
    assert world.go(force=True).reason == "asked for by `force`"
    (world.raw / "b.txt").write_text("more")
    assert "has changed (2 objects, 8 bytes)" in world.go().reason


def test_announced_preference_data_waits_until_a_retraining_has_gone_through(world: World):
    (world.raw / "a.txt").write_text("text")
    record("athanor", world.go().watermark.model_dump())
    assert world.go("file:///p/1").conf["preferences"] == ["file:///p/1"]  # and that run fails
    verdict = world.go("file:///p/2")
    assert verdict.conf["preferences"] == ["file:///p/1", "file:///p/2"]
    world.go("file:///p/3")  # announced while that one trains
    record("athanor", verdict.watermark.model_dump())
    assert read_watermark(world.store, "athanor").pending == ("file:///p/3",)
    last = world.go("file:///p/1")
    assert last.conf["preferences"] == ["file:///p/3"]
    record("athanor", last.watermark.model_dump())
    assert isinstance(world.decide("file:///p/2"), Skip)


def test_no_champion_and_no_text_are_reasons_to_skip(world: World):
    assert world.decide() == Skip(f"{world.raw.as_uri()} is empty.")
    world.champion = None
    verdict = world.decide("file:///p/1")
    assert isinstance(verdict, Skip)
    assert "models:/athanor-aligned@champion does not exist" in verdict.reason
    assert read_watermark(world.store, "athanor").pending == ("file:///p/1",)


def test_what_cannot_be_decided_is_an_error(world: World, monkeypatch: pytest.MonkeyPatch):
    (world.raw / "a.txt").write_text("text")
    world.store.delete(params_key("manual__2026-01-01T00-00-00-00-00"))
    with pytest.raises(ConfigError, match=r"models:/athanor-aligned/3 was made by run .*, which left no runs/"):
        world.decide()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(StageError, match="could not be looked up"):
        world.decide()
    monkeypatch.delenv("ATHANOR_RETRAIN_WATCH")
    with pytest.raises(ConfigError, match="documents is empty and ATHANOR_RETRAIN_WATCH is not set"):
        world.decide()


def test_addresses_come_from_the_events_of_the_asset():
    events = {
        Asset("llm/preferences"): [
            SimpleNamespace(extra={"uri": "file:///p/1"}),
            SimpleNamespace(extra={}),
        ],
        Asset("llm/raw-documents"): [SimpleNamespace(extra={"uri": "file:///raw"})],
    }
    assert announced_data(events, "llm/preferences") == ["file:///p/1"]


@pytest.mark.parametrize("documents", ["file:///etc", "file:///proc/self/root/etc", "file:///%00"])
def test_a_closed_folder_is_not_even_listed(world: World, documents: str):
    with pytest.raises(ConfigError, match=f"documents='{documents}'"):
        world.decide(documents=documents)
    assert read_watermark(world.store, "athanor") == Watermark()


def test_nothing_is_said_about_what_lies_in_a_closed_folder(world: World):
    says = []
    for name in ("hostname", "nosuchfile"):
        with pytest.raises(ConfigError, match="not open to sources") as refused:
            world.decide(preferences=[f"/etc/{name}"])
        says.append(str(refused.value).replace(name, "X"))
    assert says[0] == says[1]


def test_an_announced_address_that_no_store_can_hold_is_set_aside(world: World):
    (world.raw / "a.txt").write_text("text")
    half = "s3://bucket/\ud800"
    assert list(world.go(half).set_aside) == [half]


def test_a_long_run_id_triggers_a_run_of_its_own_that_airflow_takes() -> None:
    assert pipeline_run_id("manual__1") == "retrain__manual__1"
    one, other = (pipeline_run_id("n" * 238 + end) for end in "ab")
    assert one != other
    assert len(one) == len(other) == 240


def test_a_champion_whose_run_entered_after_pretraining_is_trained_on_in_the_same_way(world: World):
    params = {**CHAMPION_PARAMS, "base_model": "/models/x", "first_stage": "dpo", "alignment": "dpo"}
    write_json(world.store, params_key("manual__2026-01-01T00-00-00-00-00"), params)
    (world.raw / "a.txt").write_text("text")
    pairs = world.raw / "pairs.jsonl"
    pairs.write_text("{}")
    conf = world.go(preferences=[str(pairs)]).conf
    assert (conf["first_stage"], conf["continue_pretraining"]) == ("dpo", False)
    assert conf["base_model"] == conf["previous_data"] == "models:/athanor-aligned/3"
