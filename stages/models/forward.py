"""What objectives ask of a model on packed sequences: losses, log-probabilities, scores and values.

Logits exist only where a target is predicted. Models are plain transformers models; nothing here knows an architecture
beyond `base_model` (the trunk), output embeddings, and `score` (the head of a sequence classifier).

Shape legend: B rows, T positions, N targets, S segments, M members, H hidden size, V vocabulary, K tokens, L layers,
E experts.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stages.data.tokens.packing import Packed
from stages.models.attention import attends_within_documents, document_arguments
from stages.models.ensemble import Ensemble, members_of
from stages.models.linear_cross_entropy import linear_cross_entropy
from stages.models.linear_logprobs import linear_logprobs


class TokenLogprobs(NamedTuple):
    """One entry per target, in the order of the tokens."""

    logprobs_N: Tensor
    entropies_N: Tensor | None
    """Of the distribution that each target is of, in nats; None unless asked for, because it costs another softmax."""


class TrunkOutput(NamedTuple):
    last_hidden_BTH: Tensor
    router_logits_KLE: Tensor | None
    """Of all tokens; None unless asked for."""


def run_trunk(
    model: nn.Module, batch: Packed, *, noise_BTH: Tensor | None = None, with_router_logits: bool = False
) -> TrunkOutput:
    """Run everything but the head, with noise on the embeddings on request; no document sees another."""
    inputs = {"input_ids": batch.input_ids_BT}
    if noise_BTH is not None:
        inputs = {"inputs_embeds": model.get_input_embeddings()(batch.input_ids_BT) + noise_BTH}  # type: ignore[operator]
    options = {"output_router_logits": True} if with_router_logits else {}
    run = _run_within_documents if attends_within_documents(model) else _run_padded
    return run(model.base_model, batch, inputs, options)  # type: ignore[arg-type]


def hidden_states(model: nn.Module, batch: Packed, trunk: TrunkOutput | None = None) -> Tensor:
    """Return the trunk's last hidden states, shape (B, T, H); those in `trunk` if it has already run."""
    return (trunk or run_trunk(model, batch)).last_hidden_BTH


def _run_within_documents(
    trunk: nn.Module, batch: Packed, inputs: dict[str, Tensor], options: dict[str, Any]
) -> TrunkOutput:
    # Positions start anew in each document. The cache would only cost memory: nothing is generated here.
    positions = {"position_ids": batch.position_ids_BT, "use_cache": False}
    out = trunk(**inputs, **positions, **document_arguments(batch), **options)
    return TrunkOutput(out.last_hidden_state, torch.stack(out.router_logits, dim=1) if options else None)


def _run_padded(trunk: nn.Module, batch: Packed, inputs: dict[str, Tensor], options: dict[str, Any]) -> TrunkOutput:
    """Give a model whose attention cannot be cut at documents one padded row for each, and lay their tokens end to end
    again."""
    spans = batch.spans_D4.tolist()

    def padded(values: Tensor) -> Tensor:
        flat = values.flatten(0, 1)
        # A beginning that is shared with the sequence before is laid out only there: copy it to the front.
        whole = [torch.cat([flat[before:shared], flat[start:end]]) for start, end, before, shared in spans]
        return nn.utils.rnn.pad_sequence(whole, batch_first=True)

    # Padding is on the right: positions count from 0 in every row, and no token of a causal model looks ahead.
    mask_DT = padded(torch.ones_like(batch.input_ids_BT))
    out = trunk(
        **{name: padded(values) for name, values in inputs.items()}, attention_mask=mask_DT, use_cache=False, **options
    )
    # The shared beginnings were computed a second time; each token of the batch is wanted once.
    is_own_DT = mask_DT.bool()
    for row, (_, _, before, shared) in zip(is_own_DT, spans, strict=True):
        row[: shared - before] = False
    router_logits_KLE = None
    if options:  # transformers gives router logits a layer, rows and tokens flattened
        router_logits_KLE = torch.stack([logits[is_own_DT.flatten()] for logits in out.router_logits], dim=1)
    return TrunkOutput(out.last_hidden_state[is_own_DT][None], router_logits_KLE)


class NextTokenTerms(NamedTuple):
    """The loss of next-token training and its z-loss, summed over targets."""

    loss_sum: Tensor
    """Cross-entropy of all targets, in nats, plus the weighted z-loss where there is one."""
    z_sum: Tensor


def target_positions(batch: Packed) -> tuple[Tensor, Tensor]:
    """Return rows and columns of the targets."""
    rows_N, columns_N = batch.loss_mask_BT.nonzero(as_tuple=True)
    return rows_N, columns_N


