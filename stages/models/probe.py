"""Whether an architecture can be trained on packed documents: measured, not looked up in a list.

Two short documents go through the model together and apart. A model that carries something from one to the other is
refused, and so is one whose logits are not its output matrix times its hidden states.
"""

import numpy as np
import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from stages.config.errors import ConfigError
from stages.data.tokens.packing import TokenSequence, lay_out
from stages.models.forward import hidden_states

_FIRST, _SECOND = 5, 7
"""Tokens of the two documents."""
_TOLERANCE = 1e-4
"""Of the largest value; float32 rounding is a hundred times less. Weights in 4 bits are multiplied in bfloat16."""


@torch.no_grad()
def check_packing(model: PreTrainedModel) -> None:
    """Raise ConfigError when packed documents would give other numbers than single ones."""
    if model.base_model is model:
        raise _cannot_pack(model, "its layers cannot be run without its head")
    was_training = model.training
    model.eval()
    try:
        _check_documents(model)
        if model.get_output_embeddings() is not None:
            _check_head(model)
    finally:
        model.train(was_training)


def _check_documents(model: PreTrainedModel) -> None:
    first, second = _documents(model)
    packed = hidden_states(model, lay_out([first, second]).to(model.device))[0, _FIRST:]
    alone = hidden_states(model, lay_out([second]).to(model.device))[0]
    if not _equal(packed, alone, model):
        raise _cannot_pack(model, "a document's hidden states change with the document before it")


def _check_head(model: PreTrainedModel) -> None:
    batch = lay_out([_documents(model)[1]]).to(model.device)
    hidden = hidden_states(model, batch)
    head = model.get_output_embeddings()
    expected = model(input_ids=batch.input_ids_BT, use_cache=False).logits
    if not _equal(nn.functional.linear(hidden.to(head.weight.dtype), head.weight), expected, model):  # type: ignore[union-attr, arg-type]
        raise _cannot_pack(model, "its logits are scaled, capped or shifted after the output matrix")


def _documents(model: PreTrainedModel) -> tuple[TokenSequence, TokenSequence]:
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr, operator]
    ids = np.random.default_rng(0).integers(0, rows, size=_FIRST + _SECOND)  # type: ignore[arg-type]
    mask = np.ones(len(ids), dtype=np.int64)
    return TokenSequence(ids[:_FIRST], mask[:_FIRST]), TokenSequence(ids[_FIRST:], mask[_FIRST:])


def _equal(left: torch.Tensor, right: torch.Tensor, model: PreTrainedModel) -> bool:
    tolerance = 0.05 if getattr(model, "is_quantized", False) else _TOLERANCE
    return bool((left - right).abs().max() <= tolerance * right.abs().max())


def _cannot_pack(model: PreTrainedModel, reason: str) -> ConfigError:
    return ConfigError(
        f"{type(model).__name__} cannot be trained on packed documents: {reason}",
        advice="Use an architecture with plain causal attention and plain logits, such as Llama, Qwen3 or GPT-2.",
    )
