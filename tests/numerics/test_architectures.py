"""Models that somebody brings: any architecture that keeps packed documents apart, and a vocabulary that grew."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from stages.config.errors import ConfigError
from stages.config.graph import Stage
from stages.config.request import ArtifactRef
from stages.data.tokens.packing import TokenSequence, lay_out
from stages.data.tokens.views import TokensArtifact
from stages.models.build import load_causal_lm, load_reward_model
from stages.models.forward import next_token_loss_sum, target_logprobs
from stages.models.given_tokenizer import check_growth
from tests.small_world import CONFIGS, make_context

_SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama, grouped queries, untied": {"model_type": "llama", "tie_word_embeddings": False},
    "gpt2, learned positions, other names": {
        "model_type": "gpt2",
        "vocab_size": 300,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "pad_token_id": 2,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
    "qwen3, normalised queries": {"model_type": "qwen3"},
    "gemma3, sliding window, scaled embeddings": {
        "model_type": "gemma3_text",
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 8,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "mamba, a recurrent state": {
        "model_type": "mamba",
        "vocab_size": 300,
        "hidden_size": 32,
        "state_size": 4,
        "num_hidden_layers": 2,
    },
}
REFUSED: dict[str, dict[str, Any]] = {
    "gemma2, capped logits": {"model_type": "gemma2", "query_pre_attn_scalar": 8},
}


@pytest.fixture(scope="module")
def artifact(world: Path, tokens: ArtifactRef) -> TokensArtifact:
    return TokensArtifact(make_context(world, Stage.SFT, CONFIGS[Stage.SFT], {"tokens": tokens}).input_dir("tokens"))


def brought(folder: Path, settings: dict[str, Any]) -> Path:
    """A model folder as somebody else would write it, with weights large enough for contexts to matter."""
    common = {} if settings["model_type"] in ("gpt2", "mamba") else _SIZES
    config = AutoConfig.for_model(**{**common, **settings})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_unpacked_and_the_loss_is_that_of_transformers(
    family: str, artifact: TokensArtifact, tmp_path: Path
):
    folder = brought(tmp_path, FAMILIES[family])
    model = load_causal_lm(folder, artifact).eval()
    rng = np.random.default_rng(1)
    documents = [TokenSequence(rng.integers(6, 200, size=n), np.ones(n, dtype=np.int64)) for n in (5, 17, 3, 30, 9)]
    packed = target_logprobs(model, lay_out(documents)).logprobs_N
    alone = [target_logprobs(model, lay_out([one])).logprobs_N for one in documents]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-3, atol=2e-4)
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.from_numpy(documents[3].ids)[None]
    theirs = plain(input_ids=ids, labels=ids).loss.item()
    assert next_token_loss_sum(model, lay_out([documents[3]])).item() / 29 == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("family", REFUSED)
def test_an_architecture_that_cannot_pack_is_refused_with_the_reason(
    family: str, artifact: TokensArtifact, tmp_path: Path
):
    with pytest.raises(ConfigError, match="cannot be trained on packed documents"):
        load_causal_lm(brought(tmp_path, REFUSED[family]), artifact)


def test_tokens_that_were_added_get_the_mean_of_all_others(
    artifact: TokensArtifact, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """The tokenizer of the small world has 300 entries, the last of which are made added tokens here."""
    folder = brought(tmp_path / "model", {**FAMILIES["llama, grouped queries, untied"], "vocab_size": 300})
    before = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    grown = with_added(artifact, tmp_path / "tokens", ["<|tool|>", "<|think|>"])
    with caplog.at_level("INFO"):
        model = load_causal_lm(folder, grown)
    assert "2 tokens were added to the vocabulary of 300" in caplog.text
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        now = model.state_dict()[name]
        assert now.shape[0] == 302
        assert torch.equal(now[:300], before[name])
        torch.testing.assert_close(now[300:], before[name].mean(0).expand(2, -1))
    assert model.config.vocab_size == 302
    reward = load_reward_model(folder, grown)
    assert reward.get_input_embeddings().weight.shape[0] == 302  # type: ignore[operator, union-attr]


def with_added(artifact: TokensArtifact, folder: Path, added: list[str]) -> TokensArtifact:
    import json
    import shutil

    shutil.copytree(artifact.folder, folder)
    path = folder / "tokenizer" / "tokenizer.json"
    backend = Tokenizer.from_file(str(path))
    backend.add_tokens(added)
    backend.save(str(path))
    meta = artifact.meta | {"vocab_size": backend.get_vocab_size()}
    (folder / "meta.json").write_text(json.dumps(meta))
    return TokensArtifact(folder)


def test_a_tokenizer_whose_own_pieces_have_no_row_is_another_models(artifact: TokensArtifact, tmp_path: Path):
    backend = Tokenizer.from_file(str(artifact.tokenizer_dir / "tokenizer.json"))
    assert check_growth(backend, rows=backend.get_vocab_size()) == 0
    assert check_growth(backend, rows=backend.get_vocab_size() + 64) == 0  # padded embeddings are no reason
    with pytest.raises(ConfigError, match="not a pair"):
        check_growth(backend, rows=backend.get_vocab_size() - 1)
    folder = brought(tmp_path, {**FAMILIES["qwen3, normalised queries"], "vocab_size": 200})
    with pytest.raises(ConfigError, match="the model embeds 200; not a pair"):
        load_causal_lm(folder, artifact)
