"""A given model without its numbers: the architecture on torch's meta device, filled with what the files say they hold.

transformers itself compares names and shapes, with its own rules for renamed, merged and shared weights, because it is
given tensors without data where it would read the files. So a weight is missing here exactly when it will be missing
there. Nothing is read but headers, and nothing takes memory.
"""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig
from transformers.modeling_utils import PreTrainedModel, load_state_dict

from stages.models.build import telling_what_is_malformed
from stages.models.folder import INDEX, check_folder, read_settings
from stages.models.foreign_code import may_run_code

_WEIGHTS = "model.safetensors"


class Hollow(NamedTuple):
    """A model on the meta device, and what transformers said about its weights."""

    model: PreTrainedModel
    loading: dict[str, Any]


def hollow_model(auto_class: Any, folder: Path, *, with_weights: bool = True, **options: Any) -> Hollow:
    """Make what `from_pretrained` would make of a checked folder; raises ConfigError as loading it would.

    Without weights, where there are no headers to compare with, only the architecture counts.
    """
    check_folder(folder)
    with telling_what_is_malformed(folder, auto_class):
        config = AutoConfig.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=may_run_code(folder), **options
        )
        with torch.device("meta"):
            made = auto_class.from_config(config, trust_remote_code=may_run_code(folder))
        if not with_weights:
            return Hollow(made, {"missing_keys": set()})
        model, loading = type(made).from_pretrained(
            None,
            config=config,
            state_dict=headers(folder),
            device_map={"": "meta"},
            dtype=torch.float32,
            output_loading_info=True,
            trust_remote_code=False,  # the class is known already
        )
        if model.can_generate():
            with contextlib.suppress(OSError):  # there need not be such a file
                GenerationConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return Hollow(model, loading)


def headers(folder: Path) -> dict[str, Tensor]:
    """The weights of a folder's files by name, without data; of the files that transformers would read."""
    found: dict[str, Tensor] = {}
    for path in weight_files(folder):
        found |= load_state_dict(path, map_location="meta")
    return found


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers would read; raises ValueError when there are none of their names."""
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    if not (folder / INDEX).is_file():
        raise ValueError(f"neither {_WEIGHTS} nor {INDEX} is there")
    return [folder / name for name in sorted(set(read_settings(folder / INDEX)["weight_map"].values()))]


def write_hollow_file(path: Path, tensors: Mapping[str, Mapping[str, Any]]) -> None:
    """Write a safetensors file with this header and a hole where the numbers would be, which takes no room.

    `tensors` has `dtype`, `shape` and `data_offsets` by name, as such files spell them.
    """
    text = json.dumps({"__metadata__": {"format": "pt"}, **tensors}).encode()
    text += b" " * (-len(text) % 8)
    end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def read_header(path: Path) -> dict[str, Any]:
    """The tensors in the header of a safetensors file, as `write_hollow_file` takes them."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        found = json.loads(file.read(min(size, _LONGEST_HEADER)))
    return {name: entry for name, entry in found.items() if name != "__metadata__"}


_LONGEST_HEADER = 100 << 20
"""What safetensors itself allows."""
