"""Which models a run has: by what its stages left in the store."""

import json
import os
from pathlib import Path

import pytest

from stages.artifacts.addresses import open_store, run_key
from stages.artifacts.store import Store
from stages.config.errors import ConfigError
from stages.config.graph import GRAPH, Stage
from stages.config.request import ArtifactRef, StageResult, run_folder
from stages.serve.address import Address
from stages.serve.run_models import find_run, models_of_run

RUN = "manual__2026-01-31T12:00:00+00:00"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store((tmp_path / "store").as_uri())


def start(store: Store, folder: str, *, run_name: str = "athanor", base_model: str = "") -> None:
    config = {"run_name": run_name, "base_model": base_model}
    store.write_bytes(f"runs/{folder}/pipeline.json", json.dumps(config).encode())


def finish(store: Store, folder: str, *stages: Stage) -> None:
    for stage in stages:
        kind = GRAPH[stage].kind
        uri = f"{store.root_uri}/artifacts/{kind}/{'a' * 64}"
        ref = ArtifactRef(kind=kind, uri=uri, fingerprint="a" * 64, digest="b" * 64)
        result = StageResult(stage=stage, hit=False, artifact=ref)
        store.write_bytes(run_key(folder, stage, "result.json"), result.model_dump_json().encode())


def names(found: list[Address]) -> list[tuple[str, str]]:
    return [
        (address.name, address.uri.split("/")[-2] if "/artifacts/" in address.uri else address.uri) for address in found
    ]


def test_a_run_has_the_models_that_its_stages_made_by_role_and_in_order(store: Store) -> None:
    folder = run_folder("llm_pipeline", RUN)
    start(store, folder)
    finish(store, folder, Stage.DPO, Stage.TOKENIZE, Stage.SFT, Stage.REWARD, Stage.PPO, Stage.PRETRAIN)
    assert names(models_of_run(store, RUN)) == [
        ("base", "base-model"),
        ("sft", "sft-model"),
        ("ppo", "ppo-model"),
        ("dpo", "dpo-model"),
    ]


def test_the_given_model_is_the_base_unless_the_run_trained_it_further(store: Store) -> None:
    start(store, "given", base_model="org/model")
    finish(store, "given", Stage.SFT)
    assert names(models_of_run(store, "given")) == [("base", "org/model"), ("sft", "sft-model")]
    start(store, "file", base_model="package://x/y.gguf")
    finish(store, "file", Stage.CONVERT, Stage.SFT)
    assert names(models_of_run(store, "file")) == [("base", "given-model"), ("sft", "sft-model")]
    start(store, "further", base_model="org/model")
    finish(store, "further", Stage.PRETRAIN)
    assert names(models_of_run(store, "further")) == [("base", "base-model")]


def test_a_name_is_that_of_the_newest_run(store: Store) -> None:
    root = Path(store.root_uri.removeprefix("file://"))
    for age, folder in ((30, "older"), (10, "newer"), (20, "between")):
        start(store, folder, run_name="weekly")
        os.utime(root / "runs" / folder / "pipeline.json", (1_700_000_000 - age, 1_700_000_000 - age))
    start(store, "other")
    assert find_run(store, "weekly") == "newer"
    assert find_run(store, "older") == "older"


def test_a_run_that_is_not_there_is_an_error_that_names_some(store: Store) -> None:
    with pytest.raises(ConfigError, match="there is no run 'x'") as raised:
        find_run(store, "x")
    assert "the store has no runs" in raised.value.advice
    start(store, "mine")
    with pytest.raises(ConfigError) as raised:
        find_run(store, "../mine")
    assert "the store has mine" in raised.value.advice


def test_a_run_without_models_says_what_to_wait_for(store: Store) -> None:
    start(store, "early")
    finish(store, "early", Stage.CURATE)
    with pytest.raises(ConfigError, match="the run 'early' has no model yet"):
        models_of_run(store, "early")
