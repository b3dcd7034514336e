"""Whether an architecture can be trained on packed rows: tried out, not looked up in a list.

Two short documents go through the model in one row and apart. A model that carries something from one to the other,
such as a recurrent state, is refused, and so is one whose logits are not its output matrix times its hidden states.
"""

import numpy as np
import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from stages.config.errors import ConfigError
from stages.data.packing import TokenSequence, collate
from stages.models.forward import run_trunk

_FIRST, _SECOND = 5, 7
"""Tokens of the two documents."""
_TOLERANCE = 1e-4
"""Of the largest value; float32 rounding is a hundred times less. Weights in 4 bits are multiplied in bfloat16."""


@torch.no_grad()
def check_packing(model: PreTrainedModel) -> None:
    """Raise ConfigError when packed rows would give other numbers than single documents."""
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
    length = _FIRST + _SECOND
    try:
        packed = run_trunk(model, collate([[first, second]], length).to(model.device)).last_hidden_state[0, _FIRST:]
        alone = run_trunk(model, collate([[second]], _SECOND).to(model.device)).last_hidden_state[0]
    except TypeError as error:
        raise _cannot_pack(model, f"its forward pass takes no position_ids ({error})") from error
    if not _equal(packed, alone, model):
        raise _cannot_pack(model, "a document's hidden states change with the document before it in the row")
    if getattr(model.config, "attn_logit_softcapping", None):
        raise _cannot_pack(model, "its attention caps logits, which no fast attention here does")


def _check_head(model: PreTrainedModel) -> None:
    batch = collate([[_documents(model)[1]]], _SECOND).to(model.device)
    hidden = run_trunk(model, batch).last_hidden_state
    head = model.get_output_embeddings()
    expected = model(input_ids=batch.input_ids_BT, position_ids=batch.position_ids_BT, use_cache=False).logits
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
        f"{type(model).__name__} cannot be trained on packed rows: {reason}",
        advice="Use an architecture with attention over position_ids and plain logits, such as Llama, Qwen3 or GPT-2.",
    )
