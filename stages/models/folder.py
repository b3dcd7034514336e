"""What may be read of a model's folder: the files that its digest covers, by their own names, weights as safetensors.

A folder says in several places which other files belong to it, and transformers opens whatever is named there: other
weights, an index that leads out of the folder, the model below an adapter, kernels on the hub. So the folder is checked
before transformers sees it. What is malformed is `config` with the file's name: no retry mends a folder.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.config.errors import ConfigError, StageError

COVERED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
"""What the digest of a folder covers, apart from allowed code."""
INDEX = "model.safetensors.index.json"
_ADAPTER = "adapter_config.json"
# Written by torch for many processes; transformers prefers such files to model.safetensors.
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
_OTHER_FILES = frozenset({"transformers_weights", "configuration_files"})
_KERNELS = frozenset({"attn_implementation", "experts_implementation"})
_SAVE_AGAIN = "Save the model again with save_pretrained."
_MACHINE_ERRORS = frozenset({"OutOfMemoryError", "AcceleratorError", "DistBackendError"})
_MACHINE_TEXTS = ("memory", "CUDA", "NCCL", "cuBLAS")


def covered_files(folder: Path) -> list[Path]:
    """Every file that loading may open, by name; ConfigError for what is no file of this folder."""
    found = sorted({path for pattern in COVERED for path in folder.glob(pattern)})
    return [path for path in found if _is_own_file(path, folder)]


def _is_own_file(path: Path, folder: Path) -> bool:
    target, home = path.resolve(), folder.resolve()
    # The hub's cache: `snapshots/<revision>/` has links to the `blobs/` of the same repository.
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if not (target.is_relative_to(home) or target.is_relative_to(blobs)):
        raise ConfigError(
            f"{path} is a link that leads out of the model's folder, to {target}",
            advice="Put the file itself there, or give the folder that it lies in.",
        )
    if target.is_dir():
        return False
    if not target.is_file():
        raise ConfigError(f"{path} is no regular file, or a link to nothing", advice=_SAVE_AGAIN)
    return True


def read_settings(path: Path) -> dict[str, Any]:
    """One of the folder's JSON files; ConfigError with its name when it is not one JSON object."""
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ConfigError(f"{path} is not valid JSON: {reason}", advice=_SAVE_AGAIN) from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is {type(found).__name__}, not a JSON object", advice=_SAVE_AGAIN)
    return found


def check_folder(folder: Path) -> list[Path]:
    """Return the covered files; ConfigError when loading them would open, or fetch, anything else."""
    files = covered_files(folder)
    names = {path.name for path in files}
    if "config.json" not in names:
        raise ConfigError(
            f"base_model={str(folder)!r} has no config.json, so it is not a Hugging Face model",
            advice="Give the folder that save_pretrained wrote.",
        )
    if not any(name.endswith(".safetensors") for name in names):
        raise ConfigError(
            f"base_model={str(folder)!r} has no *.safetensors; other weight formats may run code and are refused",
            advice=_SAVE_AGAIN,
        )
    if _ADAPTER in names:
        raise ConfigError(
            f"{folder / _ADAPTER}: the folder holds an adapter, whose base model the digest does not cover",
            advice="Merge the adapter into its model (peft: merge_and_unload) and save that, or remove its files.",
        )
    if wrong := sorted(name for name in names if _DISTRIBUTED.fullmatch(name)):
        raise ConfigError(f"{folder} holds parts of a distributed checkpoint: {wrong}", advice=_SAVE_AGAIN)
    _check_config(folder / "config.json")
    if INDEX in names:
        _check_index(folder / INDEX, names)
    return files


def _check_config(path: Path) -> None:
    for key, value in _entries(read_settings(path)):
        if key in _OTHER_FILES and value:
            raise ConfigError(
                f"{path} names other files: {key}={value!r}; the weights are read from model.safetensors, or from the "
                f"files of {INDEX}",
                advice=f"Remove {key}, and give the file that name.",
            )
        if key.removeprefix("_") in _KERNELS and "/" in json.dumps(value):
            raise ConfigError(
                f"{path} wants code from the hub: {key}={value!r}",
                advice=f"Remove {key}; attention is computed by Athanor's own code.",
            )


def _entries(settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every key with its value, of objects inside objects too: transformers may load an inner configuration alone."""
    waiting: list[Any] = [settings]
    while waiting:
        match waiting.pop():
            case dict() as found:
                yield from found.items()
                waiting += found.values()
            case list() as items:
                waiting += items
            case _:
                pass


def _check_index(path: Path, names: set[str]) -> None:
    found = read_settings(path).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise ConfigError(f"{path} has no weight_map of weights and files", advice=_SAVE_AGAIN)
    named = {str(name) for name in found.values()}
    if wrong := sorted(name for name in named if "/" in name or not name.endswith(".safetensors")):
        raise ConfigError(
            f"{path} names {wrong}; allowed are *.safetensors in the same folder, because other formats may run code",
            advice=_SAVE_AGAIN,
        )
    if absent := sorted(named - names):
        raise ConfigError(f"{path} names {absent}, which the folder does not hold", advice=_SAVE_AGAIN)


def is_malformed(error: BaseException) -> bool:
    """Whether a library failed because of what it read, and not because of the machine or an interruption.

    Libraries raise whatever happens to fail first on a malformed file: KeyError, TypeError, AttributeError, a panic of
    Rust code. So everything is the file's fault but what a machine is known to cause.
    """
    if isinstance(error, StageError | MemoryError) or type(error).__name__ in _MACHINE_ERRORS:
        return False
    if isinstance(error, OSError) and error.errno is not None:
        return False
    if isinstance(error, RuntimeError) and any(text in str(error) for text in _MACHINE_TEXTS):
        return False
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def told(error: BaseException) -> str:
    """What a library says, short enough to read."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{'...' if len(text) > 300 else ''}"
