"""Reads what a gate judges by: the manifests of an artifact and of its inputs, and small files of the artifact."""

from collections.abc import Mapping
from typing import Any

from stages.artifacts.manifests import content_digest, read_file, read_manifest
from stages.config.errors import DamagedArtifactError
from stages.config.gate_evidence import Evidence
from stages.config.graph import GRAPH, Stage
from stages.config.records import parse_object
from stages.config.request import ArtifactRef, InputEntry, Manifest

_HISTORY, _REPORT, _META = "history.jsonl", "metrics.json", "meta.json"


def read_evidence(ref: ArtifactRef) -> Evidence:
    """Read it; raises DamagedArtifactError for an artifact whose own manifest or files are not what `ref` names, and
    DataError for a file that is not what its name says. What is wrong with inputs is part of the evidence."""
    manifest = read_manifest(ref)
    inputs: dict[str, Manifest] = {}
    unreadable: dict[str, str] = {}
    for entry in manifest.inputs:
        found = _input(entry)
        if isinstance(found, Manifest):
            inputs[entry.role] = found
        else:
            unreadable[entry.role] = found
    return Evidence(
        manifest=manifest,
        inputs=inputs,
        unreadable=unreadable,
        first_row=_first_row(ref, manifest),
        report=_object(ref, _REPORT) if manifest.stage is Stage.EVALUATE else None,
        meta=_object(ref, _META) if manifest.stage is Stage.TOKENIZE else None,
    )


def _input(entry: InputEntry) -> Manifest | str:
    """The manifest that lies there now, whatever its content is; why not, where none can be believed."""
    try:
        manifest = read_manifest(entry.uri)
    except FileNotFoundError:
        return f"{entry.uri} is gone"
    except DamagedArtifactError as error:
        return error.message
    if content_digest(manifest.files) != manifest.digest:
        return f"{entry.uri} lists files of another digest than its own"
    return manifest


def _first_row(ref: ArtifactRef, manifest: Manifest) -> Mapping[str, Any] | None:
    if not GRAPH[manifest.stage].trains or _HISTORY not in {entry.path for entry in manifest.files}:
        return None
    line = read_file(ref, _HISTORY).split(b"\n", 1)[0]
    return parse_object(line, f"{ref.uri}/{_HISTORY}") if line else None


def _object(ref: ArtifactRef, name: str) -> Mapping[str, Any] | None:
    try:
        return parse_object(read_file(ref, name), f"{ref.uri}/{name}")
    except FileNotFoundError:
        return None
