"""The packing check on a small model of the same architecture, so that it can be asked before any weight is loaded.

Whether documents see each other and whether logits are plain follows from the architecture and its settings, not from
the weights or the sizes. Which settings may be smaller differs between architectures, so several ways are tried; where
none gives a model that runs, the check is left to the stage, which makes it on the whole model.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from stages.data.tokens.packing import TokenSequence, lay_out
from stages.models.attention import attend_within_documents
from stages.models.folder import is_malformed, told
from stages.models.foreign_code import may_run_code
from stages.models.forward import hidden_states
from stages.models.probe import check_packing

_MOST_PARAMETERS = 60_000_000
"""What is tried in float32, within a second or two."""
_LAYERS, _VOCABULARY = 4, 128
_NARROW = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
_NARROW |= {"kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
_FEWER_EXPERTS = {
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
}
_OF_LAYERS = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""Lists with an entry for each layer."""


def check_small_packing(folder: Path) -> str:
    """Raise ConfigError as `check_packing` would for the folder's model; return why it could not be tried, or ''."""
    reasons = ["no way to make it small fits"]
    for changes in _ways(_config(folder)):
        config = _config(folder)
        try:
            for name, value in changes.items():
                _set(config, name, value)
            model = _made(config, folder)
        except Exception as error:
            if not is_malformed(error):
                raise
            reasons.append(told(error))
            continue
        if model is None:
            reasons.append(f"its small models have more than {_MOST_PARAMETERS} parameters")
            continue
        try:
            runs = _runs(model)
        except Exception as error:
            if not is_malformed(error):
                raise
            reasons.append(told(error))
            continue
        if runs:
            check_packing(model)
            return ""
        reasons.append("a small model with random weights gives no finite numbers")
    return reasons[-1]


def _config(folder: Path) -> Any:
    return AutoConfig.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code=may_run_code(folder)
    )


def _set(config: Any, name: str, value: Any) -> None:
    with contextlib.suppress(AttributeError):  # some are computed from others
        setattr(config, name, value)


def _ways(config: Any) -> Iterator[dict[str, Any]]:
    """Changes to try: none, for models that are small; fewer layers and tokens; narrower layers too."""
    yield {}
    shallow: dict[str, Any] = {"vocab_size": _VOCABULARY}
    depth = getattr(config, "num_hidden_layers", 0)
    if isinstance(depth, int) and depth > _LAYERS:
        shallow["num_hidden_layers"] = _LAYERS
        for name in _OF_LAYERS:
            kinds = getattr(config, name, None)
            if isinstance(kinds, list) and len(kinds) == depth:
                shallow[name] = _varied(kinds)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(config, name, None) is not None:
            shallow[name] = 0
    yield shallow
    experts = {name: value for name, value in _FEWER_EXPERTS.items() if (getattr(config, name, 0) or 0) > value}
    yield {**shallow, **experts}
    yield {**shallow, **experts, **{name: value for name, value in _NARROW.items() if getattr(config, name, None)}}


def _varied(kinds: list[Any]) -> list[Any]:
    """As many layers as are kept, with every kind among them where there is room."""
    names = list(map(str, kinds))
    chosen = [names.index(name) for name in dict.fromkeys(names)][:_LAYERS]
    chosen += [index for index in range(len(kinds)) if index not in chosen][: _LAYERS - len(chosen)]
    return [kinds[index] for index in sorted(chosen)]


def _made(config: Any, folder: Path) -> Any:
    """A model with random weights; None where it would be too large."""
    with torch.device("meta"):
        hollow = AutoModelForCausalLM.from_config(config, trust_remote_code=may_run_code(folder))
    if sum(weight.numel() for weight in hollow.parameters()) > _MOST_PARAMETERS:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=may_run_code(folder)).eval()
        head = model.get_output_embeddings()
        if head is not None:
            # As large as trained ones: caps on logits do nothing to small values.
            torch.nn.init.normal_(head.weight)
    attend_within_documents(model)
    return model


@torch.no_grad()
def _runs(model: Any) -> bool:
    if model.base_model is model:
        return True  # and is refused for that
    ids = torch.arange(8).numpy()
    states = hidden_states(model, lay_out([TokenSequence(ids, ids * 0 + 1)]))
    return bool(torch.isfinite(states).all()) and bool(states.abs().max() > 0)
