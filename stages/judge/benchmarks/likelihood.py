"""How likely a model finds continuations: log-probability, and whether it would write exactly that by itself.

In the precision of the weights, on every device: other tools compute so, and what is measured today on one machine is
compared with what another measures tomorrow.

Shape legend: N targets, H hidden size, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from stages.data.tokens.packing import Packed, lay_out, prompt_and_response
from stages.judge.benchmarks.asking import Pair
from stages.judge.benchmarks.facets import silent
from stages.judge.suite import Subject
from stages.models.forward import before_targets, hidden_states, target_positions

_TOKENS_AT_ONCE = 4096
_LOGITS_AT_ONCE = 1 << 24
"""Numbers of one block of logits: 64 MiB in float32."""


@dataclass(frozen=True)
class Likelihood:
    """Of one continuation after its context."""

    logprob: float
    """Sum over its tokens, in nats."""
    greedy: bool
    """Whether each of its tokens is the model's first choice."""
    tokens: int


def fits(subject: Subject, pair: Pair) -> bool:
    """Whether a model can read all of it; nothing is ever cut."""
    return len(pair) <= subject.context_length


def likelihoods(subject: Subject, pairs: Sequence[Pair], *, beat: Callable[[], None] = silent) -> list[Likelihood]:
    """Return one likelihood per pair, in order; all must fit and have a context and a continuation. `beat` is called
    after every batch."""
    found: list[Likelihood] = []
    for part in _batches(pairs):
        batch = lay_out([prompt_and_response(pair.context, pair.continuation) for pair in part])
        logprobs_N, greedy_N = _of_targets(subject, batch.to(subject.device))
        ends = np.cumsum([len(pair.continuation) for pair in part])
        for pair, end in zip(part, ends, strict=True):
            own = slice(int(end) - len(pair.continuation), int(end))
            found.append(
                Likelihood(float(logprobs_N[own].sum()), bool(greedy_N[own].all()), tokens=len(pair.continuation))
            )
        beat()
    return found


def _batches(pairs: Sequence[Pair]) -> list[list[Pair]]:
    parts: list[list[Pair]] = []
    size = _TOKENS_AT_ONCE
    for pair in pairs:
        if size + len(pair) > _TOKENS_AT_ONCE:
            parts.append([])
            size = 0
        parts[-1].append(pair)
        size += len(pair)
    return parts


@torch.no_grad()
def _of_targets(subject: Subject, batch: Packed) -> tuple[np.ndarray, np.ndarray]:
    """Log-probability of each target, and whether it has the largest logit."""
    model: nn.Module = subject.model
    states_NH = before_targets(hidden_states(model, batch), batch)
    targets_N = batch.input_ids_BT[target_positions(batch)]
    head_VH = model.get_output_embeddings().weight  # type: ignore[operator]
    rows = max(1, _LOGITS_AT_ONCE // head_VH.shape[0])
    logprobs, greedy = [], []
    for start in range(0, len(targets_N), rows):
        chosen_N = targets_N[start : start + rows]
        logits_NV = nn.functional.linear(states_NH[start : start + rows].to(head_VH.dtype), head_VH)
        logprobs_NV = logits_NV.float().log_softmax(-1)
        logprobs.append(logprobs_NV.gather(1, chosen_N[:, None])[:, 0].double().cpu())
        greedy.append((logits_NV.argmax(-1) == chosen_N).cpu())
    return torch.cat(logprobs).numpy(), torch.cat(greedy).numpy()
