"""Preference data that cannot be used: found when announced or by the run that fails, set aside, told, taken back."""

import json
from pathlib import Path
from typing import Any

import pytest

from operators.pending import read_watermark
from operators.retrain import Go, Skip, announced_data, decide, record, set_aside_failed, tell
from stages.artifacts.addresses import open_store, run_key
from stages.artifacts.store import write_json
from stages.config.errors import ConfigError, DataError
from stages.config.forms import RetrainParams
from stages.config.graph import Stage
from stages.config.request import run_folder
from tests.inbox import open_inbox
from tests.retrain_world import World

RUN = "asset_triggered__2026"


@pytest.fixture
def there(world: World, tmp_path: Path) -> str:
    (world.raw / "a.txt").write_text("text")
    path = tmp_path / "pairs.jsonl"
    path.write_text("{}")
    return path.as_uri()


def failed(world: World, stage: Stage, category: str, message: str) -> None:
    """What the pipeline run of a retraining leaves when a stage fails."""
    folder = run_folder("llm_pipeline", f"retrain__{RUN}")
    write_json(world.store, run_key(folder, stage, "failure.json"), {"category": category, "message": message})


def handed_over(verdict: Any) -> dict[str, Any]:
    assert isinstance(verdict, Go), verdict
    return {"run_name": "athanor", "watermark": verdict.watermark.model_dump(mode="json")}


def test_a_mistyped_source_that_was_announced_is_set_aside_and_the_others_go_on(world: World, there: str) -> None:
    typo = there.replace("pairs", "paris")
    verdict = world.go(typo, there)
    assert verdict.conf["preferences"] == [there]
    assert verdict.watermark.preferences == (there,)
    assert list(verdict.set_aside) == [typo]
    assert "does not exist" in verdict.set_aside[typo]
    kept = read_watermark(world.store, "athanor")
    assert (kept.pending, list(kept.set_aside)) == ((there,), [typo])
    assert not world.go(there).set_aside, "it is told once"


def test_a_source_that_blocks_since_before_is_set_aside_too(world: World, there: str) -> None:
    typo = there.replace("pairs", "paris")
    write_json(world.store, "retrain/athanor.json", {"documents": "", "preferences": [], "pending": [typo]})
    assert list(world.go().set_aside) == [typo]
    record("athanor", world.go().watermark.model_dump(mode="json"))
    kept = read_watermark(world.store, "athanor")
    assert (kept.pending, list(kept.set_aside)) == ((), [typo]), "a success forgets nothing"
    assert "1 source is set aside" in str(world.decide())


def test_a_mistyped_source_in_the_form_is_refused_and_waits_for_nobody(world: World, there: str) -> None:
    typo = there.replace("pairs", "paris")
    with pytest.raises(ConfigError, match=r"preferences='file:.*paris.jsonl' does not exist"):
        world.decide(preferences=[typo])
    with pytest.raises(ConfigError, match="wieght"):
        world.decide(preferences=[f"{there}#wieght=1"])
    assert read_watermark(world.store, "athanor").pending == ()


@pytest.mark.parametrize("options", ["#wieght=1", "#weight=-1", "#format=xml"])
def test_a_source_with_options_that_do_not_exist_is_set_aside(world: World, there: str, options: str) -> None:
    assert list(world.go(there + options).set_aside) == [there + options]


def test_a_source_that_airflow_cannot_see_is_left_to_the_run(world: World, there: str) -> None:
    for address in ("/mnt/only-on-the-workers/pairs.jsonl", "hf://org/pairs?split=train", "relative/pairs.jsonl"):
        assert world.go(address).conf["preferences"][-1] == address


