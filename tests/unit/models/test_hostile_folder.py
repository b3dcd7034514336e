"""Whatever a model's folder says, only the files of its digest are opened; a broken one is `config` by name."""

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from stages.artifacts.manifests import canonical_json, hash_file
from stages.config.errors import ConfigError, DataError
from stages.config.tokens import TokenizeConfig
from stages.data.tokens.tokenizer import train_tokenizer
from stages.data.tokens.views import TokensArtifact
from stages.models.build import _load
from stages.models.given import base_model_dir, snapshot_base_model
from stages.models.given_tokenizer import given_tokenizer
from tests.unit.models.test_given import save, tokens_of

Change = Callable[[Path], None]
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    config = TokenizeConfig(vocab_size=300, sequence_length=64)
    return train_tokenizer(iter([str(TokenizeConfig.__doc__) + Path(__file__).read_text()]), config).backend


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    return save(tmp_path_factory.mktemp("saved") / "model", tokenizer)


@pytest.fixture
def folder(tmp_path: Path, saved: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "model")


def load_model(folder: Path) -> None:
    _load(AutoModelForCausalLM, folder)


def change(folder: Path, name: str, **values: Any) -> None:
    """Set keys of one of the folder's JSON files."""
    content = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    (folder / name).write_text(json.dumps({**content, **values}))


def with_pickle(folder: Path) -> None:
    torch.save({"model.norm.weight": torch.ones(16)}, folder / "adapter_model.bin")
    change(folder, "config.json", transformers_weights="adapter_model.bin")


def with_weights_below(folder: Path) -> None:
    (folder / "below").mkdir()
    (folder / "model.safetensors").rename(folder / "below" / "other.safetensors")
    save_file({"x": torch.ones(1)}, folder / "decoy.safetensors")
    change(folder, "config.json", transformers_weights="below/other.safetensors")


def with_another_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    save_file({"x": torch.ones(1)}, folder / "decoy.safetensors")
    names = load_file(folder.parent / "elsewhere.safetensors")
    change(
        folder, "own.safetensors.index.json", metadata={}, weight_map=dict.fromkeys(names, "../elsewhere.safetensors")
    )
    change(folder, "config.json", transformers_weights="own.safetensors.index.json")


def with_nested_weights(folder: Path) -> None:
    change(folder, "config.json", text_config={"transformers_weights": "below/other.safetensors"})


