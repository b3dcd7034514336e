"""What training measured last on held-out data, measured again on the published weights.

The last evaluation of a training is made by the weights in memory. The published ones must give the same number on the
same items: an export that mixes up tensors, a merged adapter, or a byte that changed, does not.

Shape legend: S segments, P pairs.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from stages.config.gate_records import Check, compared, skipped
from stages.config.request import Manifest
from stages.data.tokens.packing import Packed, TokenSequence, collate, lay_out, split_by_rows
from stages.data.tokens.views import PairView
from stages.judge.gates.computing import Computing
from stages.models.forward import next_token_loss_sum, segment_logprobs, segment_scores

CHECK = "heldout_again"
_EXACT, _LOOSE = 1e-4, 3e-2
"""Share of the value, or the difference itself where the value is below 1. Loose where training computed in half
precision or with frozen weights of 4 bits."""
_A_TARGET_EXACT, _A_TARGET_ALIKE, _A_TARGET_LOOSE = 1e-5, 3e-3, 1e-2
"""Nats a target, for sums over the targets of an answer, whose error grows with its length: in float32, in the half
precision that training had, and where this device has another."""


def compare_again(
    manifest: Manifest,
    metric: str,
    found: float | None,
    why_not: str = "",
    *,
    alike: bool = True,
    size: float = 1.0,
    targets: float = 0.0,
) -> Check:
    """Compare a number with what training recorded under `metric`.

    `alike` says whether it was computed in the number format of training; `size` is that of the numbers whose
    difference it is; `targets` is of how many it is the sum.
    """
    recorded = manifest.metrics.get(metric)
    if recorded is None:
        return skipped(CHECK, manifest.ledger.get("not_evaluated") or f"training recorded no {metric}")
    if found is None:
        return skipped(CHECK, why_not)
    exact = manifest.execution.get("compute_dtype") == "float32" and alike and not is_quantized(manifest)
    a_target = _A_TARGET_EXACT if exact else _A_TARGET_ALIKE if alike else _A_TARGET_LOOSE
    allowed = max((_EXACT if exact else _LOOSE) * max(1.0, abs(recorded), size), a_target * targets)
    return compared(
        CHECK,
        abs(found - recorded) <= allowed,
        f"{metric} {found:.6g} of the published weights",
        f"{recorded:.6g} ± {allowed:.1g}, as training measured it",
        "The published weights are not those that were trained. Clear the stage, which builds the model again; if it "
        "recurs, report it.",
    )


def is_quantized(manifest: Manifest) -> bool:
    """Whether training kept the weights that it did not train in 4 bits."""
    return manifest.config.get("lora", {}).get("quantization", "none") != "none"


@torch.no_grad()
def next_token_loss(model: nn.Module, rows: Sequence[Sequence[TokenSequence]], computing: Computing) -> float | None:
    """Mean loss a target over rows; None without a target."""
    loss_sum = targets = 0.0
    for start in range(0, len(rows), computing.max_rows):
        batch = collate(rows[start : start + computing.max_rows])
        loss_sum += float(next_token_loss_sum(model, batch.to(computing.device)))
        targets += batch.num_targets
        computing.beat("held-out loss")
    return loss_sum / targets if targets else None


@torch.no_grad()
def pair_scores(model: nn.Module, pairs: PairView, indices: np.ndarray, computing: Computing) -> np.ndarray:
    """Scores of chosen and rejected answers, shape (P, 2)."""
    parts = []
    for batch in pair_batches(pairs, indices, computing):
        parts.append(segment_scores(model, batch.to(computing.device), pad_id=computing.pad_id).cpu().numpy())
        computing.beat("scores of pairs")
    return np.concatenate(parts).reshape(-1, 2).astype(np.float64) if parts else np.empty((0, 2))


@torch.no_grad()
def pair_logprobs(model: nn.Module, pairs: PairView, indices: np.ndarray, computing: Computing) -> np.ndarray:
    """Log-probabilities of chosen and rejected answers, shape (P, 2)."""
    parts = []
    for batch in pair_batches(pairs, indices, computing):
        parts.append(segment_logprobs(model, batch.to(computing.device)).cpu().numpy())
        computing.beat("log-probabilities of pairs")
    return np.concatenate(parts).reshape(-1, 2).astype(np.float64) if parts else np.empty((0, 2))


def pair_batches(pairs: PairView, indices: np.ndarray, computing: Computing) -> list[Packed]:
    """Chosen and rejected answers in turn."""
    chosen: list[Any] = [pairs[int(index)] for index in indices]
    groups = [(len(pair.chosen.ids), len(pair.rejected.ids)) for pair in chosen]
    return [
        lay_out([side for i in part for side in (chosen[i].chosen, chosen[i].rejected)])
        for part in split_by_rows(groups, row_length=computing.row_length, max_rows=computing.max_rows)
    ]
