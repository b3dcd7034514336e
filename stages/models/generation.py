"""Batched sampling whose outcome does not depend on how prompts are batched or spread over workers.

Every response draws from its own stream of uniform numbers, which the inverse of the cumulative distribution turns into
tokens: the same prompt with the same stream gives the same response next to whatever neighbours. torch's own sampling
draws for the batch as a whole, so that a response would change with its neighbours.

Shape legend: S sequences, R response tokens at most, P prompt length, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Sampling:
    """How responses are chosen, apart from the random numbers."""

    max_response_length: int
    """Tokens of a response at most, the end token included."""
    eos_id: int
    pad_id: int
    temperature: float = 1.0
    """0 is greedy: the most probable token, whatever is drawn."""


@dataclass(frozen=True)
class Draws:
    """Which random numbers the responses of a batch use."""

    seed: int
    stream: int
    """Keeps apart what shares a seed: one rollout and the next, training and evaluation."""
    indices: Sequence[int]
    """Number of each response in its stream."""

    def uniforms(self, length: int) -> np.ndarray:
        """Return uniform numbers in [0, 1), shape (S, length); row i depends on (seed, stream, indices[i]) alone."""
        # numpy hashes these two numbers into Philox' key, so neighbouring indices give unrelated streams.
        seeds = [[self.seed, (self.stream << 32) + index] for index in self.indices]
        return np.stack([np.random.Generator(np.random.Philox(seed)).random(length) for seed in seeds])


class Generated(NamedTuple):
    """A response, and the log-probability of each of its tokens in the distribution that it was drawn from."""

    tokens_R: np.ndarray
    logprobs_R: np.ndarray


class Column(NamedTuple):
    """The next token of every response and its probability; after a response's end `pad_id`, and any number."""

    tokens_S: Tensor
    probabilities_S: Tensor


def generate(
    model: nn.Module,
    prompts: Sequence[np.ndarray],
    sampling: Sampling,
    draws: Draws,
    *,
    all_done: Callable[[bool], bool] = lambda done: done,
) -> list[np.ndarray]:
    """Return one response per prompt, the end token included where it was reached."""
    return [one.tokens_R for one in generate_with_logprobs(model, prompts, sampling, draws, all_done=all_done)]


def generate_with_logprobs(
    model: nn.Module,
    prompts: Sequence[np.ndarray],
    sampling: Sampling,
    draws: Draws,
    *,
    all_done: Callable[[bool], bool] = lambda done: done,
) -> list[Generated]:
    """As `generate`, with the log-probabilities as generation computed them."""
    columns = list(_columns(model, prompts, sampling, draws, all_done=all_done))
    tokens_SR = torch.stack([column.tokens_S for column in columns], dim=1).cpu().numpy()
    logprobs_SR = torch.stack([column.probabilities_S for column in columns], dim=1).log().cpu().numpy()
    lengths = [len(_up_to_end(tokens_R, sampling.eos_id)) for tokens_R in tokens_SR]
    return [
        Generated(tokens_R[:length], logprobs_R[:length])
        for tokens_R, logprobs_R, length in zip(tokens_SR, logprobs_SR, lengths, strict=True)
    ]


def token_columns(
    model: nn.Module,
    prompts: Sequence[np.ndarray],
    sampling: Sampling,
    draws: Draws,
    *,
    all_done: Callable[[bool], bool] = lambda done: done,
) -> Iterator[Tensor]:
    """Yield the next token of every response, shape (S,), until all have ended; `pad_id` after a response's end.

    `all_done` lets sharded models agree on when to stop, so that every rank runs the same number of forward passes.
    """
    return (column.tokens_S for column in _columns(model, prompts, sampling, draws, all_done=all_done))


@torch.no_grad()
def _columns(
    model: nn.Module,
    prompts: Sequence[np.ndarray],
    sampling: Sampling,
    draws: Draws,
    *,
    all_done: Callable[[bool], bool],
) -> Iterator[Column]:
    """What `token_columns` says, with the probability of each token."""
    device = next(model.parameters()).device
    input_ids_SP, mask_SP = _left_padded(prompts, sampling.pad_id, device)
    # Padding is masked out, so its position does not matter; -1 would point outside the table of learned positions.
    position_ids_SP = (mask_SP.cumsum(-1) - 1).clamp(min=0)
    # On the host first, in float64, and rounded once: the same numbers on every device.
    draws_SR = torch.as_tensor(draws.uniforms(sampling.max_response_length), dtype=torch.float32, device=device)
    finished_S = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    cache = None
    for step in range(sampling.max_response_length):
        # The first pass reads the whole prompt, the later ones only the token chosen before; keys and values of all
        # earlier tokens are in the cache. The head's logits are computed for the last position alone.
        out = model(
            input_ids=input_ids_SP,
            attention_mask=mask_SP,
            position_ids=position_ids_SP,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = out.past_key_values
        tokens_S, probabilities_S = _choose(out.logits[:, -1].float(), sampling.temperature, draws_SR[:, step])
        # A finished response stays in the batch until the others end: it is given padding, which is cut off in the end.
        tokens_S = torch.where(finished_S, sampling.pad_id, tokens_S)
        yield Column(tokens_S, probabilities_S)
        finished_S |= tokens_S == sampling.eos_id
        if all_done(bool(finished_S.all())):
            break
        input_ids_SP = tokens_S[:, None]
        mask_SP = torch.cat([mask_SP, mask_SP.new_ones(len(prompts), 1)], dim=1)
        position_ids_SP = position_ids_SP[:, -1:] + 1


def _choose(logits_SV: Tensor, temperature: float, draws_S: Tensor) -> Column:
    if temperature == 0:
        tokens_S = logits_SV.argmax(-1)
        return Column(tokens_S, torch.ones_like(logits_SV[:, 0]))
    probabilities_SV = (logits_SV / temperature).softmax(-1)
    tokens_S = token_at(probabilities_SV, draws_S)
    return Column(tokens_S, probabilities_SV.gather(1, tokens_S[:, None])[:, 0])


def token_at(probabilities_SV: Tensor, draws_S: Tensor) -> Tensor:
    """Return the token whose interval of the cumulative distribution holds the draw; the rows need not add up to 1."""
    cumulative_SV = probabilities_SV.cumsum(-1)
    # Rounding may leave the last entry a little below 1: scale the draw instead of ever pointing past the end.
    # `right=True` skips tokens of probability 0, whose intervals are empty; the clamp is for a draw that rounds to 1.
    return torch.searchsorted(cumulative_SV, (draws_S * cumulative_SV[:, -1])[:, None], right=True)[:, 0].clamp(
        max=probabilities_SV.shape[-1] - 1
    )


def _left_padded(prompts: Sequence[np.ndarray], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ids and attention mask, shape (S, P). Padding stands left, so that all prompts end in the same column and
    the next token of each belongs to the column after it."""
    width = max(len(prompt) for prompt in prompts)
    ids = np.full((len(prompts), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(prompts), width), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def _up_to_end(tokens_R: np.ndarray, eos_id: int) -> np.ndarray:
    ends = np.flatnonzero(tokens_R == eos_id)
    return tokens_R[: ends[0] + 1] if len(ends) else tokens_R
