"""Where a given model can be looked at without its weights being moved: its folder, or a copy with hollow weights.

A folder is read in place. Of a model on the hub and of an artifact in a bucket only the small files are fetched, and
the headers of the weights where they can be read alone; checks that read a folder then work on either. What they say
about the copy is said about the address.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from stages.artifacts.addresses import split_artifact_uri
from stages.artifacts.manifests import read_file, read_manifest
from stages.config.errors import StageError
from stages.config.look import GivenModel
from stages.config.places import check_source, is_gguf, local_path
from stages.config.request import ArtifactRef
from stages.models.folder import COVERED
from stages.models.given import local_gguf, snapshot_base_model

_SMALL = tuple(pattern for pattern in (*COVERED, "*.py") if pattern != "*.safetensors")


@dataclass(frozen=True)
class Outline:
    """A folder with all files of a model but the numbers in its weights."""

    folder: Path
    has_headers: bool = True
    """False where the weights' names and shapes could not be read without fetching them."""
    revision: str = ""
    """Of a hub id."""


@contextmanager
def outlined(model: GivenModel, scratch: Path, *, revision: str = "") -> Iterator[Outline | None]:
    """Yield the outline of a given model, None for a GGUF file elsewhere, which is fetched whole or not at all.

    `revision` is what the digest of a hub id stands for; without it the newest commit is looked at.
    Raises ConfigError when the model is not there.
    """
    copy = scratch / hashlib.sha256(model.uri.encode()).hexdigest()[:12]
    if (
        model.artifact is None
        and not is_gguf(model.uri)
        and (folder := local_path(model.uri, field=model.role)).is_dir()
    ):
        check_source(model.uri, field="base_model")
        yield Outline(folder)
        return
    try:
        if model.artifact is not None:
            yield _of_artifact(model.artifact, copy)
        elif is_gguf(model.uri):
            yield _of_gguf(model.uri, copy)
        else:
            yield _of_hub(model.uri, copy, revision)
    except StageError as error:
        said = error.message.replace(str(copy), model.uri)
        raise type(error)(said, advice=error.advice.replace(str(copy), model.uri)) from error


def _of_artifact(ref: ArtifactRef, copy: Path) -> Outline:
    from stages.models.hollow import read_header, write_hollow_file

    store, key = split_artifact_uri(ref.uri)
    has_headers = True
    for entry in read_manifest(ref).files:
        name = entry.path.rpartition("/")[2]
        path = copy / entry.path
        if "/" not in entry.path and name.endswith(".safetensors"):
            path.parent.mkdir(parents=True, exist_ok=True)
            local = store.local_path(f"{key}/{entry.path}")
            has_headers &= local is not None
            write_hollow_file(path, read_header(local) if local else {})
        elif name.endswith(".py") or ("/" not in entry.path and _is_small(name)):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(read_file(ref, entry.path))
    return Outline(copy, has_headers=has_headers)


def _of_gguf(uri: str, copy: Path) -> Outline | None:
    check_source(uri, field="base_model")
    file = None if uri.startswith("s3://") else local_gguf(uri)
    if file is None:
        snapshot_base_model(uri)  # it is there
        return None
    from stages.models.gguf import outline_gguf
    from stages.models.hollow import write_hollow_file

    outline_gguf(file, copy)
    write_hollow_file(copy / "model.safetensors", {})
    return Outline(copy, has_headers=False)


def _of_hub(uri: str, copy: Path, revision: str) -> Outline:
    revision = revision or snapshot_base_model(uri)
    from huggingface_hub import HfApi, snapshot_download

    from stages.models.hollow import write_hollow_file

    snapshot_download(uri, revision=revision, allow_patterns=list(_SMALL), local_dir=copy)
    api = HfApi()
    for name in api.list_repo_files(uri, revision=revision):
        if "/" not in name and name.endswith(".safetensors"):
            header = api.parse_safetensors_file_metadata(uri, name, revision=revision).tensors
            tensors: dict[str, dict[str, Any]] = {
                weight: {"dtype": found.dtype, "shape": found.shape, "data_offsets": list(found.data_offsets)}
                for weight, found in header.items()
            }
            write_hollow_file(copy / name, tensors)
    return Outline(copy, revision=revision)


def _is_small(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in _SMALL)
