"""Models come from transformers: made from a config, loaded from a folder, saved so that plain transformers loads them.

Importing transformers' model classes takes seconds, so only the verbs that need models import this module.
"""

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import PreTrainedModel

from stages.config.errors import ConfigError
from stages.config.train import LoRAConfig, ModelConfig
from stages.data.tokens.tokenizer import LoadedTokenizer
from stages.data.tokens.views import TokensArtifact
from stages.models.attention import attend_within_documents
from stages.models.ensemble import Ensemble, as_one, member_folders
from stages.models.folder import check_folder, is_malformed, read_settings, told
from stages.models.foreign_code import brings_code, copy_code, may_run_code
from stages.models.given_tokenizer import check_growth
from stages.models.lora import has_adapter, merged_weights, quantized_loading, save_adapter
from stages.models.probe import check_packing

logger = logging.getLogger(__name__)

_NO_ADAPTER = LoRAConfig()


def new_causal_lm(config: ModelConfig, tokens: TokensArtifact, *, seed: int) -> PreTrainedModel:
    """Make a decoder with random weights that depend on `seed` alone: Llama's, or Mixtral's where there are experts."""
    common: dict[str, Any] = {
        "vocab_size": tokens.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "max_position_embeddings": tokens.sequence_length,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
        "bos_token_id": tokens.bos_id if tokens.bos_id >= 0 else None,
        "eos_token_id": tokens.eos_id,
        "pad_token_id": tokens.pad_id,
    }
    torch.manual_seed(seed)
    model = _mixture(config, common) if config.num_experts else LlamaForCausalLM(LlamaConfig(**common))
    attend_within_documents(model)
    return model


def _mixture(config: ModelConfig, common: dict[str, Any]) -> PreTrainedModel:
    from transformers import MixtralConfig, MixtralForCausalLM

    experts = {
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_token,
        "router_aux_loss_coef": config.router_loss_coefficient,
        "rms_norm_eps": 1e-6,  # as in Llama above
        "sliding_window": None,
    }
    return MixtralForCausalLM(MixtralConfig(**common, **experts))


def load_causal_lm(folder: Path, tokens: TokensArtifact, *, lora: LoRAConfig = _NO_ADAPTER) -> PreTrainedModel:
    """Load weights in float32; raises ConfigError when the model does not fit the run's tokens or cannot pack.

    `lora` says whether the weights are to be frozen in 4 bits.
    """
    model, loading = _load(AutoModelForCausalLM, folder, **quantized_loading(lora))
    check_complete(loading, folder)
    grow_embeddings(model, tokens)
    check_positions(model, tokens.sequence_length)
    attend_within_documents(model)
    check_packing(model)
    model.config.pad_token_id = tokens.pad_id
    return model