def with_an_index_that_leads_out(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    save_file({"x": torch.ones(1)}, folder / "decoy.safetensors")
    names = load_file(folder.parent / "elsewhere.safetensors")
    change(folder, INDEX, metadata={}, weight_map=dict.fromkeys(names, "../elsewhere.safetensors"))


def with_an_index_of_absent_files(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    change(folder, INDEX, metadata={}, weight_map={"model.norm.weight": "absent.safetensors"})


def with_an_index_of_numbers(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    change(folder, INDEX, metadata={}, weight_map={"model.norm.weight": 7})


def with_an_index_without_a_map(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    change(folder, INDEX, metadata={})


def with_an_adapter_of_another_model(folder: Path) -> None:
    change(folder, "adapter_config.json", base_model_name_or_path="/somewhere/else", peft_type="LORA")


def with_a_distributed_checkpoint(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "shard-00000-model-00001-of-00001.safetensors")


def with_a_kernel_of_the_hub(folder: Path) -> None:
    change(folder, "config.json", attn_implementation="some-org/some-kernel")


def with_a_nested_kernel_of_the_hub(folder: Path) -> None:
    change(folder, "config.json", _attn_implementation={"": "some-org/some-kernel"})


def with_a_configuration_elsewhere(folder: Path) -> None:
    change(folder, "config.json", configuration_files=["config.4.0.0/../../../x.json"])


def with_weights_linked_from_elsewhere(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to(folder.parent / "elsewhere.safetensors")


def with_a_secret_as_template(folder: Path) -> None:
    (folder.parent / "secret").write_text("{{ 'password' }}")
    (folder / "chat_template.jinja").symlink_to(folder.parent / "secret")


def with_a_broken_link(folder: Path) -> None:
    (folder / "vocab.txt").symlink_to(folder / "nowhere")


def with_a_fifo(folder: Path) -> None:
    os.mkfifo(folder / "merges.txt")


REFUSED = [
    with_pickle,
    with_weights_below,
    with_another_index,
    with_nested_weights,
    with_an_index_that_leads_out,
    with_an_index_of_absent_files,
    with_an_index_of_numbers,
    with_an_index_without_a_map,
    with_an_adapter_of_another_model,
    with_a_distributed_checkpoint,
    with_a_kernel_of_the_hub,
    with_a_nested_kernel_of_the_hub,
    with_a_configuration_elsewhere,
    with_weights_linked_from_elsewhere,
    with_a_secret_as_template,
    with_a_broken_link,
    with_a_fifo,
]


@pytest.mark.parametrize("hostile", REFUSED)
@pytest.mark.timeout(60)
def test_nothing_but_the_files_of_the_digest_is_opened(hostile: Change, folder: Path) -> None:
    hostile(folder)
    for read in (load_model, given_tokenizer, snapshot_base_model, lambda path: base_model_dir(str(path), path)):
        with pytest.raises(ConfigError, match=str(folder)):
            read(folder if read in (load_model, given_tokenizer) else str(folder))  # type: ignore[arg-type]


def test_the_hubs_cache_with_its_links_is_a_folder_of_its_own(folder: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--org--name/snapshots/abc", tmp_path / "models--org--name/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(folder.iterdir()):
        path.rename(blobs / f"blob{number}")
        (snapshot / path.name).symlink_to(f"../../blobs/blob{number}")
    load_model(snapshot)
    given_tokenizer(snapshot)
    assert snapshot_base_model(str(snapshot))


@pytest.mark.parametrize("name", ["with a space", "100%", "a%20b", "'quoted\"", "café"])
def test_a_models_folder_may_have_any_name(name: str, folder: Path) -> None:
    folder = folder.rename(folder.parent / name)
    for uri in (str(folder), folder.as_uri()):
        assert base_model_dir(uri, folder.parent) == folder
        assert snapshot_base_model(uri) == snapshot_base_model(str(folder))


def test_templates_below_the_folder_are_not_read_because_the_digest_does_not_cover_them(folder: Path) -> None:
    before = given_tokenizer(folder).chat_template
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "default.jinja").write_text("{{ messages }}")
    assert given_tokenizer(folder).chat_template == before


@pytest.mark.parametrize("key", ["vocab_file", "tokenizer_file", "special_tokens_map_file", "merges_file", "gguf_file"])
def test_a_tokenizers_settings_name_no_file_elsewhere(key: str, folder: Path, tmp_path: Path) -> None:
    """Files under such keys are where the tokenizer was made; transformers itself looks for them in the folder."""
    before = given_tokenizer(folder).backend.to_str()
    os.mkfifo(tmp_path / "opened")  # whoever opened it would wait for ever
    change(folder, "tokenizer_config.json", **{key: str(tmp_path / "opened")})
    assert given_tokenizer(folder).backend.to_str() == before


def header(size: int) -> bytes:
    return struct.pack("<Q", size) + b"{}"


def of_another_shape(path: Path) -> None:
    weights = load_file(path)
    weights["model.norm.weight"] = torch.ones(3, 5)
    save_file(weights, path, metadata={"format": "pt"})


BROKEN: list[tuple[str, Any]] = [
    ("config.json", "{"),
    ("config.json", "[]"),
    ("config.json", "null"),
    ("config.json", '{"a":' * 100_000),
    ("config.json", "[" * 100_000 + "]" * 100_000),
    ("config.json", '{"model_type": "llama", "hidden_size": %s}' % ("9" * 5000)),
    ("config.json", b"\xff\xfe\x00"),
    ("config.json", {"model_type": 7}),
    ("config.json", {"model_type": "no-such-architecture"}),
    ("config.json", {"auto_map": 7, "model_type": "no-such"}),
    ("config.json", {"hidden_size": "many"}),
    ("config.json", {"num_attention_heads": 0}),
    ("config.json", {"vocab_size": "many"}),
    ("config.json", {"vocab_size": -1}),
    ("config.json", {"dtype": "load"}),
    ("config.json", {"dtype": "no_such_dtype"}),
    ("config.json", {"quantization_config": {"quant_method": "gptq", "bits": 4}}),
    ("config.json", {"quantization_config": 7}),
    ("config.json", {"rope_parameters": "none"}),
    ("config.json", {"hidden_act": "no_such_function"}),
    ("config.json", {"hidden_size": 1 << 40}),
    ("config.json", {"num_hidden_layers": "x"}),
    (INDEX, "{"),
    (INDEX, "[]"),
    (INDEX, '{"weight_map": []}'),
    ("generation_config.json", "{"),
    ("generation_config.json", "[]"),
    ("generation_config.json", {"eos_token_id": "x"}),
    ("model.safetensors", b""),
    ("model.safetensors", b"garbage, and more garbage"),
    ("model.safetensors", header(100 << 30)),
    ("model.safetensors", of_another_shape),
]
HARMLESS = ("generation_config.json", "dtype")
"""What has no say in what is loaded."""


def break_file(path: Path, content: Any) -> None:
    match content:
        case str():
            path.write_text(content)
        case bytes():
            path.write_bytes(content)
        case dict():
            change(path.parent, path.name, **content)
        case _:
            content(path)


def refusal(read: Callable[[Path], object], folder: Path) -> ConfigError | None:
    """The ConfigError that reading ends with, if any; another exception fails the test."""
    try:
        read(folder)
    except ConfigError as error:
        return error
    return None


def shown(value: object) -> str:
    return getattr(value, "__name__", str(value))[:40]


@pytest.mark.parametrize(("name", "content"), BROKEN, ids=shown)
@pytest.mark.timeout(60)
def test_a_broken_file_of_a_model_is_config_with_its_name(name: str, content: Any, folder: Path) -> None:
    break_file(folder / name, content)
    refused = refusal(load_model, folder)
    assert refused or name in HARMLESS or any(word in str(content) for word in HARMLESS)
    if refused:
        assert str(folder) in refused.message
        assert refused.advice


BROKEN_TOKENIZERS: list[tuple[str, Any]] = [
    ("tokenizer.json", "{"),
    ("tokenizer.json", "[]"),
    ("tokenizer.json", "[" * 100_000),
    ("tokenizer.json", b"\xff\xfe\x00"),
    ("tokenizer.json", b"{}"),
    ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}),
    ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["x y"]}}),
    ("tokenizer.json", {"model": {"type": "WordLevel", "vocab": {"a": 1 << 31}, "unk_token": "?"}}),
    ("tokenizer.json", {"added_tokens": 7}),
    ("tokenizer.json", {"added_tokens": [{"id": "x"}]}),
    ("tokenizer.json", {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated"}}),
    ("tokenizer.json", {"model": None}),
    ("tokenizer_config.json", "{"),
    ("tokenizer_config.json", "[]"),
    ("tokenizer_config.json", '{"a":' * 100_000),
    ("tokenizer_config.json", {"model_max_length": "long"}),
    ("tokenizer_config.json", {"model_max_length": None}),
    ("tokenizer_config.json", {"eos_token": 7}),
    ("tokenizer_config.json", {"eos_token": {"content": 7}}),
    ("tokenizer_config.json", {"eos_token": ""}),
    ("tokenizer_config.json", {"tokenizer_class": 7}),
    ("tokenizer_config.json", {"auto_map": 7}),
    ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["own.Own", None]}}),
    ("tokenizer_config.json", {"added_tokens_decoder": {"x": {}}}),
    ("tokenizer_config.json", {"init_inputs": [1, 2, 3]}),
    ("tokenizer_config.json", {"chat_template": 7}),
    ("tokenizer_config.json", {"chat_template": [{"name": 1}]}),
    ("special_tokens_map.json", "{"),
    ("special_tokens_map.json", "[]"),
    ("added_tokens.json", "{"),
    ("config.json", "{"),
    ("config.json", {"vocab_size": "many"}),
    ("config.json", {"tokenizer_class": 7}),
]
HARMLESS_TO_TOKENIZERS: list[tuple[str, Any]] = [
    ("tokenizer_config.json", {"model_max_length": None}),
    ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["own.Own", None]}}),
    ("tokenizer_config.json", {"init_inputs": [1, 2, 3]}),
    ("config.json", {"tokenizer_class": 7}),  # asked only where tokenizer_config.json names no class
]


