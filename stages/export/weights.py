"""Weights in another number format, file by file: the layout in shards stays, and one file at a time is in memory."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stages.config.errors import ConfigError
from stages.export.request import Dtype

INDEX = "model.safetensors.index.json"
NAMES = {Dtype.FP32: "float32", Dtype.BF16: "bfloat16", Dtype.FP16: "float16"}
"""As torch and config.json spell them."""


def copy_weights(files: Iterable[Path], target: Path, dtype: Dtype) -> None:
    """Copy safetensors files into `target`, cast to `dtype`; raises ConfigError where numbers do not fit into it."""
    for path in files:
        if dtype is Dtype.STORED:
            shutil.copyfile(path, target / path.name)
        else:
            _cast_file(path, target / path.name, dtype)


def _cast_file(source: Path, target: Path, dtype: Dtype) -> None:
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    wanted = getattr(torch, NAMES[dtype])
    with safe_open(source, framework="pt") as file:
        metadata = file.metadata() or {"format": "pt"}
        tensors = {name: _cast(name, file.get_tensor(name), wanted) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, target, metadata=metadata)


def _cast(name: str, tensor: Any, wanted: Any) -> Any:
    if not tensor.is_floating_point():
        return tensor  # indices and masks are no weights
    cast = tensor.to(wanted)
    if not cast.isfinite().all() and tensor.isfinite().all():
        raise ConfigError(
            f"--dtype: {name} has values up to {tensor.abs().max():.3g}, which {str(wanted).removeprefix('torch.')} "
            "cannot hold",
            advice="Use --dtype bf16, which has the range of fp32, or leave --dtype out.",
        )
    return cast


def write_index(source: Path, target: Path) -> None:
    """Copy the index of a model in shards with the size that its weights have now."""
    found = json.loads(source.read_bytes())
    shards = {str(name) for name in found["weight_map"].values()}
    found["metadata"] = {**found.get("metadata", {}), "total_size": sum(map(_tensor_bytes, _in(target.parent, shards)))}
    target.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _in(folder: Path, names: Iterable[str]) -> list[Path]:
    return [folder / name for name in sorted(names)]


def header_of(path: Path) -> dict[str, Any]:
    """Name, dtype and shape of every tensor, without reading the weights."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


def _tensor_bytes(path: Path) -> int:
    return sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in header_of(path).values())


def count_parameters(files: Iterable[Path]) -> int:
    total = 0
    for path in files:
        for entry in header_of(path).values():
            size = 1
            for length in entry["shape"]:
                size *= length
            total += size
    return total


def with_dtype(settings: dict[str, Any], dtype: Dtype) -> dict[str, Any]:
    """A config.json that names the format which its weights now have, inner configurations too."""
    if dtype is Dtype.STORED:
        return settings
    changed: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            changed[key] = with_dtype(value, dtype) if "dtype" in value or "torch_dtype" in value else value
        elif key != "torch_dtype":  # the older name of the same
            changed[key] = value
    return {**changed, "dtype": NAMES[dtype]}