def load_for_text(folder: Path, *, dtype: torch.dtype) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a language model that only writes, with the attention that transformers gives it, and what was missing."""
    return _load(AutoModelForCausalLM, folder, dtype=dtype)


def _load(
    auto_class: Any, folder: Path, *, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """Load the files of a checked folder and nothing else; code from it runs only where it is allowed.

    Raises ConfigError for a folder whose files are malformed, or make no such model.
    """
    check_folder(folder)
    with telling_what_is_malformed(folder, auto_class):
        return auto_class.from_pretrained(
            folder,
            dtype=dtype,
            output_loading_info=True,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=may_run_code(folder),
            **options,
        )


@contextlib.contextmanager
def telling_what_is_malformed(folder: Path, auto_class: Any) -> Iterator[None]:
    """Raise ConfigError for whatever a library raises about the files of a model."""
    try:
        yield
    except BaseException as error:
        if not is_malformed(error):
            raise
        if brings_code(folder):
            raise ConfigError(
                f"the code that {folder} brings makes no {auto_class.__name__}: {told(error)}",
                advice="auto_map in its config.json must name a class for that, and what it imports must be installed.",
            ) from error
        if isinstance(error, ImportError):
            raise ConfigError(
                f"{folder / 'config.json'} asks for a library that is not installed: {told(error)}",
                advice="Install it where Ray's processes run, or give a model that does without.",
            ) from error
        raise ConfigError(
            f"the files of {folder} make no {auto_class.__name__}: {told(error)}",
            advice="config.json and *.safetensors must be those of one model; save it again with save_pretrained.",
        ) from error


def load_with_own_tokenizer(folder: Path, tokenizer: LoadedTokenizer) -> PreTrainedModel:
    """Load weights of a language model that reads its own ids, whatever tokens the run has, such as of an earlier
    champion; raises ConfigError when it is malformed or cannot pack."""
    model, loading = _load(AutoModelForCausalLM, folder)
    check_complete(loading, folder)
    _grow(model, tokenizer.backend)
    attend_within_documents(model)
    check_packing(model)
    model.config.pad_token_id = tokenizer.pad_id
    return model


def load_scorer_with_own_tokenizer(folder: Path, tokenizer: LoadedTokenizer) -> PreTrainedModel | Ensemble:
    """Load a sequence classifier with one output, or an ensemble, that reads its own ids, whatever tokens the run has;
    raises ConfigError when it is malformed, has no `score` or cannot pack."""
    return as_one([_load_own(member, tokenizer) for member in member_folders(folder)])


def _load_own(folder: Path, tokenizer: LoadedTokenizer) -> PreTrainedModel:
    model, loading = _load(AutoModelForSequenceClassification, folder, num_labels=1, pad_token_id=tokenizer.pad_id)
    check_complete(loading, folder)
    _grow(model, tokenizer.backend)
    check_score(model)
    attend_within_documents(model)
    check_packing(model)
    return model


def load_reward_model(folder: Path, tokens: TokensArtifact, *, lora: LoRAConfig = _NO_ADAPTER) -> PreTrainedModel:
    """Load a sequence classifier with one output; a language model's folder gives a head of zeros, so training starts
    at ln 2."""
    check_folder(folder)
    fresh = has_no_score(folder)
    model, loading = _load(
        AutoModelForSequenceClassification,
        folder,
        num_labels=1,
        pad_token_id=tokens.pad_id,
        **quantized_loading(lora),
    )
    check_complete(loading, folder, new={"score.weight"} if fresh else set())
    grow_embeddings(model, tokens)
    check_positions(model, tokens.sequence_length)
    check_score(model)
    attend_within_documents(model)
    check_packing(model)
    if fresh:
        torch.nn.init.zeros_(model.score.weight)
    return model


def load_scorer(folder: Path, tokens: TokensArtifact) -> PreTrainedModel | Ensemble:
    """Load a reward model to read scores from it: with all its members, where it is an ensemble."""
    return as_one([load_reward_model(member, tokens) for member in member_folders(folder)])


def save_model(model: PreTrainedModel, weights: dict[str, Tensor], folder: Path, tokens: TokensArtifact) -> None:
    """Write weights as safetensors, with config, generation config and tokenizer next to them.

    Not by `save_pretrained`, which imports accelerate and whatever that finds (DeepSpeed): seconds in every stage.
    """
    if has_adapter(model):
        save_adapter(model, weights, folder / "adapter")
        weights = merged_weights(model, weights)
    tied = model.all_tied_weights_keys or {}
    untied = {name: weight for name, weight in weights.items() if name not in tied}
    # Names and shapes as the architecture was published (one matrix for each expert, say), because vLLM reads those.
    published = {name: _alone(weight) for name, weight in revert_weight_conversion(model, untied).items()}
    save_torch_state_dict(published, folder, metadata={"format": "pt"})
    model.config.architectures = [type(model).__name__]
    if hasattr(model.config, "quantization_config"):  # what is written is in full precision again
        del model.config.quantization_config  # pyright: ignore[reportAttributeAccessIssue]
    model.config.dtype = torch.float32
    model.config.save_pretrained(folder)
    if model.name_or_path and brings_code(folder):
        copy_code(Path(model.name_or_path), folder)
    if model.can_generate():
        generation = GenerationConfig(
            bos_token_id=tokens.bos_id if tokens.bos_id >= 0 else None,
            eos_token_id=tokens.eos_id,
            pad_token_id=tokens.pad_id,
        )
        generation.save_pretrained(folder)
    shutil.copytree(tokens.tokenizer_dir, folder, dirs_exist_ok=True)


def _alone(weight: Tensor) -> Tensor:
    """Copy a slice of a larger tensor: safetensors refuses tensors that share memory."""
    return weight if weight.untyped_storage().nbytes() == weight.nbytes else weight.clone()


def check_complete(loading: dict[str, Any], folder: Path, *, new: Set[str] = frozenset()) -> None:
    """Raise ConfigError for missing weights, which transformers fills with random numbers."""
    if missing := set(loading["missing_keys"]) - new:
        raise ConfigError(
            f"model {folder} lacks weights: {', '.join(sorted(missing)[:5])}",
            advice="Export the model again, with all its parameters.",
        )


def grow_embeddings(model: PreTrainedModel, tokens: TokensArtifact) -> None:
    """Add rows for tokens that were added to the vocabulary. They start as the mean of all others, so that at first
    none is likelier than a token on average (Hewitt 2021, https://nlp.stanford.edu/~johnhew/vocab-expansion.html)."""
    _grow(model, tokens.tokenizer())


def _grow(model: PreTrainedModel, tokenizer: Tokenizer) -> None:
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr, operator]
    missing = check_growth(tokenizer, rows=rows)  # type: ignore[arg-type]
    if not missing:
        return
    model.resize_token_embeddings(rows + missing, mean_resizing=False)  # type: ignore[operator]
    with torch.no_grad():
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            for values in table.parameters() if table is not None else ():
                values[rows:] = values[:rows].mean(0)
    logger.info("%d tokens were added to the vocabulary of %d: their embeddings start as the mean", missing, rows)


def has_no_score(folder: Path) -> bool:
    """Whether a folder's model, made a classifier, gets a new head."""
    return "ForSequenceClassification" not in json.dumps(read_settings(folder / "config.json"))


def check_score(model: PreTrainedModel) -> None:
    """Raise ConfigError for a classifier without the head that reward models have."""
    if not isinstance(getattr(model, "score", None), torch.nn.Linear):
        raise ConfigError(
            f"reward: {type(model).__name__} has no linear `score` head",
            advice="Use a decoder architecture whose sequence classifier transformers builds with `score`.",
        )


def positions_of(model: PreTrainedModel | Ensemble) -> int | None:
    """How many positions a model has, None where it names no limit."""
    limit = getattr(model.config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) else None


def check_positions(model: PreTrainedModel, sequence_length: int) -> None:
    """Raise ConfigError when rows are longer than what the model can read."""
    limit = positions_of(model)
    if limit is not None and limit < sequence_length:
        raise ConfigError(
            f"tokenize.sequence_length={sequence_length} but the model has only {limit} positions",
            advice=f"Set tokenize.sequence_length to at most {limit}.",
        )
