"""Causal attention within each packed sequence, without a mask of all tokens by all tokens.

transformers would derive such a mask from the positions and compute every pair of tokens, most of them in vain. Here
every sequence is a small product of its own. On the CPU, queries go in blocks of 128, because inside one call torch's
kernel computes also what causality masks; `spans_D4` (stages/data/tokens/packing.py) may point a sequence to an earlier
beginning that it shares. On a GPU it is torch's variable-length flash attention in half precision, and one SDPA call a
sequence in float32.

Shape legend: N tokens of a micro-batch, H heads, E size of a head, D packed sequences.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from stages.data.tokens.packing import Packed

_NAME = "packed_documents"
_QUERIES_AT_ONCE = 128
_UNKNOWN = ("sliding_window", "softcap", "s_aux", "position_bias")
"""Options that a model may give its attention and that are not implemented here."""


def attend_within_documents(model: nn.Module) -> None:
    """Switch the model to this attention if it is plain causal attention; others keep theirs and get padded rows."""
    config: Any = model.config
    # Configurations say it in three ways: a kind for each layer, a window that a flag may switch off, a cap on scores.
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    capped = getattr(config, "attn_logit_softcapping", None)
    if (
        getattr(model, "_supports_attention_backend", False)
        and layers == {"full_attention"}
        and not (windowed or capped)
    ):
        model.set_attn_implementation(_NAME)  # type: ignore[operator]


def attends_within_documents(model: nn.Module) -> bool:
    return model.config._attn_implementation == _NAME  # type: ignore[union-attr]


def document_arguments(batch: Packed) -> dict[str, Any]:
    """Return the arguments of the trunk's forward from which its attention learns where documents begin and end.

    A mask of four dimensions is passed through as it is, so that transformers builds none.
    """
    device = batch.input_ids_BT.device
    return {"attention_mask": torch.zeros(1, 1, 1, 1, device=device), "document_spans": batch.spans_D4}


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """The function that transformers calls, with shape (1, heads, N, E). Without spans (generation) it is SDPA."""
    spans_D4: Tensor | None = options.pop("document_spans", None)
    if spans_D4 is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if unknown := [name for name in _UNKNOWN if options.get(name) is not None]:
        raise NotImplementedError(f"{type(module).__name__} asks for {unknown}, which packed attention does not do")
    groups = query.shape[1] // key.shape[1]  # grouped-query attention: so many heads share keys and values
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    # Rotary embeddings leave queries and keys in float32 where autocast made values half precision.
    query, key = query.to(value.dtype), key.to(value.dtype)
    if query.device.type == "cpu":
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
        out_NHE, _ = _attend(_end_to_end(query), _end_to_end(key), _end_to_end(value), spans_D4, scale)
    elif value.dtype in (torch.bfloat16, torch.float16):
        out_NHE = _attend_flash(_end_to_end(query), _end_to_end(key), _end_to_end(value), spans_D4, scale)
    else:
        out_NHE = _attend_each(query, repeat_kv(key, groups), repeat_kv(value, groups), spans_D4, scale)
    return out_NHE[None], None


def _end_to_end(states: Tensor) -> Tensor:
    return states[0].transpose(0, 1)


def _attend_flash(query_NHE: Tensor, key_NHE: Tensor, value_NHE: Tensor, spans_D4: Tensor, scale: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # Sequences lie end to end, so the end of one is the beginning of the next. No prompts are shared on a GPU.
    ends = spans_D4[:, 1].to(query_NHE.device, torch.int32)
    bounds = torch.cat([ends.new_zeros(1), ends])
    longest = int((spans_D4[:, 1] - spans_D4[:, 0]).max())
    out = varlen_attn(
        query_NHE,
        key_NHE,
        value_NHE,
        bounds,
        bounds,
        longest,
        longest,
        scale=scale,
        window_size=(-1, 0),  # all of the past, nothing of the future
        enable_gqa=True,
    )
    assert isinstance(out, Tensor)
    return out


def _attend_each(query: Tensor, key: Tensor, value: Tensor, spans_D4: Tensor, scale: float) -> Tensor:
    lengths = (spans_D4[:, 1] - spans_D4[:, 0]).tolist()
    parts = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    outs = [nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale) for q, k, v in parts]
    return torch.cat(outs, dim=2)[0].transpose(0, 1)


def _blocks(spans_D4: Tensor) -> list[tuple[slice, slice, slice, Tensor | None]]:
    """Return queries, shared keys, own keys and mask of each product; no mask where torch's causal flag is the same."""
    blocks = []
    # Block k of a sequence looks at the k blocks before it without a mask and at itself with a triangle.
    for start, end, shared_start, shared_end in spans_D4.tolist():
        for first in range(start, end, _QUERIES_AT_ONCE):
            last = min(first + _QUERIES_AT_ONCE, end)
            past = shared_end - shared_start + first - start
            # torch's causal flag aligns the triangle with the first key, which is right only without a past.
            mask = _lower_right(last - first, past) if past else None
            blocks.append((slice(first, last), slice(shared_start, shared_end), slice(start, last), mask))
    return blocks