def test_a_store_that_is_away_condemns_no_source(
    world: World,
    there: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    verdict = world.go("s3://bucket/pairs.jsonl")
    assert verdict.conf["preferences"] == ["s3://bucket/pairs.jsonl"]
    assert not verdict.set_aside


def test_one_source_announced_with_and_without_options_is_one_source(world: World, there: str) -> None:
    """Two lines of one source are refused by `resolve`, and would be by every retraining after this one."""
    assert world.go(f"{there}#weight=0.5", there).conf["preferences"] == [f"{there}#weight=0.5"]


@pytest.mark.parametrize("category", ["config", "data"])
def test_a_source_that_the_run_fails_over_is_set_aside(world: World, there: str, category: str) -> None:
    bad = "/mnt/only-on-the-workers/bad.jsonl"
    decided = handed_over(world.go(bad, there))
    failed(world, Stage.CURATE, category, f"source '{bad}': 9 of 10 records (90 %) are unreadable")
    assert list(set_aside_failed(decided, RUN)) == [bad]
    kept = read_watermark(world.store, "athanor")
    assert (kept.pending, list(kept.set_aside)) == ((there,), [bad])
    assert "9 of 10 records" in kept.set_aside[bad]
    assert world.go().conf["preferences"] == [there]
    assert set_aside_failed(decided, RUN) == {}, "a retry of the task tells nothing twice"


@pytest.mark.parametrize(
    ("category", "message"),
    [
        ("infrastructure", "source '/mnt/w/bad.jsonl': the store did not answer"),
        ("preempted", "source '/mnt/w/bad.jsonl': stopped"),
        ("config", "source 's3://b/x' does not exist"),
        ("data", "no training document is left"),
        ("config", "source '/mnt/w/bad.jsonl.gz' does not exist"),
        ("config", "source '/mnt/w/bad.jsonl' cannot be listed: AccessDenied"),
        ("config", "source '/mnt/w/bad.jsonl' cannot be loaded: timeout"),
        ("nonsense", "source '/mnt/w/bad.jsonl'"),
    ],
)
def test_a_passing_fault_or_that_of_others_leaves_it_pending(
    world: World, there: str, category: str, message: str
) -> None:
    decided = handed_over(world.go("/mnt/w/bad.jsonl"))
    failed(world, Stage.CURATE, category, message)
    assert set_aside_failed(decided, RUN) == {}
    assert read_watermark(world.store, "athanor").pending == ("/mnt/w/bad.jsonl",)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"category": 1}', "[" * 100_000])
def test_a_failure_that_cannot_be_read_condemns_no_source(world: World, there: str, text: str) -> None:
    decided = handed_over(world.go(there))
    key = run_key(run_folder("llm_pipeline", f"retrain__{RUN}"), Stage.CURATE, "failure.json")
    world.store.write_bytes(key, text.encode())
    assert set_aside_failed(decided, RUN) == {}


def test_of_two_sources_one_of_which_lies_below_the_other_the_one_that_is_named_is_set_aside(
    world: World, there: str
) -> None:
    decided = handed_over(world.go("/mnt/w/p", "/mnt/w/p/part"))
    failed(world, Stage.CURATE, "data", "source '/mnt/w/p/part': broken")
    assert list(set_aside_failed(decided, RUN)) == ["/mnt/w/p/part"]


def test_nothing_was_decided_nothing_is_set_aside(world: World) -> None:
    assert set_aside_failed(None, RUN) == {}


def aside(world: World, there: str) -> str:
    typo = there.replace("pairs", "paris")
    world.go(typo)
    return typo


def test_a_source_that_is_announced_again_stays_aside(world: World, there: str) -> None:
    """The same event comes again whenever the task is cleared."""
    assert world.go(aside(world, there)).conf["preferences"] == []


def test_the_form_takes_sources_back_once_they_are_repaired(world: World, there: str, tmp_path: Path) -> None:
    typo = aside(world, there)
    assert list(world.go(take_back=True).set_aside) == [typo], "it is checked again, and is as it was"
    (tmp_path / "paris.jsonl").write_text("{}")
    assert world.go(take_back=True).conf["preferences"] == [typo]
    assert read_watermark(world.store, "athanor").set_aside == {}


def test_a_source_that_a_person_gives_again_is_taken_back(world: World, there: str, tmp_path: Path) -> None:
    typo = aside(world, there)
    (tmp_path / "paris.jsonl").write_text("{}")
    assert world.go(preferences=[typo]).conf["preferences"] == [typo]
    assert read_watermark(world.store, "athanor").set_aside == {}