@pytest.mark.parametrize(("name", "content"), BROKEN_TOKENIZERS, ids=shown)
@pytest.mark.timeout(60)
def test_a_broken_file_of_a_tokenizer_is_config_with_its_name(name: str, content: Any, folder: Path) -> None:
    break_file(folder / name, content)
    refused = refusal(lambda path: given_tokenizer(path, chat_template="plain").chat().check(), folder)
    assert refused or (name, content) in HARMLESS_TO_TOKENIZERS
    if refused:
        assert "athanor-tokenizer-" not in refused.message  # where it was staged says nothing to anybody
        assert refused.advice
        assert name in refused.message or not isinstance(content, str)


def test_the_digest_of_a_folder_is_over_its_files_and_moves_where_earlier_versions_read_them_wrongly(
    folder: Path,
) -> None:
    """Otherwise tokens that were cut, or stored in too few bits, would be found again under the same fingerprint."""

    def of_files() -> str:
        files = [(path.name, hash_file(path)) for path in sorted(folder.iterdir())]
        return hashlib.sha256(canonical_json(files)).hexdigest()

    assert snapshot_base_model(str(folder)) == of_files()
    limit = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
    change(folder, "tokenizer.json", truncation=limit)
    assert snapshot_base_model(str(folder)) != of_files()
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    change(folder, "tokenizer.json", truncation=None, model={**model, "vocab": {**model["vocab"], "W": 70_000}})
    assert snapshot_base_model(str(folder)) != of_files()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("meta.json", "{"),
        ("meta.json", "[" * 100_000),
        ("meta.json", "[]"),
        ("meta.json", '{"sequence_length": 64}'),
        ("meta.json", '{"sequence_length": 64, "vocab_size": "x", "pad_id": 0, "eos_id": 0, "bos_id": 0}'),
        ("tokenizer/tokenizer.json", "{"),
        ("tokenizer/tokenizer.json", "[]"),
    ],
    ids=shown,
)
def test_a_broken_file_of_a_tokens_artifact_is_data_with_its_name(
    name: str, content: str, folder: Path, tmp_path: Path
) -> None:
    tokens_of(given_tokenizer(folder), tmp_path / "tokens")
    (tmp_path / "tokens" / name).write_text(content)
    with pytest.raises(DataError, match=name):
        TokensArtifact(tmp_path / "tokens").tokenizer()
