"""GGUF files: the same model comes out, and what would come out as another is refused with the file's name."""

import hashlib
import json
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from stages.config.errors import ConfigError
from stages.data.tokens.views import TokensArtifact
from stages.models.build import load_causal_lm
from stages.models.gguf import convert_gguf
from stages.models.gguf_header import read_header
from stages.models.given import gguf_file, snapshot_base_model
from tests.gguf_files import SPECIAL, TEMPLATE, small_llama, small_tokenizer, write_gguf
from tests.s3 import S3Server

IDS = torch.tensor([[1, 40, 70, 71, 72, 300, 2, 5]])


@pytest.fixture
def model() -> LlamaForCausalLM:
    return small_llama()


@pytest.fixture
def file(tmp_path: Path, model: LlamaForCausalLM) -> Path:
    return write_gguf(tmp_path / "small.gguf", model)


def tokens_of(folder: Path, scratch: Path) -> TokensArtifact:
    """As far as `load_causal_lm` looks."""
    made: Any = TokensArtifact.__new__(TokensArtifact)
    loaded = AutoTokenizer.from_pretrained(folder)
    made.__dict__ |= {"tokenizer": lambda: loaded.backend_tokenizer, "sequence_length": 64, "pad_id": 2}
    return made


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("quantization", ["Q4_1", "Q8_0", "F16"])
def test_the_converted_model_computes_what_the_file_holds(tied: bool, quantization: str, tmp_path: Path) -> None:
    original = small_llama(tied=tied)
    file = write_gguf(tmp_path / "a.gguf", original, quantization=GGMLQuantizationType[quantization])
    convert_gguf(file, tmp_path / "out", dtype="fp32")
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert made.config.tie_word_embeddings is tied
    assert made.config.rope_parameters == {"rope_type": "default", "rope_theta": 5000.0}
    torch.testing.assert_close(made(IDS).logits, original(IDS).logits, rtol=1e-4, atol=1e-4)


