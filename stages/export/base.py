"""The model that an adapter was trained on: where whoever uses the adapter finds it, and whether it is the right one.

An adapter on another base loads without an error and answers nonsense, so a base that can be read is checked: base plus
adapter must be the merged weights of the artifact.
"""

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.artifacts.manifests import fetch
from stages.config.errors import ConfigError, DamagedArtifactError
from stages.config.places import local_path
from stages.config.request import BASE_MODEL, Manifest, SourceKind
from stages.export.request import ExportRequest, is_hub_id
from stages.export.weights import header_of

logger = logging.getLogger(__name__)

_CHECKED_MATRICES = 3
_REVISION = 40
"""Digits of a revision of the hub, which is what a base model's digest is there."""


@dataclass(frozen=True)
class Base:
    """Where an adapter's base model is found."""

    name: str
    """For `from_pretrained`: hub id or folder."""
    revision: str = ""
    folder: Path | None = None
    """Where it can be read here; None for one that is only on the hub."""


def find_base(manifest: Manifest, request: ExportRequest, cache_dir: Path) -> Base:
    """The base of an artifact's adapter; raises ConfigError when nobody else could find it, with what to do."""
    found = _of_training(manifest, cache_dir)
    if request.base:
        folder = request.base_folder
        if folder is None and not is_hub_id(request.base):
            raise ConfigError(
                f"--base={request.base!r} is neither a folder of this machine nor the id of a model on the hub",
                advice="Give the folder of the exported base model, or ORG/NAME.",
            )
        same_name = found is not None and found.name == request.base
        base = Base(
            request.base if folder is None else str(folder), found.revision if same_name and found else "", folder
        )
        # What is only on the hub is compared by the copy that training had.
        if folder is None and found is not None:
            base = Base(base.name, base.revision, found.folder)
    elif found is None:
        raise ConfigError(
            f"the base model of this {manifest.kind} lies where no from_pretrained finds it: {_described(manifest)}",
            advice="Export the base model first, and name its folder or repository: --base FOLDER or ORG/NAME.",
        )
    else:
        base = found
    if request.push and not is_hub_id(base.name):
        raise ConfigError(
            f"the adapter's base model would be the folder {base.name}, which nobody finds who reads {request.push}",
            advice="Push the base model too (export it without --adapter), and name its repository: --base ORG/NAME.",
        )
    return base


def _described(manifest: Manifest) -> str:
    entry = _start(manifest)
    return entry if entry else "the manifest names none"


def _start(manifest: Manifest) -> str:
    inputs = {entry.role: entry for entry in manifest.inputs}
    if entry := inputs.get("model") or inputs.get(BASE_MODEL):
        return entry.uri
    return next((source.uri for source in manifest.sources if source.kind is SourceKind.MODEL), "")


def _of_training(manifest: Manifest, cache_dir: Path) -> Base | None:
    """Where training found it; None for what only Athanor can read."""
    inputs = {entry.role: entry for entry in manifest.inputs}
    if entry := inputs.get("model") or inputs.get(BASE_MODEL):
        if not entry.uri.startswith("file://"):
            return None
        try:
            folder = fetch(entry.ref(), cache_dir)
        except (FileNotFoundError, DamagedArtifactError) as error:
            raise ConfigError(
                f"the adapter's base model at {entry.uri} is not what it was: {error}",
                advice="Name a copy of it with --base, or export the merged model, which is complete.",
            ) from error
        return Base(str(local_path(entry.uri)), folder=folder)
    source = next((source for source in manifest.sources if source.kind is SourceKind.MODEL), None)
    if source is None:
        return None
    name = source.uri.removeprefix("hf://")
    if is_hub_id(name):
        digest = source.digest.removeprefix("sha256:")
        return Base(name, revision=digest if len(digest) == _REVISION else "")
    folder = local_path(source.uri).absolute()
    return Base(str(folder), folder=folder) if (folder / "config.json").is_file() else None


def check_base(base: Base, adapter: Path, merged: Iterable[Path]) -> None:
    """Raise ConfigError unless base plus adapter is the merged model, as far as the base can be read here.

    A few matrices decide: another model differs in all of them. Rows that training added to the vocabulary are in the
    merged model alone, so without them the adapter is of no use.
    """
    if base.folder is None:
        logger.warning("%s was not compared with the model: it is on the hub. Training had it from there.", base.name)
        return
    theirs, ours = _places(base.folder.glob("*.safetensors")), _places(merged)
    if not theirs:
        raise ConfigError(
            f"{base.folder} holds no *.safetensors", advice="Name the folder of the base model with --base."
        )
    shapes = {name: (_shape(theirs[name], name), _shape(ours[name], name)) for name in theirs.keys() & ours.keys()}
    if grown := sorted(name for name, (before, after) in shapes.items() if before != after):
        before, after = shapes[grown[0]]
        raise ConfigError(
            f"the model has {grown[0]} of shape {after}, its base {before}: training added tokens, and the adapter "
            "does not hold them",
            advice="Export the merged model: leave out --adapter.",
        )
    checked = _compare(adapter, theirs, ours, base)
    logger.info("%d matrices of %s plus the adapter are those of the model", checked, base.name)


def _places(files: Iterable[Path]) -> dict[str, Path]:
    return {name: path for path in files for name in header_of(path)}


def _shape(path: Path, name: str) -> list[int]:
    return header_of(path)[name]["shape"]


def _compare(adapter: Path, theirs: dict[str, Path], ours: dict[str, Path], base: Base) -> int:
    from safetensors import safe_open

    settings: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_bytes())
    scaling = settings["lora_alpha"] / settings["r"]
    checked = 0
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        names = [name for name in file.keys() if name.endswith(".lora_A.weight")]  # noqa: SIM118
        for name in names:
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            weight = f"{module}.weight"
            if checked >= _CHECKED_MATRICES:
                break
            if weight not in theirs or weight not in ours:
                continue  # an adapter of experts, which are stored under other names than they are trained under
            start, end = _read(theirs[weight], weight), _read(ours[weight], weight)
            down, up = file.get_tensor(name).float(), file.get_tensor(name.replace("lora_A", "lora_B")).float()
            delta = scaling * up @ down
            # what rounding to the base's format can move a weight by
            tolerance = _rounding(start.dtype) * float(end.abs().max()) + 1e-6
            # GPT-2's matrices are stored the other way round
            turned = [way for way in (delta, delta.T) if way.shape == start.shape]
            if all(float((start.float() + way - end.float()).abs().max()) > tolerance for way in turned):
                raise ConfigError(
                    f"{base.name} is not the model that the adapter was trained on: {weight} plus the adapter is not "
                    "that of the merged model",
                    advice="Name the right one with --base: the export of the model that the stage started from.",
                )
            checked += 1
    if not checked and names:
        logger.warning("%s was not compared with the model: its adapted weights have other names there.", base.name)
    return checked


def _read(path: Path, name: str) -> Any:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def _rounding(dtype: Any) -> float:
    import torch

    return 4 * torch.finfo(dtype).eps
