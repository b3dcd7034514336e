"""A model's folder in which one file is damaged or hostile: loaded, or refused with the file's name."""

import json
import shutil
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from stages.config.errors import StageError
from stages.config.tokens import TokenizeConfig
from stages.data.tokens.tokenizer import train_tokenizer
from stages.models.build import load_causal_lm
from stages.models.given import base_model_dir, snapshot_base_model
from stages.models.given_tokenizer import given_tokenizer
from tests.fuzz.cases import cases, confined, damaged_bytes, damaged_records, outcome
from tests.unit.models.test_given import save, tokens_of

_NAMES = ("config.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json", "chat_template.jinja")
_TEMPLATE = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}{% endfor %}"
_HOSTILE_TEMPLATES = (
    "{% for x in range(10**12) %}a{% endfor %}",
    "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "{{ 'a' * 10**10 }}",
    "{% include '/etc/passwd' %}",
    "{{ raise_exception('no') }}",
    "{% for",
    "{{ undefined.field }}",
    "{{ 1 / 0 }}",
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    config = TokenizeConfig(vocab_size=300, sequence_length=64)
    return train_tokenizer(iter([Path(__file__).read_text()]), config).backend


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def _written(folder: Path, files: dict[str, bytes]) -> Path:
    """Make the folder with these files and no others."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def _hostile_file(files: dict[str, bytes]) -> st.SearchStrategy[tuple[str, bytes]]:
    def damaged(name: str) -> st.SearchStrategy[tuple[str, bytes]]:
        if name.endswith(".jinja"):
            text = st.one_of(st.sampled_from(_HOSTILE_TEMPLATES).map(str.encode), damaged_bytes(files[name]))
        else:
            text = damaged_records(json.loads(files[name]))
        return text.map(lambda data: (name, data))

    return st.sampled_from([name for name in _NAMES if name in files]).flatmap(damaged)


def test_any_tokenizer_of_a_folder_is_loaded_or_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    inside = tmp_path / "inside"
    files = _files(save(inside / "original", tokenizer, template=_TEMPLATE))

    @cases
    @given(_hostile_file(files))
    def check(hostile: tuple[str, bytes]) -> None:
        folder = _written(inside / "model", {**files, hostile[0]: hostile[1]})
        with confined(inside):
            outcome(lambda: snapshot_base_model(str(folder)))
            loaded = outcome(lambda: given_tokenizer(base_model_dir(str(folder), inside / "cache")))
            if not isinstance(loaded, StageError):
                outcome(lambda: loaded.encode_texts(["A text with <|end|> in it."]))

    check()


@st.composite
def _damaged_weights(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes of a safetensors file with another header length, a damaged header or damaged content."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    match draw(st.sampled_from(["length", "header", "bytes"])):
        case "length":
            return struct.pack("<Q", draw(st.sampled_from([0, 1, 2**40, 2**63]))) + data[8:]
        case "header":
            new = draw(damaged_records(header))
            return struct.pack("<Q", len(new)) + new + body
        case _:
            return draw(damaged_bytes(data[: 8 + length])) + body


def test_any_weights_are_loaded_or_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    inside = tmp_path / "inside"
    original = save(inside / "original", tokenizer)
    files = _files(original)
    tokens = tokens_of(given_tokenizer(original), inside / "tokens")
    index = {"metadata": {"total_size": 1}, "weight_map": {"model.embed_tokens.weight": "model.safetensors"}}
    files_to_damage = st.one_of(
        _damaged_weights(files["model.safetensors"]).map(lambda data: ("model.safetensors", data)),
        damaged_records(json.loads(files["config.json"])).map(lambda data: ("config.json", data)),
        damaged_records(index).map(lambda data: ("model.safetensors.index.json", data)),
    )

    @cases
    @given(files_to_damage)
    def check(hostile: tuple[str, bytes]) -> None:
        folder = _written(inside / "model", {**files, hostile[0]: hostile[1]})
        with confined(inside):
            outcome(lambda: load_causal_lm(base_model_dir(str(folder), inside / "cache"), tokens))

    check()
