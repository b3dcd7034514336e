"""One export, from an address to a folder and a repository: verified while it is read, whole or not at all."""

import json
import logging
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.artifacts.manifests import hash_file
from stages.config.errors import ConfigError
from stages.export.base import Base, check_base, find_base
from stages.export.gguf import Converter, convert, find_converter
from stages.export.hub import check_repository, push
from stages.export.request import Dtype, ExportRequest
from stages.export.target import RECORD, check_room, check_target, published_folder
from stages.export.weights import INDEX, copy_weights, count_parameters, header_of, with_dtype, write_index
from stages.models.find import Found, find_model
from stages.reporting.evidence import evidence_of
from stages.reporting.model_card import CardFacts, model_card

logger = logging.getLogger(__name__)

_CONFIG, _GENERATION, _HISTORY = "config.json", "generation_config.json", "history.jsonl"
_CARD, _ADAPTER = "README.md", "adapter"
_ADAPTER_CONFIG, _ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_STORED_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
_TORCH_NAMES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_RECORD_FORMAT = 1


@dataclass(frozen=True)
class Exported:
    """Where an export is now."""

    folder: Path | None
    page: str
    """Of the repository; empty when it was not pushed."""
    files: tuple[str, ...]


def export(request: ExportRequest) -> Exported:
    """Export a model; everything that can be refused is, before the first weight is read."""
    found = find_model(request.address)
    _check(request, found)
    if request.to is not None:
        check_target(request.to, overwrite=request.overwrite)
    converter = find_converter(request.converter) if request.gguf else None
    repository = check_repository(request.push, overwrite=request.overwrite) if request.push else None
    with tempfile.TemporaryDirectory(prefix="athanor-export-") as scratch:
        place = request.to or Path(scratch) / "export"
        check_room(place, _size(request, found))
        base = find_base(found.manifest, request, Path(scratch) / "base") if request.adapter else None
        source = found.fetch(Path(scratch) / "artifact")
        with published_folder(place, overwrite=request.overwrite) as folder:
            _fill(folder, source, request, found, base=base, converter=converter)
        files = tuple(sorted(path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()))
        page = ""
        if repository is not None:
            message = f"{found.manifest.kind} {found.manifest.fingerprint[:12]}, exported by Athanor"
            page = push(place, repository, public=request.public, message=message)
        return Exported(request.to, page, files)


def _check(request: ExportRequest, found: Found) -> None:
    if request.gguf and found.scores:
        raise ConfigError(
            f"--gguf: {request.address!r} is a reward model, and llama.cpp's models write text: its score head has no "
            "place there",
            advice="Export it without --gguf, and use it with transformers.",
        )
    if request.adapter and not found.has_adapter:
        raise ConfigError(
            f"--adapter: {request.address!r} has no adapter: its {found.manifest.stage.value} trained all parameters",
            advice=f"Leave out --adapter, or train with overrides such as "
            f'{{"{found.manifest.stage.value}.lora.rank": 16}}.',
        )


def _size(request: ExportRequest, found: Found) -> int:
    """Bytes of the export, about; stored weights are in float32."""
    per_weight = {Dtype.BF16: 0.5, Dtype.FP16: 0.5}.get(request.dtype, 1.0)
    kept = sum(entry.size for entry in found.manifest.files if entry.path.startswith("adapter/") == request.adapter)
    with_gguf = {"": 0.0, "f32": 1.0, "q8_0": 0.27}.get(request.gguf, 0.5)
    return int(kept * (per_weight + with_gguf))


def _fill(
    folder: Path, source: Path, request: ExportRequest, found: Found, *, base: Base | None, converter: Converter | None
) -> None:
    weights = (
        _fill_adapter(folder, source, request, found, base) if base else _fill_merged(folder, source, request, found)
    )
    gguf = ""
    if converter is not None:
        gguf = f"model-{request.gguf}.gguf"
        convert(folder, folder / gguf, outtype=request.gguf, converter=converter)
    facts = CardFacts(
        title=_title(request, found),
        evidence=evidence_of(found.ref),
        dtype=_dtype_of(weights),
        parameters=count_parameters(weights),
        licence=request.licence,
        is_adapter=base is not None,
        base=base.name if base else "",
        base_revision=base.revision if base else "",
        gguf=gguf,
    )
    (folder / _CARD).write_text(model_card(facts), encoding="utf-8")
    for path in weights:  # safetensors makes files that only their owner may read
        shutil.copymode(folder / _CARD, path)
    _write_record(folder, request, found, dtype=facts.dtype)


