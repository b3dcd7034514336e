"""What a GGUF file says about itself: settings, vocabulary and a table of its tensors, read without their data.

A file from elsewhere may be cut off, or lie about its own lengths. So every length is compared with what is left of the
file before anything is read or kept, and the tensors' places with the size of the file. What is wrong is `config` with
the file's name: no retry mends it. The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import re
import struct
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from stages.config.errors import ConfigError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_ALIGNMENT = 32
_MOST_DIMENSIONS = 4
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
_GIVE_FOLDER = "Give the model's Hugging Face folder or hub id instead."


@dataclass(frozen=True)
class GgufTensor:
    """One line of the table of tensors."""

    name: str
    shape: tuple[int, ...]
    type: int
    """Number of its ggml type."""
    offset: int
    """From the beginning of the data."""

    @property
    def size(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class GgufHeader:
    """All of a GGUF file but the tensors' data."""

    settings: dict[str, Any]
    """Keys as in the file. Of arrays of numbers the tuple, of arrays of strings the tuple as well."""
    tensors: tuple[GgufTensor, ...]
    data_start: int

    @property
    def architecture(self) -> str:
        return str(self.settings["general.architecture"])

    def of_architecture(self, name: str) -> Any:
        """A setting under the architecture's prefix, such as `llama.context_length`; None where it is absent."""
        return self.settings.get(f"{self.architecture}.{name}")

    @property
    def num_parameters(self) -> int:
        """Numbers in all tensors, frequencies of the positions apart, which are none of the weights."""
        return sum(tensor.size for tensor in self.tensors if not tensor.name.startswith("rope_"))

    def types(self) -> dict[str, int]:
        """How many tensors there are of each type, by ggml's names, such as `Q4_1`."""
        from gguf import GGMLQuantizationType

        return dict(Counter(GGMLQuantizationType(tensor.type).name for tensor in self.tensors).most_common())


class _Reader:
    """A position in the file; refuses to go beyond its end."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data, self._path, self.position = data, path, 0

    def take(self, size: int, what: str) -> bytes:
        left = len(self._data) - self.position
        if size > left:
            raise _cut_off(self._path, f"{what} needs {size} bytes at {self.position}, {left} are left")
        self.position += size
        return self._data[self.position - size : self.position]

    def number(self, code: str, what: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}"), what))[0]

    def text(self, what: str) -> str:
        found = self.take(self.number("Q", what), what)
        try:
            return found.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{self._path}: {what} is not UTF-8: {error}", advice=_GIVE_FOLDER) from None

    def value(self, kind: int, what: str) -> Any:
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind], what)
        if kind == _STRING:
            return self.text(what)
        if kind != _ARRAY:
            raise ConfigError(f"{self._path}: {what} has the unknown type {kind}", advice=_GIVE_FOLDER)
        inner, count = self.number("I", what), self.number("Q", what)
        if inner in _NUMBERS:
            code = _NUMBERS[inner]
            return struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(f"<{code}"), what))
        if inner != _STRING:
            raise ConfigError(f"{self._path}: {what} is an array of type {inner}", advice=_GIVE_FOLDER)
        # A string has at least its length, so a count that the file cannot hold ends here after few steps.
        return tuple(self.text(what) for _ in range(count))


def read_header(path: Path) -> GgufHeader:
    """Read and check; raises ConfigError for what is no whole GGUF file of one model."""
    if part := _PART.search(path.name):
        raise ConfigError(
            f"{path} is part {int(part[1])} of {int(part[2])} of a GGUF file",
            advice="Put the parts together (llama.cpp: llama-gguf-split --merge) and give the whole file.",
        )
    try:
        with path.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise ConfigError(
                    f"{path} is no GGUF file: it does not start with {_MAGIC.decode()!r}", advice=_GIVE_FOLDER
                )
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                header = _parsed(_Reader(data, path), path)
                _check_data(header, path, file_size=len(data))
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ConfigError(
            f"{path} is no file: {error.strerror}", advice="Give the address of one .gguf file."
        ) from None
    _check_whole(header, path)
    return header


def _parsed(reader: _Reader, path: Path) -> GgufHeader:
    reader.take(len(_MAGIC), "the magic")
    version = reader.number("I", "the version")
    if version not in _VERSIONS:
        raise ConfigError(
            f"{path} has version {version} of the GGUF format; versions {_VERSIONS} with little-endian numbers can be "
            "read",
            advice="Convert the model again with a current llama.cpp.",
        )
    num_tensors, num_settings = reader.number("Q", "the number of tensors"), reader.number("Q", "the number of keys")
    settings: dict[str, Any] = {}
    for _ in range(num_settings):
        key = reader.text("a key")
        settings[key] = reader.value(reader.number("I", key), key)
    tensors = []
    for _ in range(num_tensors):
        name = reader.text("a tensor's name")
        num_dimensions = reader.number("I", name)
        if num_dimensions > _MOST_DIMENSIONS:
            raise ConfigError(f"{path}: tensor {name!r} has {num_dimensions} dimensions", advice=_GIVE_FOLDER)
        shape = struct.unpack(f"<{num_dimensions}Q", reader.take(8 * num_dimensions, name))
        tensors.append(GgufTensor(name, shape, reader.number("I", name), reader.number("Q", name)))
    alignment = settings.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ConfigError(f"{path}: general.alignment={alignment!r} is no number of bytes", advice=_GIVE_FOLDER)
    return GgufHeader(settings, tuple(tensors), -(-reader.position // alignment) * alignment)


def _check_data(header: GgufHeader, path: Path, *, file_size: int) -> None:
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError as error:
        raise ConfigError(
            f"{path}: GGUF files need the Python package gguf, which is not installed where Ray's processes run",
            advice="Install it there; it is part of the extra `train`.",
        ) from error

    for tensor in header.tensors:
        try:
            block, size = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.type)]
        except (ValueError, KeyError):
            raise ConfigError(
                f"{path}: tensor {tensor.name!r} has the unknown type {tensor.type}", advice=_GIVE_FOLDER
            ) from None
        end = header.data_start + tensor.offset + -(-tensor.size // block) * size
        if end > file_size:
            raise _cut_off(path, f"tensor {tensor.name!r} ends at byte {end}, the file has {file_size}")


def _check_whole(header: GgufHeader, path: Path) -> None:
    kind, parts = header.settings.get("general.type", "model"), header.settings.get("split.count", 0)
    if not isinstance(header.settings.get("general.architecture"), str):
        raise ConfigError(f"{path} names no architecture (general.architecture)", advice=_GIVE_FOLDER)
    if kind != "model":
        raise ConfigError(
            f"{path} holds no language model but general.type={kind!r}",
            advice="Give the file of the model itself; adapters must be merged into it first.",
        )
    if isinstance(parts, int) and parts > 1:
        raise ConfigError(
            f"{path} is one of {parts} parts of a GGUF file (split.count)",
            advice="Put the parts together (llama.cpp: llama-gguf-split --merge) and give the whole file.",
        )
    for key, what in (
        ("tokenizer.ggml.model", "tokenizer"),
        ("tokenizer.ggml.tokens", "vocabulary"),
        ("tokenizer.ggml.eos_token_id", "end token"),
    ):
        if key not in header.settings:
            raise ConfigError(f"{path} holds no {what} ({key} is missing)", advice=_GIVE_FOLDER)


def _cut_off(path: Path, detail: str) -> ConfigError:
    return ConfigError(f"{path} is cut off or damaged: {detail}", advice="Copy or download the file again.")