@cache
def _lower_right(queries: int, past: int) -> Tensor:
    """0 where a query may look, -inf elsewhere: at all of the past, and in its own block at itself and before."""
    mask = torch.full((queries, queries), float("-inf")).triu(1)
    return torch.cat([torch.zeros(queries, past), mask], dim=1)[None, None]


def _keys(states_NHE: Tensor, shared: slice, own: slice) -> Tensor:
    if shared.start == shared.stop:
        return _batched(states_NHE[own])
    return _batched(torch.cat([states_NHE[shared], states_NHE[own]]))


def _batched(states_NHE: Tensor) -> Tensor:
    return states_NHE.transpose(0, 1)[None]


@cache
def _half_precision_pays() -> bool:
    """Without matrix units torch's backward kernel takes 1.3 (long documents) to 2.5 (short ones) times as long in
    bfloat16 as in float32, and its forward kernel as long."""
    return torch.cpu._is_amx_tile_supported()


def _computed(*states: Tensor) -> tuple[Tensor, ...]:
    return states if _half_precision_pays() else tuple(each.float() for each in states)


@torch.library.custom_op("athanor::attend_within_documents", mutates_args=())
def _attend(
    query_NHE: Tensor, key_NHE: Tensor, value_NHE: Tensor, spans_D4: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the output, shape (N, H, E), and the log-normalisers, shape (H, N), which the backward pass needs.

    A custom operator, so that compilation sees one node without a Python loop over documents.
    """
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    dtype, (query_NHE, key_NHE, value_NHE) = query_NHE.dtype, _computed(query_NHE, key_NHE, value_NHE)
    out_NHE = torch.empty(query_NHE.shape, dtype=query_NHE.dtype)
    norm_HN = torch.empty(query_NHE.shape[1], query_NHE.shape[0], dtype=torch.float32)
    for queries, shared, own, mask in _blocks(spans_D4):
        key, value = _keys(key_NHE, shared, own), _keys(value_NHE, shared, own)
        mask = None if mask is None else mask.to(key.dtype)
        out, norm = forward(_batched(query_NHE[queries]), key, value, 0.0, mask is None, attn_mask=mask, scale=scale)
        out_NHE[queries] = out[0].transpose(0, 1)
        norm_HN[:, queries] = norm[0]
    return out_NHE.to(dtype), norm_HN


@_attend.register_fake
def _(query_NHE, key_NHE, value_NHE, spans_D4, scale):
    num_tokens, num_heads, _ = query_NHE.shape
    norm_HN = query_NHE.new_empty(num_heads, num_tokens, dtype=torch.float32)
    return query_NHE.new_empty(query_NHE.shape), norm_HN


@torch.library.custom_op("athanor::attend_within_documents_backward", mutates_args=())
def _attend_backward(
    grad_NHE: Tensor,
    query_NHE: Tensor,
    key_NHE: Tensor,
    value_NHE: Tensor,
    out_NHE: Tensor,
    norm_HN: Tensor,
    spans_D4: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    dtype = query_NHE.dtype
    grad_NHE, query_NHE, key_NHE, value_NHE, out_NHE = _computed(grad_NHE, query_NHE, key_NHE, value_NHE, out_NHE)
    grads = [torch.zeros(states.shape, dtype=states.dtype) for states in (query_NHE, key_NHE, value_NHE)]
    for queries, shared, own, mask in _blocks(spans_D4):
        key, value = _keys(key_NHE, shared, own), _keys(value_NHE, shared, own)
        mask = None if mask is None else mask.to(key.dtype)
        inputs = (_batched(grad_NHE[queries]), _batched(query_NHE[queries]), key, value, _batched(out_NHE[queries]))
        # The kernel forms the probabilities again from scores and log-normalisers; forward kept no N x N matrix.
        norm = norm_HN[:, queries].contiguous()[None]
        parts = backward(*inputs, norm, 0.0, mask is None, attn_mask=mask, scale=scale)
        grads[0][queries] = parts[0][0].transpose(0, 1)
        # Keys and values are read by several blocks (a shared beginning even by two sequences): their gradients add up.
        for grad_NHE_, part in zip(grads[1:], parts[1:], strict=True):
            past = shared.stop - shared.start
            if past:
                grad_NHE_[shared] += part[0, :, :past].transpose(0, 1)
            grad_NHE_[own] += part[0, :, past:].transpose(0, 1)
    return grads[0].to(dtype), grads[1].to(dtype), grads[2].to(dtype)


@_attend_backward.register_fake
def _(grad_NHE, query_NHE, key_NHE, value_NHE, out_NHE, norm_HN, spans_D4, scale):
    return tuple(states.new_empty(states.shape) for states in (query_NHE, key_NHE, value_NHE))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, scale = inputs
    ctx.scale = scale
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx: Any, grad_NHE: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    query_NHE, key_NHE, value_NHE, spans_D4, out_NHE, norm_HN = ctx.saved_tensors
    grads = _attend_backward(grad_NHE, query_NHE, key_NHE, value_NHE, out_NHE, norm_HN, spans_D4, ctx.scale)
    return *grads, None, None  # neither spans nor scale has a gradient


_attend.register_autograd(_differentiate, setup_context=_save)
AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, sdpa_mask)