def test_the_form_forgets_what_waits_or_is_set_aside(world: World, there: str) -> None:
    typo = aside(world, there)
    world.go(there)
    assert world.go(forget=[typo, there, "/never/heard/of"]).conf["preferences"] == []
    kept = read_watermark(world.store, "athanor")
    assert (kept.pending, kept.set_aside) == ((), {})


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"pending": 3}', "[" * 100_000, '{"set_aside": ["x"]}'])
def test_a_watermark_that_is_damaged_is_named(world: World, there: str, text: str) -> None:
    world.store.write_bytes("retrain/athanor.json", text.encode())
    with pytest.raises(DataError, match=r"retrain/athanor\.json is not a valid Watermark"):
        world.decide()


def test_events_that_hold_no_address_are_left_out() -> None:
    from types import SimpleNamespace

    from airflow.sdk import Asset

    extras = [{"uri": 3}, {"uri": ["x"]}, {"uri": " "}, None, [], "x", {"uri": " file:///p/1 "}]
    events = {Asset("llm/preferences"): [SimpleNamespace(extra=extra) for extra in extras]}
    assert announced_data(events, "llm/preferences") == ["file:///p/1"]


def test_what_the_champions_run_was_overridden_with_never_contradicts_what_retraining_sets(
    world: World, there: str
) -> None:
    """Settings of before may be nested, have earlier names, and name what cannot be set any more."""
    params = {
        "recipe": "tiny",
        "overrides": {
            "pretrain": {"max_epochs": 2, "seed": 3},
            "dpo.beta": 0.3,
            "promote.run_name": "athanor",
            "alignment": "dpo",
        },
    }
    folder = run_folder("llm_pipeline", "manual__2026-01-01T00:00:00+00:00")
    write_json(world.store, f"runs/{folder}/params.json", params)
    conf = world.go(overrides={"dpo": {"loss.beta": 0.2}}).conf
    assert conf["overrides"] == {
        "pretrain.max_epochs": 4.0,
        "pretrain.seed": 3,
        "dpo.loss.beta": 0.2,
        "alignment": "dpo",
    }
    with pytest.raises(ConfigError, match=r"overrides: 'run_name' cannot be set"):
        world.decide(overrides={"run_name": "../../evil"})


def test_the_settings_of_a_champion_come_from_its_own_run(world: World, there: str) -> None:
    """A folder of before may hold the settings of another run with a similar id."""
    folder = "manual__2026-01-01T00-00-00-00-00"
    run = {"dag_id": "llm_pipeline", "airflow_run_id": "manual__2026-01-01T00:00:00-00:00"}
    write_json(world.store, run_key(folder, Stage.CURATE, "config.json"), {"run": run})
    with pytest.raises(ConfigError, match="which left no"):
        world.decide()


def test_a_champions_settings_that_are_damaged_are_named(world: World, there: str) -> None:
    world.store.write_bytes("runs/manual__2026-01-01T00-00-00-00-00/params.json", b"[1]")
    with pytest.raises(DataError, match=r"params\.json holds a JSON list"):
        world.decide()


def test_it_is_told_to_whoever_is_told_of_the_end_of_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with open_inbox() as inbox:
        monkeypatch.setenv("ATHANOR_NOTIFY_URL", inbox.url)
        context = {"dag_run": {"dag_id": "retrain", "dag_run_id": "r"}}
        tell({"/p": "does not exist"}, context)
        tell({}, context)
        message = {"event": "set_aside", "dag_id": "retrain", "run_id": "r", "sources": {"/p": "does not exist"}}
        assert inbox.messages == [message]
    assert "Set aside until a person looks at it: /p does not exist" in caplog.text


def test_the_watermark_of_before_is_read(tmp_path: Path) -> None:
    store = open_store(tmp_path.as_uri())
    store.write_bytes("retrain/x.json", json.dumps({"documents": "d", "preferences": ["p"], "pending": ["q"]}).encode())
    assert read_watermark(store, "x").pending == ("q",)


def test_the_reason_of_a_skip_names_what_was_set_aside(world: World, there: str) -> None:
    record("athanor", world.go().watermark.model_dump(mode="json"))
    verdict = decide(RetrainParams(), announced=[there.replace("pairs", "paris")])
    assert isinstance(verdict, Skip)
    assert verdict.set_aside
    assert "1 source is set aside" in verdict.reason
