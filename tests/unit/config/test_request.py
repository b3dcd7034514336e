"""Records of earlier versions are still read: sources get their kinds, everything else stays as it was written."""

import json
from typing import Any

import pytest

from stages.artifacts.addresses import artifact_key, open_store
from stages.artifacts.explain import identity_of
from stages.artifacts.manifests import find_manifest, fingerprint, load_manifest
from stages.config.errors import DamagedArtifactError
from stages.config.graph import Stage
from stages.config.pipeline import stage_config_from_json
from stages.config.recipes import RECIPES
from stages.config.request import MANIFEST_VERSION, Manifest, SourceKind, StageRequest, digests_of
from stages.lineage.graph import GIVEN_KIND, SOURCE_KIND, ancestors_of_unpublished
from stages.lineage.tags import lineage_tags

# As written before sources had kinds; files, settings and versions are shortened.
OLD_CURATED: dict[str, Any] = {
    "kind": "curated",
    "stage": "curate",
    "version": 3,
    "fingerprint": "fb58a0b6dfdd3657bf7cff0f7b45671912248f03ae0a2c7f4e45ec7f12f7716d",
    "digest": "6ce9baf2d41cd69362f540902b2694c86459f4b1c65caf0deb775d6f17de6c90",
    "files": [
        {
            "path": "documents/train/00000.jsonl.gz",
            "size": 83288,
            "sha256": "efef025e553e84d1f0be2b4f3c617024b255fcc3004dc40fff56afe77f9f1b6f",
        }
    ],
    "inputs": [],
    "sources": {"installed-docs": "77029157d4d086f526e31a39048b020b6b37d69bcc3ce61dd5457959fda77b29"},
    "config": {"documents": ["installed-docs"], "seed": 0},
    "execution": {"num_workers": 0, "git_commit": "45eed0b", "submission_id": "athanor-curate-0123-1"},
    "metrics": {"curate/documents_kept": 277.0},
    "ledger": {},
    "cost": {
        "wall_seconds": 10.082,
        "productive_seconds": 10.008,
        "cpu_seconds": 11.232,
        "gpu_seconds": 0.0,
        "peak_memory_bytes": 394919936,
        "attempts": 1,
    },
    "mlflow_run_id": "8219731efa1e474eb8f1749bd2fe60ec",
    "mlflow_model_id": None,
    "created_at": "2026-11-28T23:06:33+00:00",
}
OLD_SFT: dict[str, Any] = {
    **OLD_CURATED,
    "kind": "sft-model",
    "stage": "sft",
    "version": 1,
    "fingerprint": "814f45450677e6b7ade2b08c62a2f017f41d3898fde9ba046e2d3800fee57b02",
    "inputs": [
        {
            "role": "tokens",
            "kind": "tokens",
            "uri": "file:///store/artifacts/tokens/bcf9ccdd6961ae7aa296f3d8d64d5774af377f68d0a8c32b3c2929d02b8aeab6",
            "fingerprint": "bcf9ccdd6961ae7aa296f3d8d64d5774af377f68d0a8c32b3c2929d02b8aeab6",
            "digest": "df8535669d0ef956cf5c3780e33343836fa80d1117e9983fcf5bf6d6eae3784d",
        }
    ],
    "config": {"num_epochs": 0.5},
}


def old_request(stage: str, sources: list[str], config: dict[str, Any]) -> dict[str, Any]:
    return {
        "stage": stage,
        "run": {"run_id": "manual__1", "name": "tiny", "dag_id": "llm_pipeline", "parent_run_id": None},
        "store_uri": "file:///store",
        "config": config,
        "execution": {"num_workers": 0, "micro_batch_size": 8},
        "inputs": {},
        "sources": sources,
        "task_id": stage,
        "try_number": 1,
        "submission_id": f"athanor-{stage}-0123-1",
    }


def test_an_old_manifest_of_raw_data_is_read_and_its_source_is_data():
    manifest = Manifest.model_validate_json(json.dumps(OLD_CURATED))
    (source,) = manifest.sources
    assert (source.kind, source.uri) == (SourceKind.DATA, "installed-docs")
    assert digests_of(manifest.sources) == OLD_CURATED["sources"]
    assert lineage_tags(manifest, "uri")["lineage.dataset.source.installed-docs"] == source.digest
    assert [node.kind for node in ancestors_of_unpublished(manifest, "uri").nodes] == [SOURCE_KIND, "curated"]
    assert identity_of(manifest, store_uri="", wanted={})["source installed-docs"] == source.digest


