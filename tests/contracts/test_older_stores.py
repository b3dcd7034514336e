"""What an earlier version left in its store is read by this one: hits stay hits, lineage answers, waiting runs go on.

`tests/stores/0.1.0.tar.gz` is what commit 45eed0b (version 0.1.0) left of one run of recipe `tiny` through Airflow,
with a model of one layer, on sections of this project's own documentation. Its address is spelled STORE in it.
"""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from operators.prepare import find_hit, load_config
from stages.artifacts.addresses import open_store, run_key
from stages.artifacts.manifests import find_intact, fingerprint, verify
from stages.artifacts.store import Store
from stages.config.graph import GRAPH, Stage
from stages.config.pipeline import stage_config_from_json
from stages.config.request import ArtifactRef, Manifest, RunInfo, StageRequest, StageResult
from stages.lineage.graph import ancestors, descendants
from tests.pipeline_records import PLAIN_RUN
from tests.places import REPOSITORY

STORE = REPOSITORY / "tests" / "stores" / "0.1.0.tar.gz"
RUN = RunInfo(run_id="old", name="old")


def unpacked(folder: Path) -> Path:
    """The store, with its address put in."""
    with tarfile.open(STORE) as archive:
        archive.extractall(folder, filter="data")
    records = [path for path in folder.rglob("*.json") if path.name == "manifest.json" or "runs" in path.parts]
    for path in records:
        path.write_text(path.read_text().replace("STORE", folder.as_uri()))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpacked(tmp_path_factory.mktemp("older") / "store")


@pytest.fixture
def store(folder: Path) -> Store:
    return open_store(folder.as_uri())


def request_of(store: Store, stage: Stage) -> StageRequest:
    return StageRequest.model_validate_json(store.read_bytes(run_key(RUN.run_id, stage, "config.json")))


def artifact_of(store: Store, stage: Stage) -> ArtifactRef:
    return StageResult.model_validate_json(store.read_bytes(run_key(RUN.run_id, stage, "result.json"))).artifact


def manifest_of(store: Store, stage: Stage) -> Manifest:
    manifest = find_intact(store, GRAPH[stage].kind, artifact_of(store, stage).fingerprint)
    assert manifest is not None
    return manifest


@pytest.mark.parametrize("stage", PLAIN_RUN)
def test_artifacts_are_whole_and_their_manifests_say_what_they_said(store: Store, stage: Stage) -> None:
    manifest, said = manifest_of(store, stage), artifact_of(store, stage)
    verify(store, manifest, hashes=True)
    assert manifest.ref(said.uri) == said


@pytest.mark.parametrize("stage", PLAIN_RUN)
def test_hits_stay_hits(store: Store, stage: Stage) -> None:
    request, manifest = request_of(store, stage), manifest_of(store, stage)
    config = stage_config_from_json(stage, request.config)
    digests = {source.uri: source.digest for source in manifest.sources}
    identity = fingerprint(stage, config, inputs=request.inputs, sources=digests, store_uri=store.root_uri)
    if GRAPH[stage].version != manifest.version:  # what it makes has changed since: see the changelog
        assert identity != manifest.fingerprint
        return
    assert identity == manifest.fingerprint
    if not request.sources:
        hit = find_hit(store, request)
        assert hit is not None
        assert hit.artifact.digest == manifest.digest


def test_a_run_that_is_configured_the_same_way_today_hits_too(store: Store) -> None:
    from stages.config.resolve import resolve

    config = resolve(json.loads(store.read_bytes(f"runs/{RUN.run_id}/params.json")))
    for stage in PLAIN_RUN:
        request, manifest = request_of(store, stage), manifest_of(store, stage)
        digests = {source.uri: source.digest for source in manifest.sources}
        settings = config.stage_config(stage)
        today = fingerprint(stage, settings, inputs=request.inputs, sources=digests, store_uri=store.root_uri)
        if GRAPH[stage].version == manifest.version:
            assert today == manifest.fingerprint, stage


def test_the_ancestors_of_a_model_end_at_its_raw_data(store: Store) -> None:
    graph = ancestors([artifact_of(store, Stage.PPO).uri])
    built = {node.stage for node in graph.nodes if node.stage}
    assert built == {"curate", "tokenize", "pretrain", "sft", "reward", "ppo"}
    (documents,) = [node for node in graph.nodes if node.uri.endswith("/docs")]
    assert documents.kind == "raw data"


def test_a_takedown_finds_all_that_descends_from_raw_data(store: Store) -> None:
    (source, *_) = [source for source in manifest_of(store, Stage.CURATE).sources if source.uri.endswith("/docs")]
    reached = {node.stage for node in descendants(store, source.digest).nodes if node.stage}
    assert reached == {stage.value for stage in PLAIN_RUN}


def test_the_configuration_of_a_waiting_run_is_read(store: Store) -> None:
    config = load_config(store, RUN)
    assert config.run_name == "old"
    assert config.dpo.optimizer.learning_rate == 1e-3


@pytest.mark.slow
def test_a_stage_that_waits_in_an_older_run_is_built(tmp_path: Path) -> None:
    """Its request was written by the older version; its job starts in this one."""
    store = open_store(unpacked(tmp_path / "store").as_uri())
    before = artifact_of(store, Stage.DPO)
    store.delete(f"artifacts/{before.kind}/{before.fingerprint}")
    key = run_key(RUN.run_id, Stage.DPO, "config.json")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    subprocess.run(
        [sys.executable, "-m", "stages", f"{store.root_uri}/{key}"],
        env={**environment, "ATHANOR_SCRATCH": str(tmp_path / "scratch")},
        cwd=REPOSITORY,
        check=True,
        timeout=240,
    )
    result = StageResult.model_validate_json(store.read_bytes(run_key(RUN.run_id, Stage.DPO, "result.json")))
    assert not result.hit
    assert result.artifact.fingerprint == before.fingerprint