def test_bf16_is_the_same_rounded_and_nothing_says_quantised(file: Path, tmp_path: Path) -> None:
    facts = convert_gguf(file, tmp_path / "bf16")
    convert_gguf(file, tmp_path / "fp32", dtype="fp32")
    short = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", dtype="auto").state_dict()
    for name, weight in AutoModelForCausalLM.from_pretrained(tmp_path / "fp32").state_dict().items():
        assert torch.equal(weight.bfloat16(), short[name]), name
    config = json.loads((tmp_path / "bf16" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config
    assert facts == {
        **facts,
        "name": "Small llama",
        "license": "apache-2.0",
        "architecture": "llama",
        "tensor_types": {"Q8_0": 15, "F32": 5},  # 2 x 7 matrices and the embeddings; 2 x 2 norms and the last
        "parameters": sum(weight.numel() for weight in small_llama().parameters()),
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }


def test_the_tokenizer_and_its_template_are_those_of_the_file(file: Path, tmp_path: Path) -> None:
    convert_gguf(file, tmp_path / "out")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded.chat_template == TEMPLATE
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    assert {token.content for token in loaded.added_tokens_decoder.values() if token.special} == set(SPECIAL)
    text = "In 1984 they'd pay 3.50 for two, and 12345 for all."
    assert loaded(text).input_ids == small_tokenizer().encode(text).ids
    assert loaded.decode(loaded(text).input_ids) == text
    # This vocabulary was learned with digits apart, so no merge shows whether they still are; the cuts do.
    cuts = loaded.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a12")
    assert [piece for piece, _ in cuts] == ["a", "1", "2"]


def test_the_model_packs_and_is_found_by_its_address(file: Path, tmp_path: Path) -> None:
    convert_gguf(gguf_file(file.as_uri(), tmp_path / "cache"), folder := tmp_path / "out")
    assert load_causal_lm(folder, tokens_of(folder, tmp_path))(IDS).logits.isfinite().all()
    assert snapshot_base_model(str(file)) == hashlib.sha256(file.read_bytes()).hexdigest()


def test_what_lies_next_to_the_file_is_not_looked_at(file: Path, tmp_path: Path) -> None:
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "adapter_config.json"):
        (file.parent / name).write_text("{")
    (file.parent / "chat_template.jinja").write_text("another")
    convert_gguf(file, tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == TEMPLATE


def test_the_frequencies_of_llama_3_are_taken_over(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    original = small_llama()
    original.config.rope_parameters = rope
    original = LlamaForCausalLM(original.config).eval()
    plain = 500000.0 ** -(np.arange(0, 16, 2) / 16)
    divisors = (plain / original.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    assert divisors.max() == pytest.approx(8)
    file = write_gguf(tmp_path / "a.gguf", original, more={"rope_freqs.weight": divisors})
    convert_gguf(file, tmp_path / "out", dtype="fp32")
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert made.config.rope_parameters == rope
    torch.testing.assert_close(made(IDS).logits, original(IDS).logits, rtol=1e-4, atol=1e-4)
    odd = write_gguf(tmp_path / "b.gguf", original, more={"rope_freqs.weight": divisors[::-1].copy()})
    with pytest.raises(ConfigError, match=r"b\.gguf scales its positions by rope_freqs in a way"):
        convert_gguf(odd, tmp_path / "odd")


def test_a_file_that_is_no_gguf_or_cut_off_is_refused(file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"PK\3\4" + whole[4:])
    with pytest.raises(ConfigError, match=r"bad\.gguf is no GGUF file"):
        read_header(bad)
    for size in (4, 10, 24, 100, 4000, len(whole) // 2, len(whole) - 1):
        bad.write_bytes(whole[:size])
        with pytest.raises(ConfigError, match=r"bad\.gguf is cut off or damaged"):
            snapshot_base_model(str(bad))
    # one more than the file holds: a count that would fill the memory
    bad.write_bytes(whole[:8] + struct.pack("<QQ", 2**40, 2**40) + whole[24:])
    with pytest.raises(ConfigError, match=r"bad\.gguf"):
        read_header(bad)
    bad.write_bytes(whole[:4] + struct.pack(">I", 3) + whole[8:])
    with pytest.raises(ConfigError, match="version 50331648 of the GGUF format"):
        read_header(bad)
    bad.write_bytes(b"")
    with pytest.raises(ConfigError, match=r"bad\.gguf is no GGUF file"):
        read_header(bad)


def test_a_cluster_without_the_library_is_told_what_to_install(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)  # as if it were not installed
    with pytest.raises(ConfigError, match="need the Python package gguf, which is not installed"):
        snapshot_base_model(str(file))


def of(writer: GGUFWriter, name: str, value: float | str | int) -> None:
    add = {float: writer.add_float32, str: writer.add_string, int: writer.add_uint32}[type(value)]
    add(name, value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        ({"architecture": "imaginary"}, "transformers cannot read architecture 'imaginary' from a GGUF file"),
        ({"without": ("tokenizer",)}, r"holds no tokenizer \(tokenizer.ggml.model is missing\)"),
        ({"without": ("eos",)}, r"holds no end token \(tokenizer.ggml.eos_token_id is missing\)"),
        ({"without": ("blk.1.ffn_up.weight",)}, "lacks weights: model.layers.1.mlp.up_proj.weight"),
        ({"more": {"blk.0.extra.weight": np.ones(4, np.float32)}}, "transformers does not read this variant"),
        ({"settings": lambda w: of(w, "llama.rope.scaling.type", "yarn")}, "scales its positions"),
        ({"settings": lambda w: of(w, "llama.logit_scale", 8.0)}, "sets llama.logit_scale"),
        ({"settings": lambda w: of(w, "llama.expert_count", 8)}, "no experts"),
        ({"settings": lambda w: of(w, "split.count", 3)}, "is one of 3 parts of a GGUF file"),
    ],
)
def test_what_would_become_another_model_is_refused(
    options: dict[str, Any], refusal: str, model: LlamaForCausalLM, tmp_path: Path
) -> None:
    file = write_gguf(tmp_path / "odd.gguf", model, **options)
    with pytest.raises(ConfigError, match=refusal) as refused:
        convert_gguf(file, tmp_path / "out")
    assert "odd.gguf" in str(refused.value)
    assert refused.value.advice
    assert not (tmp_path / "out").exists()


def test_words_that_are_cut_in_an_unknown_way_are_refused(file: Path, tmp_path: Path) -> None:
    data = file.read_bytes().replace(b"\x06\0\0\0\0\0\0\0smollm", b"\x06\0\0\0\0\0\0\0unheard"[:14])
    (tmp_path / "odd.gguf").write_bytes(data)
    with pytest.raises(ConfigError, match=r"cut into words as 'unhear' \(tokenizer.ggml.pre\)"):
        convert_gguf(tmp_path / "odd.gguf", tmp_path / "out")


def test_a_part_of_a_file_says_how_to_put_it_together(file: Path) -> None:
    part = file.rename(file.with_name("big-00002-of-00003.gguf"))
    with pytest.raises(ConfigError, match="part 2 of 3") as refused:
        snapshot_base_model(str(part))
    assert "llama-gguf-split --merge" in refused.value.advice


@pytest.mark.parametrize("uri", ["/nowhere/a.gguf", "file:///nowhere/a.gguf", "./nowhere.gguf"])
def test_a_file_that_is_not_there_is_named(uri: str, tmp_path: Path) -> None:
    for read in (snapshot_base_model, lambda address: gguf_file(address, tmp_path)):
        with pytest.raises(ConfigError, match=r"base_model='.*gguf' does not exist"):
            read(uri)


def test_a_file_of_an_installed_package_is_found_without_importing_it(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "some_model"
    (package / "files").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    file.rename(package / "files" / "a.gguf")
    monkeypatch.syspath_prepend(package.parent)
    address = "package://some_model/files/a.gguf"
    assert gguf_file(address, tmp_path) == package / "files" / "a.gguf"
    assert len(snapshot_base_model(address)) == 64
    with pytest.raises(ConfigError, match=r"its GGUF files: files/a\.gguf"):
        snapshot_base_model("package://some_model/b.gguf")
    with pytest.raises(ConfigError, match="no Python package 'no_such_model' is installed"):
        snapshot_base_model("package://no_such_model/a.gguf")
    for wrong in ("package://some_model/../a.gguf", "package:///a.gguf", "package://some.model/a.gguf"):
        with pytest.raises(ConfigError, match="names no GGUF file of an installed Python package"):
            snapshot_base_model(wrong)


@pytest.mark.integration
def test_a_file_in_a_bucket_is_downloaded_once_and_told_apart_by_content(
    file: Path, tmp_path: Path, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages.artifacts.addresses import open_store

    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    bucket = s3_server.new_bucket()
    store, address = open_store(f"s3://{bucket}/models"), f"s3://{bucket}/models/small.gguf"
    store.upload(file, "small.gguf")
    before = snapshot_base_model(address)
    local = gguf_file(address, tmp_path / "cache")
    assert local.read_bytes() == file.read_bytes()
    assert gguf_file(address, tmp_path / "cache") == local
    store.write_bytes("small.gguf", b"GGUF")
    assert snapshot_base_model(address) != before
    assert gguf_file(address, tmp_path / "cache").read_bytes() == b"GGUF"
    for absent in ("smal.gguf", "other.gguf"):
        with pytest.raises(ConfigError, match=rf"base_model '.*{absent}' holds no object"):
            snapshot_base_model(f"s3://{bucket}/models/{absent}")


@pytest.mark.parametrize("address", ["org/model/files/a.gguf", "hf://org/model/files/a.gguf"])
def test_a_file_on_the_hub_is_named_by_repository_and_path(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Found:
        sha = "abc"
        siblings = (type("Sibling", (), {"rfilename": "files/a.gguf"}),)

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda self, repository: asked.append(repository) or Found)
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download", lambda *names, revision: asked.append((names, revision)) or "/a.gguf"
    )
    assert snapshot_base_model(address) == "abc"
    assert gguf_file(address, Path("/nowhere"), revision="abc") == Path("/a.gguf")
    assert asked == ["org/model", (("org/model", "files/a.gguf"), "abc")]
    with pytest.raises(ConfigError, match=r"GGUF files there: files/a\.gguf"):
        snapshot_base_model("hf://org/model/b.gguf")
