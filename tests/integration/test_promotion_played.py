"""From champion to successor, stage by stage as the Ray jobs run them, with a real MLflow server: what `evaluate`
compares, what `promote` decides about it, and that a model which is worse (planted) stays a candidate.

tests/integration/test_retrain_live.py has the same with Airflow and Ray.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from operators.champion import with_champion
from operators.given import given_artifacts
from operators.prepare import build_request
from stages.__main__ import verb_of
from stages.artifacts.addresses import open_store
from stages.artifacts.manifests import fetch, read_file, read_manifest
from stages.artifacts.store import Store
from stages.config.graph import Stage, pipeline_stages
from stages.config.request import ArtifactRef, RunInfo
from stages.config.resolve import resolve
from stages.job.runner import execute
from stages.judge.scores import ScoreTable
from stages.tracking.client import connect
from tests.raw_text import WORDS, jsonl, prose

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(900)]

NAME = "played"
SETTINGS: dict[str, Any] = {
    "tokenize.vocab_size": 320,
    "curate.planted": 0,
    "curate.toxicity": "none",
    "curate.heldout_fraction": 0.2,
    "promote.guards": [],
}
ANY = {"promote.margin": 1e6}
"""Models that have learnt nothing become champion all the same."""
RUIN = {"dpo.optimizer.learning_rate": 0.3}
BY_REPLIES = {"promote.primary": ["responses"]}


@dataclass(frozen=True)
class World:
    """A store, and the data that every run reads."""

    store: Store
    data: dict[str, list[str]]

    def play(self, run_id: str, **params: Any) -> dict[Stage, ArtifactRef]:
        """What Airflow does between the tasks; `evaluate` gets the champion as its task gives it."""
        values = {
            "recipe": "tiny",
            "run_name": NAME,
            "alignment": "dpo",
            "last_stage": "promote",
            **self.data,
            **params,
        }
        config = resolve({**values, "overrides": {**SETTINGS, **params["overrides"]}})
        config = config.with_given(given_artifacts(config))
        run, done = RunInfo(run_id=run_id, name=NAME), dict[Stage, ArtifactRef]()
        for stage in pipeline_stages():
            if stage in config.selected:
                request = build_request(stage, run=run, store=self.store, config=config, upstream=done)
                if stage is Stage.EVALUATE:
                    request = with_champion(request, config)
                done[stage] = execute(request, self.store, verb_of).artifact
        return done


def record_of(done: dict[Stage, ArtifactRef]) -> dict[str, Any]:
    return json.loads(read_file(done[Stage.PROMOTE], "promotion.json"))


def aliases() -> dict[str, str]:
    registered = connect().get_registered_model(f"{NAME}-aligned")
    return {alias: str(version) for alias, version in registered.aliases.items()}


@pytest.fixture(scope="module")
def world(mlflow_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    home = tmp_path_factory.mktemp("played")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
        patch.setenv("ATHANOR_SCRATCH", str(home / "scratch"))
        questions = [(f"Where is the {a} of the {b}?", f"By the {b}.") for a in WORDS for b in WORDS]
        rows = {
            "instructions": [{"instruction": asked, "response": answer} for asked, answer in questions],
            "preferences": [{"prompt": asked, "chosen": answer, "rejected": "No."} for asked, answer in questions[:60]],
        }
        (home / "documents.jsonl").write_text(jsonl([prose(seed) for seed in range(60)]))
        for name, entries in rows.items():
            (home / f"{name}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        data = {name: [str(home / f"{name}.jsonl")] for name in ("documents", *rows)}
        yield World(open_store((home / "store").as_uri()), data)


@pytest.fixture(scope="module")
def first(world: World) -> dict[Stage, ArtifactRef]:
    return world.play("first", overrides=ANY)


@pytest.fixture(scope="module")
def second(world: World, first: dict[Stage, ArtifactRef]) -> dict[Stage, ArtifactRef]:
    """The champion, aligned further."""
    return world.play("second", base_model=f"models:/{NAME}-aligned/1", first_stage="dpo", overrides=ANY)


def test_the_first_model_is_compared_with_its_start(first: dict[Stage, ArtifactRef]) -> None:
    record = record_of(first)
    (ruling,) = record["rulings"]
    assert (record["promoted"], record["comparison"], ruling["opponent"]) == (True, "start", "sft")
    assert ruling["primary"]["compared"]["items"] >= 4
    assert "champion" not in {entry.role for entry in read_manifest(first[Stage.EVALUATE]).inputs}


def test_an_identical_run_of_the_champion_finds_its_evaluation_again(
    world: World, first: dict[Stage, ArtifactRef]
) -> None:
    again = world.play("again", overrides=ANY)
    assert again[Stage.EVALUATE].fingerprint == first[Stage.EVALUATE].fingerprint


def test_candidate_and_champion_are_compared_on_the_same_items(
    first: dict[Stage, ArtifactRef], second: dict[Stage, ArtifactRef], tmp_path: Path
) -> None:
    inputs = {entry.role: entry.digest for entry in read_manifest(second[Stage.EVALUATE]).inputs}
    assert inputs["champion"] == first[Stage.DPO].digest
    table = ScoreTable(fetch(second[Stage.EVALUATE], tmp_path) / "scores.parquet")
    ours, theirs = (table.column("pairs", role) for role in ("dpo", "champion"))
    assert list(ours.items) == list(theirs.items)

    record = record_of(second)
    found = record["rulings"][0]["primary"]["compared"]
    assert (record["promoted"], record["comparison"]) == (True, "champion")
    assert found["difference"] == pytest.approx(float(ours.values.mean() - theirs.values.mean()))
    assert found["low"] <= found["difference"] <= found["high"]
    assert found["items"] == len(ours.items)
    tags = connect().get_model_version(f"{NAME}-aligned", aliases()["champion"]).tags
    assert (tags["decision.by"], int(tags["decision.items"])) == ("champion", found["items"])
    assert tags["evaluation.uri"] == second[Stage.EVALUATE].uri


def test_a_successor_that_is_worse_stays_a_candidate(world: World, second: dict[Stage, ArtifactRef]) -> None:
    before = aliases()
    worse = world.play(
        "worse",
        base_model=f"models:/{NAME}-aligned/{before['champion']}",
        first_stage="dpo",
        overrides={**RUIN, **BY_REPLIES},
    )
    record = record_of(worse)
    found = record["rulings"][0]["primary"]["compared"]
    assert (record["promoted"], record["comparison"], found["suite"]) == (False, "champion", "responses")
    assert found["low"] > 0, "nats per byte have risen for sure"
    after = aliases()
    assert after["champion"] == before["champion"]
    assert after["candidate"] != before["candidate"]
