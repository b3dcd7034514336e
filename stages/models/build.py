"""Models come from transformers: made from a config, loaded from a folder, saved so that anybody can load them.

Importing transformers' model classes costs seconds, so this module is imported by the verbs that need it, when they do.
"""

import shutil
from collections.abc import Set
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.modeling_utils import PreTrainedModel

from stages.config.errors import ConfigError
from stages.config.train import ModelConfig
from stages.data.tokens import TokensArtifact
from stages.models.attention import attend_within_documents


def new_causal_lm(config: ModelConfig, tokens: TokensArtifact, *, seed: int) -> PreTrainedModel:
    """Make a Llama-style decoder with random weights that depend on `seed` alone."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokens.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            max_position_embeddings=tokens.sequence_length,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tie_embeddings,
            initializer_range=config.initializer_range,
            bos_token_id=tokens.bos_id if tokens.bos_id >= 0 else None,
            eos_token_id=tokens.eos_id,
            pad_token_id=tokens.pad_id,
        )
    )
    attend_within_documents(model)
    return model


def load_causal_lm(folder: Path, tokens: TokensArtifact) -> PreTrainedModel:
    """Load weights in float32; raises ConfigError when the model does not fit the run's tokens."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
    )
    model, loading = loaded
    _check_complete(loading, folder)
    _check_fit(model, tokens, folder)
    model.config.pad_token_id = tokens.pad_id
    attend_within_documents(model)
    return model


def load_reward_model(folder: Path, tokens: TokensArtifact) -> PreTrainedModel:
    """Load a sequence classifier with one output; a language model's folder gives a head of zeros, so training starts
    at ln 2."""
    fresh = "ForSequenceClassification" not in (folder / "config.json").read_text()
    loaded: Any = AutoModelForSequenceClassification.from_pretrained(
        folder,
        num_labels=1,
        dtype=torch.float32,
        attn_implementation="sdpa",
        pad_token_id=tokens.pad_id,
        output_loading_info=True,
    )
    model, loading = loaded
    _check_complete(loading, folder, new={"score.weight"} if fresh else set())
    _check_fit(model, tokens, folder)
    if not isinstance(getattr(model, "score", None), torch.nn.Linear):
        raise ConfigError(
            f"reward: {type(model).__name__} has no linear `score` head",
            advice="Use a decoder architecture whose sequence classifier transformers builds with `score`.",
        )
    if fresh:
        torch.nn.init.zeros_(model.score.weight)
    attend_within_documents(model)
    return model


def save_model(model: PreTrainedModel, weights: dict[str, Tensor], folder: Path, tokens: TokensArtifact) -> None:
    """Write weights as safetensors with config, generation config and tokenizer beside them.

    Not `save_pretrained`: it imports accelerate and whatever accelerate finds (DeepSpeed), which costs seconds a stage.
    """
    tied = model.all_tied_weights_keys or {}
    save_torch_state_dict(
        {name: weight for name, weight in weights.items() if name not in tied}, folder, metadata={"format": "pt"}
    )
    model.config.architectures = [type(model).__name__]
    model.config.dtype = torch.float32
    model.config.save_pretrained(folder)
    if model.can_generate():
        generation = GenerationConfig(
            bos_token_id=tokens.bos_id if tokens.bos_id >= 0 else None,
            eos_token_id=tokens.eos_id,
            pad_token_id=tokens.pad_id,
        )
        generation.save_pretrained(folder)
    shutil.copytree(tokens.tokenizer_dir, folder, dirs_exist_ok=True)


def _check_complete(loading: dict[str, Any], folder: Path, *, new: Set[str] = frozenset()) -> None:
    """transformers fills missing weights with random numbers and goes on; we do not."""
    if missing := set(loading["missing_keys"]) - new:
        raise ConfigError(
            f"model {folder} lacks weights: {', '.join(sorted(missing)[:5])}",
            advice="Export the model again, with all its parameters.",
        )


def _check_fit(model: PreTrainedModel, tokens: TokensArtifact, folder: Path) -> None:
    embeddings: Any = model.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    if rows < tokens.vocab_size:
        raise ConfigError(
            f"model {folder} embeds {rows} tokens, the run's tokenizer has {tokens.vocab_size}: not a pair",
            advice="Start from a model that was trained with this tokenizer, or let the run use the model's tokenizer.",
        )
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and limit < tokens.sequence_length:
        raise ConfigError(
            f"tokenize.sequence_length={tokens.sequence_length} but the model has only {limit} positions",
            advice=f"Set tokenize.sequence_length to at most {limit}.",
        )
