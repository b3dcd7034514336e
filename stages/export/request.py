"""What a person asks an export for, checked before anything is read."""

import os
import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from stages.config.errors import ConfigError
from stages.config.places import local_path
from stages.config.text import CONTROLS

GGUF_TYPES = ("f32", "f16", "bf16", "q8_0", "auto")
"""What llama.cpp's converter writes by itself; all other quantisations are made from these by its `llama-quantize`."""
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]*")


class Dtype(StrEnum):
    """Of the exported weights."""

    STORED = "stored"
    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


@dataclass(frozen=True)
class ExportRequest:
    """One export. Raises ConfigError for parts that do not go together."""

    address: str
    """`models:/name@alias`, `models:/name/version`, or the URI or local folder of an artifact."""
    to: Path | None = None
    """Folder that is made; None when it is only pushed."""
    adapter: bool = False
    """The LoRA adapter alone, instead of the model with the adapter merged into it."""
    dtype: Dtype = Dtype.STORED
    gguf: str = ""
    """One of GGUF_TYPES; empty = no GGUF file."""
    converter: str = ""
    """llama.cpp's checkout or its convert_hf_to_gguf.py; empty = the environment's LLAMA_CPP, or PATH."""
    push: str = ""
    """`org/name` on the hub."""
    public: bool = False
    """Whether a repository that is made now is readable by everyone."""
    base: str = ""
    """Where whoever uses the adapter finds its base model: hub id or folder; empty = where training found it."""
    licence: str = ""
    """Licence id for the card; empty = unknown."""
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.to is None and not self.push:
            raise ConfigError(
                f"{self.address!r} is to be exported nowhere", advice="Give --to FOLDER, --push ORG/NAME, or both."
            )
        if self.to is not None and re.search(f"[{CONTROLS}]", str(self.to)):
            raise ConfigError(f"--to={str(self.to)!r} holds control characters", advice="Name another folder.")
        if self.gguf and self.gguf not in GGUF_TYPES:
            raise ConfigError(
                f"--gguf={self.gguf!r} is no type that llama.cpp's converter writes; allowed: {', '.join(GGUF_TYPES)}",
                advice="For another quantisation export with --gguf bf16, then run llama.cpp's "
                "`llama-quantize model.gguf out.gguf Q4_K_M`.",
            )
        if self.gguf and self.adapter:
            raise ConfigError(
                f"--gguf={self.gguf} goes with whole models, and --adapter asks for the adapter alone",
                advice="Leave out --adapter, or convert the exported adapter with llama.cpp's convert_lora_to_gguf.py.",
            )
        if self.base and not self.adapter:
            raise ConfigError(
                f"--base={self.base!r} says where an adapter finds its base model, and a whole model needs none",
                advice="Leave out --base, or add --adapter.",
            )
        if self.push and not _REPOSITORY.fullmatch(self.push):
            raise ConfigError(
                f"--push={self.push!r} is no repository of a hub; allowed: ORG/NAME of letters, digits, '.', '_', '-'",
                advice="Name the repository as in its address, such as --push my-team/my-model.",
            )
        if self.public and not self.push:
            raise ConfigError("--public is about a repository of the hub", advice="Add --push ORG/NAME.")
        if self.licence and not _LICENCE.fullmatch(self.licence):
            raise ConfigError(
                f"--license={self.licence!r} is no licence id; allowed: small letters, digits, '.' and '-'",
                advice="Use an id of https://huggingface.co/docs/hub/repositories-licenses, such as apache-2.0.",
            )

    @property
    def base_folder(self) -> Path | None:
        """The folder that `base` names, if it is one of this machine."""
        if not self.base:
            return None
        folder = local_path(self.base, field="--base")
        return folder.absolute() if folder.is_dir() else None


def is_hub_id(name: str) -> bool:
    """Whether this is the id of a model of the hub, and no address or folder of this machine."""
    return bool(_REPOSITORY.fullmatch(name)) and not os.path.exists(name)
