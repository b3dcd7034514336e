"""Two runs one after the other, stage by stage as their Ray jobs run them: the second goes on from the first."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from operators.given import given_artifacts
from operators.prepare import build_request, load_config, pipeline_key
from stages.__main__ import verb_of
from stages.artifacts.addresses import open_store
from stages.artifacts.manifests import fetch, read_manifest
from stages.artifacts.store import Store, write_json
from stages.config.graph import Stage
from stages.config.request import ArtifactRef, RunInfo
from stages.config.resolve import resolve
from stages.job.runner import execute
from stages.lineage.graph import ancestors
from tests.raw_text import WORDS, prose

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(300)]

CHAIN = (Stage.CURATE, Stage.TOKENIZE, Stage.PRETRAIN, Stage.SFT)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt") as lines:
        return [json.loads(line) for line in lines]


def play(store: Store, name: str, params: dict[str, Any]) -> dict[Stage, ArtifactRef]:
    """What Airflow does between the tasks, without Airflow and Ray."""
    run = RunInfo(run_id=name, name=name)
    config = resolve({"recipe": "tiny", "alignment": "none", "last_stage": "sft", **params})
    config = config.with_given(given_artifacts(config))
    store.write_bytes(pipeline_key(name), config.model_dump_json().encode())
    done: dict[Stage, ArtifactRef] = {}
    for stage in CHAIN:
        config = load_config(store, run)
        if stage in config.selected:
            request = build_request(stage, run=run, store=store, config=config, upstream=done)
            result = execute(request, store, verb_of)
            write_json(store, f"runs/{name}/{stage.value}/result.json", result.model_dump(mode="json"))
            done[stage] = result.artifact
    return done


def test_a_run_on_new_documents_goes_on_from_the_model_and_the_data_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("ATHANOR_SCRATCH", str(tmp_path / "scratch"))
    store, raw = open_store((tmp_path / "store").as_uri()), tmp_path / "raw"
    raw.mkdir()
    write(raw / "monday.jsonl", [{"text": prose(seed)} for seed in range(60)])
    pairs = [{"instruction": f"Where is the {a} of the {b}?", "response": f"By the {b}."} for a in WORDS for b in WORDS]
    given = {
        "documents": [str(raw)],
        "instructions": [write(tmp_path / "pairs.jsonl", pairs)],
        "overrides": {
            "tokenize.vocab_size": 320,
            "curate.preferences": [],
            "curate.planted": 0,
            "curate.toxicity": "none",
            "min_new_bytes": 1000,
        },
    }
    first = play(store, "first", given)
    again = {
        **given,
        "instructions": [],
        "base_model": first[Stage.SFT].uri,
        "continue_pretraining": True,
        "previous_data": first[Stage.SFT].uri,
    }

    write(raw / "tuesday.jsonl", [{"text": prose(seed)} for seed in range(50, 90)])
    second = play(store, "second", again)
    curated = read_manifest(second[Stage.CURATE])
    folder = fetch(second[Stage.CURATE], tmp_path) / "documents" / "train"
    texts = [row["text"] for path in folder.glob("*.gz") for row in read(path)]
    assert texts
    assert set(texts) <= {prose(seed) for seed in range(60, 90)}
    assert curated.ledger["documents"]["dropped"]["exact_duplicates/seen_before"]["documents"] == 70
    assert {entry.role: entry.fingerprint for entry in curated.inputs} == {"previous": first[Stage.CURATE].fingerprint}
    assert curated.ledger["carried"]["instructions/train"] > 100
    for stage in (Stage.TOKENIZE, Stage.PRETRAIN):
        roles = {entry.role: entry.fingerprint for entry in read_manifest(second[stage]).inputs}
        assert roles["base_model"] == first[Stage.SFT].fingerprint
    assert {entry.role for entry in read_manifest(second[Stage.SFT]).inputs} == {"tokens", "model"}
    family = {node.id for node in ancestors([second[Stage.SFT].uri]).nodes if node.stage}
    assert {artifact.fingerprint for artifact in (*first.values(), *second.values())} == family

    # The same text under another name is new to a listing and to nobody else.
    write(raw / "wednesday.jsonl", [{"text": prose(seed)} for seed in range(50, 90)])
    onwards = {**again, "base_model": second[Stage.SFT].uri, "previous_data": second[Stage.SFT].uri}
    assert set(play(store, "third", onwards)) == {Stage.CURATE}

    # New pairs alone are worth a tuning, and no pretraining.
    pairs = [{"instruction": f"Who has the {word}?", "response": f"The {word} is mine."} for word in WORDS]
    fourth = play(store, "fourth", {**onwards, "instructions": [write(tmp_path / "more.jsonl", pairs)]})
    assert set(fourth) == {Stage.CURATE, Stage.TOKENIZE, Stage.SFT}
    roles = {entry.role: entry.fingerprint for entry in read_manifest(fourth[Stage.SFT]).inputs}
    assert roles["base_model"] == second[Stage.SFT].fingerprint
