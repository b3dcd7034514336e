"""A trained stage that does not exist, for tests that what knows stages learns of a new one from the graph alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from pydantic import BaseModel

from stages.artifacts.addresses import artifact_uri
from stages.artifacts.manifests import publish, read_manifest
from stages.artifacts.store import Store
from stages.config.execution import ExecutionConfig
from stages.config.graph import GRAPH, Stage, StageSpec, graph_of, trained_stages
from stages.config.pipeline import CONFIG_CLASSES, Executions, PipelineConfig
from stages.config.preferences import DPOConfig
from stages.config.recipes import RECIPES, tiny
from stages.config.request import ArtifactRef, Manifest, StageRequest, StageResult


@contextmanager
def imaginary(*models: type[BaseModel]) -> Iterator[StageSpec]:
    """Put a second kind of DPO, `ipo`, into the graph, with settings in every recipe; afterwards all is as it was.

    Pydantic remembers the members of an enum from when a class is made: `models` are further ones with a stage in them.
    """
    remembering = (StageRequest, Manifest, StageResult, *models)
    try:
        with pytest.MonkeyPatch.context() as patch:
            spec = _add(patch)
            for model in remembering:
                model.model_rebuild(force=True)
            yield spec
    finally:
        for model in remembering:
            model.model_rebuild(force=True)


def _add(monkeypatch: pytest.MonkeyPatch) -> StageSpec:
    stage = str.__new__(Stage, "ipo")
    stage._name_, stage._value_, stage.label = "IPO", "ipo", "IPO: aligned by imagination"
    members: Any = Stage
    monkeypatch.setitem(members._value2member_map_, "ipo", stage)
    monkeypatch.setitem(members._member_map_, "IPO", stage)
    monkeypatch.setattr(members, "_member_names_", [*members._member_names_, "IPO"])
    spec = replace(GRAPH[Stage.DPO], stage=stage, kind="ipo-model", role="ipo", label="Imaginary PO")
    data = [known for known in GRAPH.values() if known.in_pipeline and not known.trains and not known.closing]
    graph = graph_of(data, (*trained_stages(), spec))
    for key in reversed(list(GRAPH)):  # undone in reverse, so that the order is the old one afterwards
        monkeypatch.delitem(GRAPH, key)
    for key, facts in graph.items():
        monkeypatch.setitem(GRAPH, key, facts)
    _give_settings(monkeypatch, stage)
    return spec


def _give_settings(monkeypatch: pytest.MonkeyPatch, stage: Stage) -> None:
    class WithExecution(Executions):
        ipo: ExecutionConfig = ExecutionConfig()

    class WithStage(PipelineConfig):
        ipo: DPOConfig
        execution: WithExecution = WithExecution()

    def recipe(seed: int = 0) -> PipelineConfig:
        tree = tiny(seed=seed).model_dump(mode="json")
        return WithStage.model_validate(tree | {"ipo": tree["dpo"]})

    for name in RECIPES:
        monkeypatch.setitem(RECIPES, name, recipe)
    monkeypatch.setitem(CONFIG_CLASSES, stage, DPOConfig)


def publish_imaginary(store: Store, like: ArtifactRef) -> ArtifactRef:
    """Publish a manifest without files that only differs from another model's in stage, kind and fingerprint."""
    fingerprint = "1b0" + "0" * 61
    changes = {"stage": Stage("ipo"), "kind": "ipo-model", "fingerprint": fingerprint, "files": ()}
    manifest = read_manifest(like).model_copy(update=changes)
    publish(store, manifest)
    return manifest.ref(artifact_uri(store, manifest.kind, fingerprint))