def _fill_merged(folder: Path, source: Path, request: ExportRequest, found: Found) -> list[Path]:
    """Every file of the artifact but the history of its training and the adapter; return the weights."""
    names = [entry.path for entry in found.manifest.files]
    if _CONFIG not in names:
        raise ConfigError(
            f"{found.ref.uri} has no {_CONFIG}, so it is no model in Hugging Face's layout",
            advice="Clear the task of its stage to build it again.",
        )
    weights = [source / name for name in names if _is_weights(name)]
    copy_weights(weights, folder, request.dtype)
    for name in names:
        if name in (_CONFIG, INDEX, _HISTORY, _CARD, RECORD) or _is_weights(name) or name.startswith(f"{_ADAPTER}/"):
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)
    if INDEX in names:
        write_index(source / INDEX, folder / INDEX)
    _write_json(folder / _CONFIG, with_dtype(json.loads((source / _CONFIG).read_bytes()), request.dtype))
    return [folder / path.name for path in weights]


def _is_weights(name: str) -> bool:
    return name.endswith(".safetensors") and "/" not in name


def _fill_adapter(folder: Path, source: Path, request: ExportRequest, found: Found, base: Base) -> list[Path]:
    """The adapter as peft lays it out, with the tokenizer that it was trained with; return its weights."""
    check_base(base, source / _ADAPTER, source.glob("*.safetensors"))
    copy_weights([source / _ADAPTER / _ADAPTER_WEIGHTS], folder, request.dtype)
    settings: dict[str, Any] = json.loads((source / _ADAPTER / _ADAPTER_CONFIG).read_bytes())
    settings |= {"base_model_name_or_path": base.name, "revision": base.revision or None, "inference_mode": True}
    _write_json(folder / _ADAPTER_CONFIG, settings)
    others = (_CONFIG, INDEX, _GENERATION, RECORD)
    for name in (entry.path for entry in found.manifest.files):
        if "/" not in name and name.endswith((".json", ".jinja", ".model", ".txt")) and name not in others:
            shutil.copyfile(source / name, folder / name)
    return [folder / _ADAPTER_WEIGHTS]


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _dtype_of(weights: list[Path]) -> str:
    """The format of most of the weights, as people call it."""
    bytes_of: dict[str, int] = {}
    for path in weights:
        for entry in header_of(path).values():
            size = entry["data_offsets"][1] - entry["data_offsets"][0]
            bytes_of[entry["dtype"]] = bytes_of.get(entry["dtype"], 0) + size
    most = max(bytes_of, key=lambda name: bytes_of[name], default="F32")
    return _TORCH_NAMES.get(most, most)


def _title(request: ExportRequest, found: Found) -> str:
    if request.push:
        return request.push.partition("/")[2]
    if request.address.startswith("models:/"):
        return request.address.removeprefix("models:/").partition("@")[0].partition("/")[0]
    return request.to.name if request.to else found.manifest.kind


def _write_record(folder: Path, request: ExportRequest, found: Found, *, dtype: str) -> None:
    """What was exported from what, for programs: no addresses, since the folder may be given to anyone."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    record = {
        "format": _RECORD_FORMAT,
        "kind": found.manifest.kind,
        "stage": found.manifest.stage.value,
        "fingerprint": found.manifest.fingerprint,
        "digest": found.manifest.digest,
        "form": "adapter" if request.adapter else "model",
        "dtype": dtype,
        "files": {path.relative_to(folder).as_posix(): hash_file(path) for path in paths},
    }
    _write_json(folder / RECORD, record)