@pytest.mark.parametrize("stage", ["tokenize", "pretrain", "sft", "evaluate"])
def test_what_an_old_training_was_given_from_outside_is_a_model(stage: str):
    old = {**OLD_SFT, "stage": stage, "inputs": [], "sources": {"/models/llama": "abc"}}
    manifest = Manifest.model_validate_json(json.dumps(old))
    (source,) = manifest.sources
    assert (source.role, source.kind, source.digest) == ("base_model", SourceKind.MODEL, "abc")
    assert lineage_tags(manifest, "uri")["lineage.parent.source.models-llama"] == "abc"
    assert GIVEN_KIND in [node.kind for node in ancestors_of_unpublished(manifest, "uri").nodes]


def test_an_old_manifest_without_sources_keeps_its_inputs():
    manifest = Manifest.model_validate_json(json.dumps({**OLD_SFT, "sources": {}}))
    assert manifest.sources == ()
    assert [entry.role for entry in manifest.inputs] == ["tokens"]


def test_a_manifest_that_was_upgraded_is_written_in_todays_form():
    manifest = Manifest.model_validate(OLD_CURATED)
    written = json.loads(manifest.model_dump_json())
    assert written["manifest_version"] == MANIFEST_VERSION
    assert written["sources"][0] == {
        "role": "source",
        "kind": "data",
        "uri": "installed-docs",
        "digest": "77029157d4d086f526e31a39048b020b6b37d69bcc3ce61dd5457959fda77b29",
    }
    assert Manifest.model_validate(written) == manifest


def test_old_requests_are_read(tmp_path):
    request = StageRequest.model_validate_json(json.dumps(old_request("curate", ["installed-docs", "/extra"], {})))
    assert [(source.kind, source.uri) for source in request.sources] == [
        (SourceKind.DATA, "installed-docs"),
        (SourceKind.DATA, "/extra"),
    ]
    request = StageRequest.model_validate_json(json.dumps(old_request("sft", ["/models/llama"], {})))
    assert [(source.role, source.kind) for source in request.sources] == [("base_model", SourceKind.MODEL)]
    assert StageRequest.model_validate_json(json.dumps(old_request("reward", [], {}))).sources == ()
    assert StageRequest.model_validate_json(request.model_dump_json()) == request


def test_kinds_and_roles_do_not_enter_the_fingerprint():
    config = RECIPES["tiny"]().curate
    old = StageRequest.model_validate(old_request("curate", ["installed-docs"], config.model_dump(mode="json")))
    sources = tuple(source.identified("5eed") for source in old.sources)
    identity = fingerprint(
        Stage.CURATE,
        stage_config_from_json(Stage.CURATE, old.config),
        inputs={},
        sources=digests_of(sources),
        store_uri="",
    )
    assert identity == fingerprint(Stage.CURATE, config, inputs={}, sources={"installed-docs": "5eed"}, store_uri="")


def test_a_manifest_of_a_newer_version_names_the_version(tmp_path):
    store = open_store(tmp_path.as_uri())
    newer = {**OLD_SFT, "sources": [], "manifest_version": MANIFEST_VERSION + 1}
    key = artifact_key("sft-model", OLD_SFT["fingerprint"])
    store.write_bytes(f"{key}/manifest.json", json.dumps(newer).encode())
    with pytest.raises(DamagedArtifactError, match=r"manifest_version: .*3 is newer than 2") as refused:
        load_manifest(store, key)
    assert "may be intact: update Athanor" in refused.value.advice


def test_a_manifest_with_a_wrong_field_names_the_field(tmp_path):
    store = open_store(tmp_path.as_uri())
    key = artifact_key("sft-model", OLD_SFT["fingerprint"])
    store.write_bytes(f"{key}/manifest.json", json.dumps({**OLD_SFT, "inputs": [{"role": "tokens"}]}).encode())
    with pytest.raises(DamagedArtifactError, match=f"{key}/manifest.json is not a valid manifest: inputs.0.kind: "):
        find_manifest(store, "sft-model", OLD_SFT["fingerprint"])
    store.write_bytes(f"{key}/manifest.json", b"{")
    with pytest.raises(DamagedArtifactError, match="is not a valid manifest: Invalid JSON"):
        load_manifest(store, key)