def before_targets(states_BTH: Tensor, batch: Packed) -> Tensor:
    """Return the states that targets are predicted from, shape (N, H): those of the token before, which for the first
    token after a shared beginning is the beginning's last."""
    # Counted over all rows. The -1 of the very first token is never used: a sequence's first token is no target.
    before = torch.arange(-1, batch.num_tokens - 1)
    starts, _, shared_starts, shared_ends = batch.spans_D4.T
    shares = shared_ends > shared_starts
    before[starts[shares]] = shared_ends[shares] - 1
    wanted = before.to(states_BTH.device)[batch.loss_mask_BT.flatten() == 1]
    return states_BTH.flatten(0, 1)[wanted]


def next_token_loss_sum(model: nn.Module, batch: Packed) -> Tensor:
    """Return the summed negative log-likelihood of all targets, in nats."""
    return next_token_terms(model, batch).loss_sum


def next_token_terms(
    model: nn.Module,
    batch: Packed,
    *,
    z_coefficient: float = 0.0,
    trunk: TrunkOutput | None = None,
) -> NextTokenTerms:
    """Return the same with a z-loss. Logits are formed for targets only, and chunk by chunk."""
    cross_entropy = linear_cross_entropy(
        before_targets(hidden_states(model, batch, trunk), batch),
        _output_weight(model),
        batch.input_ids_BT[target_positions(batch)],
        z_coefficient=z_coefficient,
    )
    return NextTokenTerms(*cross_entropy)


def target_logprobs(
    model: nn.Module,
    batch: Packed,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    trunk: TrunkOutput | None = None,
) -> TokenLogprobs:
    """Return the log-probability of each target under softmax(logits / temperature), in float32."""
    where = target_positions(batch)
    # Rows of `before_targets` and of `where` are both in the order of the tokens, so they belong together one by one.
    logprobs_N, entropies_N = linear_logprobs(
        before_targets(hidden_states(model, batch, trunk), batch),
        _output_weight(model),
        batch.input_ids_BT[where],
        temperature=temperature,
        with_entropy=with_entropy,
    )
    return TokenLogprobs(logprobs_N, entropies_N if with_entropy else None)


def segment_logprobs(model: nn.Module, batch: Packed) -> Tensor:
    """Return the log-probability of each segment's targets together, shape (S,)."""
    return sum_by_segment(target_logprobs(model, batch).logprobs_N, batch)


def sum_by_segment(values_N: Tensor, batch: Packed) -> Tensor:
    """Return the sum over each segment's targets, shape (S,)."""
    segments_N = batch.segment_ids_BT[target_positions(batch)]
    # A segment without targets keeps its 0. index_add has a deterministic kernel on the CPU.
    return torch.zeros(batch.num_segments, device=values_N.device).index_add(0, segments_N, values_N)


def segment_scores(model: nn.Module, batch: Packed, *, pad_id: int, trunk: TrunkOutput | None = None) -> Tensor:
    """Return the reward model's score of each segment, shape (S,), read at its last token that is not `pad_id`.

    That is where transformers' sequence classifiers read it, so the exported model gives the same number. Of an
    ensemble it is the mean of its members' scores.
    """
    if isinstance(model, Ensemble):
        return member_scores(model, batch, pad_id=pad_id).mean(dim=0)
    flat_ids = batch.input_ids_BT.flatten()
    flat_segments = batch.segment_ids_BT.flatten()
    # By place in the row, not by counting tokens: where pad and end token are the same id, a response's end token
    # is skipped too, as in transformers.
    counted = (flat_ids != pad_id).nonzero()[:, 0]
    last_S = torch.zeros(batch.num_segments, dtype=torch.long, device=flat_ids.device)
    last_S = last_S.scatter_reduce(0, flat_segments[counted], counted, reduce="amax")
    hidden_SH = hidden_states(model, batch, trunk).flatten(0, 1)[last_S]
    return model.score(hidden_SH)[:, 0].float()  # type: ignore[operator]


def member_scores(model: nn.Module, batch: Packed, *, pad_id: int) -> Tensor:
    """Return the scores by each member of an ensemble, shape (M, S); a single reward model is its only member."""
    return torch.stack([segment_scores(member, batch, pad_id=pad_id) for member in members_of(model)])


def target_values(critic: nn.Module, batch: Packed, trunk: TrunkOutput | None = None) -> Tensor:
    """Return the value head's prediction before each target is chosen, shape (N,)."""
    hidden_NH = before_targets(hidden_states(critic, batch, trunk), batch)
    return critic.score(hidden_NH)[:, 0].float()  # type: ignore[operator]


def _output_weight(model: nn.Module) -> Tensor:
    return model.get_output_embeddings().weight  # type: ignore[operator]
