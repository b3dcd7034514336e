"""What objectives ask of a model on packed sequences: losses, log-probabilities, scores and values.

Logits exist only where a target is predicted. Models are plain transformers models; nothing here knows an architecture
beyond `base_model` (the trunk), output embeddings, and `score` (the head of a sequence classifier).

Shape legend: B rows, T positions, N targets, S segments, H hidden size, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from stages.data.packing import Packed
from stages.models.attention import attends_within_documents, document_arguments
from stages.models.linear_cross_entropy import linear_cross_entropy_sum
from stages.models.linear_logprobs import linear_logprobs


class TokenLogprobs(NamedTuple):
    """One entry per target, in the order of the tokens."""

    logprobs_N: Tensor
    entropy_sum: Tensor | None
    """Of all targets together, in nats, without gradient; None unless asked for, because it costs another softmax."""


def hidden_states(model: nn.Module, batch: Packed) -> Tensor:
    """Return the trunk's last hidden states, shape (B, T, H); no document sees another."""
    trunk: nn.Module = model.base_model  # type: ignore[assignment]
    if not attends_within_documents(model):
        return _hidden_states_padded(trunk, batch)
    arguments = {"input_ids": batch.input_ids_BT, "position_ids": batch.position_ids_BT, "use_cache": False}
    return trunk(**arguments, **document_arguments(batch)).last_hidden_state


def _hidden_states_padded(trunk: nn.Module, batch: Packed) -> Tensor:
    """Give an attention that knows no documents one padded row for each, and put their tokens back end to end."""
    spans = batch.spans_D4.tolist()
    ids_N = batch.input_ids_BT.flatten()
    whole = [torch.cat([ids_N[before:shared], ids_N[start:end]]) for start, end, before, shared in spans]
    mask_DT = nn.utils.rnn.pad_sequence([torch.ones_like(ids) for ids in whole], batch_first=True)
    ids_DT = nn.utils.rnn.pad_sequence(whole, batch_first=True)
    out_DTH = trunk(input_ids=ids_DT, attention_mask=mask_DT, use_cache=False).last_hidden_state
    own = [
        states_TH[shared - before :][: end - start]
        for states_TH, (start, end, before, shared) in zip(out_DTH, spans, strict=True)
    ]
    return torch.cat(own)[None]


def target_positions(batch: Packed) -> tuple[Tensor, Tensor]:
    """Return rows and columns of the targets."""
    rows_N, columns_N = batch.loss_mask_BT.nonzero(as_tuple=True)
    return rows_N, columns_N


def before_targets(states_BTH: Tensor, batch: Packed) -> Tensor:
    """Return the states that targets are predicted from, shape (N, H): those of the token before, which for the first
    token after a shared beginning is the beginning's last."""
    before = torch.arange(-1, batch.num_tokens - 1)
    starts, _, shared_starts, shared_ends = batch.spans_D4.T
    goes_on = shared_ends > shared_starts
    before[starts[goes_on]] = shared_ends[goes_on] - 1
    wanted = before.to(states_BTH.device)[batch.loss_mask_BT.flatten() == 1]
    return states_BTH.flatten(0, 1)[wanted]


def next_token_loss_sum(model: nn.Module, batch: Packed) -> Tensor:
    """Return the summed negative log-likelihood of all targets, in nats."""
    rows_N, columns_N = target_positions(batch)
    hidden_NH = before_targets(hidden_states(model, batch), batch)
    return linear_cross_entropy_sum(hidden_NH, _output_weight(model), batch.input_ids_BT[rows_N, columns_N])


def target_logprobs(
    model: nn.Module, batch: Packed, *, temperature: float = 1.0, with_entropy: bool = False
) -> TokenLogprobs:
    """Return the log-probability of each target under softmax(logits / temperature), in float32."""
    where = target_positions(batch)
    logprobs_N, entropy_sum = linear_logprobs(
        before_targets(hidden_states(model, batch), batch),
        _output_weight(model),
        batch.input_ids_BT[where],
        temperature=temperature,
        with_entropy=with_entropy,
    )
    return TokenLogprobs(logprobs_N, entropy_sum if with_entropy else None)


def segment_logprobs(model: nn.Module, batch: Packed) -> Tensor:
    """Return the log-probability of each segment's targets together, shape (S,)."""
    return sum_by_segment(target_logprobs(model, batch).logprobs_N, batch)


def sum_by_segment(values_N: Tensor, batch: Packed) -> Tensor:
    """Return the sum over each segment's targets, shape (S,)."""
    segments_N = batch.segment_ids_BT[target_positions(batch)]
    return torch.zeros(batch.num_segments, device=values_N.device).index_add(0, segments_N, values_N)


def segment_scores(model: nn.Module, batch: Packed, *, pad_id: int) -> Tensor:
    """Return the reward model's score of each segment, shape (S,), read at its last token that is not `pad_id`.

    That is where transformers' sequence classifiers read it, so the exported model gives the same number.
    """
    flat_ids = batch.input_ids_BT.flatten()
    flat_segments = batch.segment_ids_BT.flatten()
    counted = (flat_ids != pad_id).nonzero()[:, 0]
    last_S = torch.zeros(batch.num_segments, dtype=torch.long, device=flat_ids.device)
    last_S = last_S.scatter_reduce(0, flat_segments[counted], counted, reduce="amax")
    hidden_SH = hidden_states(model, batch).flatten(0, 1)[last_S]
    return model.score(hidden_SH)[:, 0].float()  # type: ignore[operator]


def target_values(critic: nn.Module, batch: Packed) -> Tensor:
    """Return the value head's prediction before each target is chosen, shape (N,)."""
    hidden_NH = before_targets(hidden_states(critic, batch), batch)
    return critic.score(hidden_NH)[:, 0].float()  # type: ignore[operator]


def _output_weight(model: nn.Module) -> Tensor:
    return model.get_output_embeddings().weight  # type: ignore[operator]
