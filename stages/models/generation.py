"""Batched sampling whose outcome does not depend on how prompts are batched or spread over workers.

Every response draws from its own stream of uniform numbers, turned into tokens by the inverse of the cumulative
distribution: the same prompt with the same stream gives the same response next to whatever neighbours.

Shape legend: S sequences, R response tokens at most, P prompt length, V vocabulary.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn


def uniforms(*, seed: int, stream: int, indices: Sequence[int], length: int) -> np.ndarray:
    """Return uniform numbers in [0, 1), shape (S, R); row i depends on (seed, stream, indices[i]) alone."""
    return np.stack([np.random.Generator(np.random.Philox([seed, (stream << 32) + i])).random(length) for i in indices])


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[np.ndarray],
    *,
    max_response_length: int,
    eos_id: int,
    pad_id: int,
    temperature: float = 1.0,
    uniforms_SR: np.ndarray | None = None,
    all_done: Callable[[bool], bool] = lambda done: done,
) -> list[np.ndarray]:
    """Return one response per prompt, the end token included where it was reached.

    `uniforms_SR` None means greedy. `all_done` lets sharded models agree on when to stop, so that every rank runs the
    same number of forward passes.
    """
    device = next(model.parameters()).device
    input_ids_SP, mask_SP = _left_padded(prompts, pad_id, device)
    position_ids_SP = (mask_SP.cumsum(-1) - 1).clamp(min=0)
    draws_SR = None if uniforms_SR is None else torch.as_tensor(uniforms_SR, dtype=torch.float32, device=device)
    finished_S = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    chosen: list[Tensor] = []
    cache = None
    for step in range(max_response_length):
        out = model(
            input_ids=input_ids_SP,
            attention_mask=mask_SP,
            position_ids=position_ids_SP,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = out.past_key_values
        tokens_S = _choose(out.logits[:, -1].float(), temperature, None if draws_SR is None else draws_SR[:, step])
        tokens_S = torch.where(finished_S, pad_id, tokens_S)
        chosen.append(tokens_S)
        finished_S |= tokens_S == eos_id
        if all_done(bool(finished_S.all())):
            break
        input_ids_SP = tokens_S[:, None]
        mask_SP = torch.cat([mask_SP, mask_SP.new_ones(len(prompts), 1)], dim=1)
        position_ids_SP = position_ids_SP[:, -1:] + 1
    return _trimmed(torch.stack(chosen, dim=1).cpu().numpy(), eos_id)


def _choose(logits_SV: Tensor, temperature: float, draws_S: Tensor | None) -> Tensor:
    if draws_S is None:
        return logits_SV.argmax(-1)
    cumulative_SV = (logits_SV / temperature).softmax(-1).cumsum(-1)
    # Rounding may leave the last entry a little below 1: scale the draw instead of ever pointing past the end.
    return torch.searchsorted(cumulative_SV, (draws_S * cumulative_SV[:, -1])[:, None], right=True)[:, 0].clamp(
        max=logits_SV.shape[-1] - 1
    )


def _left_padded(prompts: Sequence[np.ndarray], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(len(prompt) for prompt in prompts)
    ids = np.full((len(prompts), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(prompts), width), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def _trimmed(tokens_SR: np.ndarray, eos_id: int) -> list[np.ndarray]:
    responses = []
    for tokens_R in tokens_SR:
        ends = np.flatnonzero(tokens_R == eos_id)
        responses.append(tokens_R[: ends[0] + 1] if len(ends) else tokens_R)
    return responses
