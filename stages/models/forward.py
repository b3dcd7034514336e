"""What objectives ask of a model on packed sequences: losses, log-probabilities, scores and values.

Logits exist only where a target is predicted. Models are plain transformers models; nothing here knows an architecture
beyond `base_model` (the trunk), output embeddings, and `score` (the head of a sequence classifier).

Shape legend: B rows, T positions, N targets, S segments, H hidden size, V vocabulary, K tokens but padding, L layers,
E experts.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stages.data.packing import Packed
from stages.losses import entropy
from stages.models.linear_cross_entropy import linear_cross_entropy


class TokenLogprobs(NamedTuple):
    """One entry per target, in reading order of the rows."""

    logprobs_N: Tensor
    segments_N: Tensor
    entropy_sum: Tensor | None
    """Of all targets together, in nats, without gradient; None unless asked for, because it reads all logits again."""


def run_trunk(model: nn.Module, batch: Packed, *, noise_BTH: Tensor | None = None, **options: Any) -> Any:
    """Run everything but the head, with noise on the embeddings on request; documents are told apart by their
    positions."""
    trunk: nn.Module = model.base_model  # type: ignore[assignment]
    options |= {"position_ids": batch.position_ids_BT, "use_cache": False}
    if noise_BTH is None:
        return trunk(input_ids=batch.input_ids_BT, **options)
    embeddings_BTH = model.get_input_embeddings()(batch.input_ids_BT)  # type: ignore[operator]
    return trunk(inputs_embeds=embeddings_BTH + noise_BTH, **options)


def hidden_states(model: nn.Module, batch: Packed) -> Tensor:
    """Return the trunk's last hidden states, shape (B, T, H)."""
    return run_trunk(model, batch).last_hidden_state


class NextTokenTerms(NamedTuple):
    """What next-token training is made of; `next_token_loss_sum` is its bare loss."""

    loss_sum: Tensor
    """Cross-entropy of all targets, in nats, with the z-loss if there is one."""
    z_sum: Tensor
    router_logits_KLE: Tensor | None
    """Of all tokens but padding; None unless asked for."""


def target_positions(batch: Packed) -> tuple[Tensor, Tensor]:
    """Return rows and columns of the targets; a target at column t is predicted from column t - 1."""
    rows_N, columns_N = batch.loss_mask_BT.nonzero(as_tuple=True)
    return rows_N, columns_N


def next_token_loss_sum(model: nn.Module, batch: Packed) -> Tensor:
    """Return the summed negative log-likelihood of all targets, in nats."""
    return next_token_terms(model, batch).loss_sum


def next_token_terms(
    model: nn.Module,
    batch: Packed,
    *,
    z_coefficient: float = 0.0,
    noise_BTH: Tensor | None = None,
    with_router_logits: bool = False,
) -> NextTokenTerms:
    """As `next_token_loss_sum`, with what training may add: z-loss, noise on the embeddings, the routers' logits."""
    options = {"output_router_logits": True} if with_router_logits else {}
    out = run_trunk(model, batch, noise_BTH=noise_BTH, **options)
    rows_N, columns_N = target_positions(batch)
    cross_entropy = linear_cross_entropy(
        out.last_hidden_state[rows_N, columns_N - 1],
        _output_weight(model),
        batch.input_ids_BT[rows_N, columns_N],
        z_coefficient=z_coefficient,
    )
    router_logits_KLE = None
    if with_router_logits:
        is_token = batch.segment_ids_BT.flatten() >= 0
        router_logits_KLE = torch.stack([logits[is_token] for logits in out.router_logits], dim=1)
    return NextTokenTerms(*cross_entropy, router_logits_KLE)


def target_logprobs(
    model: nn.Module, batch: Packed, *, temperature: float = 1.0, with_entropy: bool = False
) -> TokenLogprobs:
    """Return the log-probability of each target under softmax(logits / temperature), in float32."""
    rows_N, columns_N = target_positions(batch)
    hidden_NH = hidden_states(model, batch)[rows_N, columns_N - 1]
    logits_NV = nn.functional.linear(hidden_NH, _output_weight(model)).float() / temperature
    targets_N = batch.input_ids_BT[rows_N, columns_N]
    logprobs_N = logits_NV.gather(1, targets_N[:, None])[:, 0] - logits_NV.logsumexp(-1)
    entropy_sum = entropy(logits_NV.detach()).sum() if with_entropy else None
    return TokenLogprobs(logprobs_N, batch.segment_ids_BT[rows_N, columns_N], entropy_sum)


def segment_logprobs(model: nn.Module, batch: Packed) -> Tensor:
    """Return the log-probability of each segment's targets together, shape (S,)."""
    tokens = target_logprobs(model, batch)
    return torch.zeros(batch.num_segments, device=tokens.logprobs_N.device).index_add(
        0, tokens.segments_N, tokens.logprobs_N
    )


def segment_scores(model: nn.Module, batch: Packed, *, pad_id: int) -> Tensor:
    """Return the reward model's score of each segment, shape (S,), read at its last token that is not `pad_id`.

    That is where transformers' sequence classifiers read it, so the exported model gives the same number.
    """
    flat_ids = batch.input_ids_BT.flatten()
    flat_segments = batch.segment_ids_BT.flatten()
    counted = ((flat_segments >= 0) & (flat_ids != pad_id)).nonzero()[:, 0]
    last_S = torch.zeros(batch.num_segments, dtype=torch.long, device=flat_ids.device)
    last_S = last_S.scatter_reduce(0, flat_segments[counted], counted, reduce="amax")
    hidden_SH = hidden_states(model, batch).flatten(0, 1)[last_S]
    return model.score(hidden_SH)[:, 0].float()  # type: ignore[operator]


def target_values(critic: nn.Module, batch: Packed) -> Tensor:
    """Return the value head's prediction before each target is chosen, shape (N,)."""
    rows_N, columns_N = target_positions(batch)
    hidden_NH = hidden_states(critic, batch)[rows_N, columns_N - 1]
    return critic.score(hidden_NH)[:, 0].float()  # type: ignore[operator]


def _output_weight(model: nn.Module) -> Tensor:
    return model.get_output_embeddings().weight  # type: ignore[operator]
