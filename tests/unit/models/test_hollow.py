"""What is missing in a hollow model is what will be missing in the whole one, and nothing else."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from stages.config.tokens import TokenizeConfig
from stages.data.tokens.tokenizer import train_tokenizer
from stages.models.build import _load
from stages.models.folder import INDEX
from stages.models.hollow import headers, hollow_model, read_header, write_hollow_file
from tests.unit.models.test_given import save
from tests.unit.models.test_hostile_folder import BROKEN, break_file, refusal, shown

SIZES: dict[str, Any] = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=2)),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=2, tie_word_embeddings=True)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_attention_heads=2, num_local_experts=4)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=16, n_layer=2, n_head=2)),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = TokenizeConfig(vocab_size=300, sequence_length=64)
    made: Tokenizer = train_tokenizer(iter([Path(__file__).read_text() * 4]), config).backend
    return save(tmp_path_factory.mktemp("saved") / "model", made)


@pytest.mark.parametrize("auto_class", [AutoModelForCausalLM, AutoModelForSequenceClassification])
@pytest.mark.parametrize("name", MODELS)
def test_a_hollow_model_is_the_whole_one_without_its_numbers(name: str, auto_class: Any, tmp_path: Path) -> None:
    MODELS[name]().save_pretrained(tmp_path)
    whole, expected = _load(auto_class, tmp_path)
    hollow, loading = hollow_model(auto_class, tmp_path)
    assert type(hollow) is type(whole)
    shapes = {key: value.shape for key, value in whole.named_parameters()}
    assert {key: value.shape for key, value in hollow.named_parameters()} == shapes
    assert loading["missing_keys"] == expected["missing_keys"]
    assert all(weight.is_meta for weight in hollow.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_that_is_left_out_is_missing_in_both(name: str, tmp_path: Path) -> None:
    """Merged weights (experts) and shared ones (embeddings) have rules of their own, which are transformers'."""
    MODELS[name]().save_pretrained(tmp_path)
    whole = read_header(tmp_path / "model.safetensors")
    kept = load_file(tmp_path / "model.safetensors")
    for left_out in whole:
        folder = Path(shutil.copytree(tmp_path, tmp_path.parent / "without", dirs_exist_ok=True))
        from safetensors.torch import save_file

        save_file({key: value for key, value in kept.items() if key != left_out}, folder / "model.safetensors")

        def missing(read: Any, folder: Path = folder) -> set[str] | None:
            found: set[str] = set()
            refused = refusal(lambda path: found.update(read(AutoModelForCausalLM, path)[1]["missing_keys"]), folder)
            return None if refused else found

        assert missing(hollow_model) == missing(_load), left_out


@pytest.mark.parametrize(("name", "content"), BROKEN, ids=shown)
def test_what_loading_refuses_the_hollow_model_refuses(name: str, content: Any, saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "model"))
    break_file(folder / name, content)
    whole = refusal(lambda path: _load(AutoModelForCausalLM, path), folder)
    hollow = refusal(lambda path: hollow_model(AutoModelForCausalLM, path), folder)
    assert (hollow is None) == (whole is None)


def test_a_file_with_a_hole_says_what_the_whole_file_says_and_takes_no_room(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "model"))
    tensors = read_header(folder / "model.safetensors")
    tensors["large"] = {"dtype": "F32", "shape": [1 << 30], "data_offsets": [0, 4 << 30]}
    write_hollow_file(tmp_path / "large.safetensors", {"large": tensors.pop("large")})
    assert (tmp_path / "large.safetensors").stat().st_size > 4 << 30
    assert (tmp_path / "large.safetensors").stat().st_blocks < 100
    before = {name: (weight.shape, weight.dtype) for name, weight in headers(folder).items()}
    write_hollow_file(folder / "model.safetensors", tensors)
    assert {name: (weight.shape, weight.dtype) for name, weight in headers(folder).items()} == before
    assert hollow_model(AutoModelForCausalLM, folder).loading["missing_keys"] == set()


def test_the_files_of_an_index_are_read_together(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    from safetensors.torch import save_file

    parts = {"a.safetensors": sorted(weights)[::2], "b.safetensors": sorted(weights)[1::2]}
    for part, names in parts.items():
        save_file({name: weights[name] for name in names}, folder / part)
    index = {name: part for part, names in parts.items() for name in names}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert set(headers(folder)) == set(weights)
    assert hollow_model(AutoModelForCausalLM, folder).loading["missing_keys"] == set()
    assert torch.float32 in {weight.dtype for weight in headers(folder).values()}
