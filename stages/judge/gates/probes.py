"""A score belongs to an answer: it depends neither on the answer next to it, nor on padding, nor on the order.

Swapped pairs must give 1 - accuracy; an answer alone, in a padded batch of plain transformers, and packed by us must
have one score.

Shape legend: K probed pairs.
"""

from typing import Any

import numpy as np
import torch
from torch import nn

from stages.config.gate_records import Check, compared
from stages.data.tokens.packing import TokenSequence, lay_out
from stages.data.tokens.views import Pair, PairView
from stages.judge.gates.acceptance import wins
from stages.judge.gates.computing import Computing
from stages.judge.gates.heldout import pair_scores
from stages.models.ensemble import members_of
from stages.models.forward import segment_scores

PROBED = 16
_TOLERANCE = 1e-4
"""Largest difference of two scores of one answer, as a share of the largest score where that is above 1."""
_REPORT = "A score must belong to the answer alone. This is a defect: keep the artifact and report it."


class _Swapped:
    """Pairs from the last to the first, each with its sides exchanged."""

    def __init__(self, pairs: PairView, indices: np.ndarray) -> None:
        self._pairs, self._indices = pairs, indices[::-1]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Pair:
        pair = self._pairs[int(self._indices[index])]
        return Pair(chosen=pair.rejected, rejected=pair.chosen)


def probe(model: nn.Module, plain: Any, pairs: PairView, indices: np.ndarray, computing: Computing) -> list[Check]:
    """Make both probes on some of the pairs; `plain` is the same model as transformers loads it."""
    usual_K2 = pair_scores(model, pairs, indices, computing)
    exchanged: Any = _Swapped(pairs, indices)
    swapped_K2 = pair_scores(model, exchanged, np.arange(len(indices)), computing)[::-1, ::-1]
    ids = [side.ids for index in indices for side in (pairs[int(index)].chosen, pairs[int(index)].rejected)]
    padded_S = _padded(plain, ids, pad_id=computing.pad_id)
    alone_S = np.array([_alone(model, side, computing) for side in ids])
    return [
        _swap_check(usual_K2, swapped_K2),
        _same_scores("padding_probe", padded_S, alone_S, "padded to one length in plain transformers"),
        _same_scores("batch_probe", usual_K2.flatten(), alone_S, "packed with others"),
    ]


def _swap_check(usual_K2: np.ndarray, swapped_K2: np.ndarray) -> Check:
    """Accuracy of the exchanged pairs is what is missing to 1; a margin within the tolerance may be a tie in one."""
    margins_K, again_K = usual_K2[:, 0] - usual_K2[:, 1], swapped_K2[:, 1] - swapped_K2[:, 0]
    near = float((np.abs(margins_K) <= _allowed(usual_K2)).mean())
    accuracy, again = float(wins(margins_K).mean()), float(wins(again_K).mean())
    return compared(
        "swap_probe",
        abs(accuracy + again - 1) <= near,
        f"accuracy {again:.4f} with the sides exchanged",
        f"1 - {accuracy:.4f} = {1 - accuracy:.4f}" + (f" ± {near:.4f} for ties" if near else ""),
        _REPORT,
    )


def _same_scores(name: str, found_S: np.ndarray, alone_S: np.ndarray, how: str) -> Check:
    difference, allowed = float(np.abs(found_S - alone_S).max()), _allowed(alone_S)
    return compared(
        name,
        difference <= allowed,
        f"scores {how} differ from those of the answer alone by {difference:.2e} at most",
        f"up to {allowed:.2e}",
        _REPORT,
    )


def _allowed(scores: np.ndarray) -> float:
    return _TOLERANCE * max(1.0, float(np.abs(scores).max()))


@torch.no_grad()
def _alone(model: nn.Module, ids: np.ndarray, computing: Computing) -> float:
    batch = lay_out([TokenSequence(ids, np.ones(len(ids), dtype=np.int64))])
    return float(segment_scores(model, batch.to(computing.device), pad_id=computing.pad_id)[0])


@torch.no_grad()
def _padded(plain: Any, ids: list[np.ndarray], *, pad_id: int) -> np.ndarray:
    width = max(len(row) for row in ids)
    rows = torch.full((len(ids), width), pad_id, dtype=torch.long)
    mask = torch.zeros_like(rows)
    for number, row in enumerate(ids):
        rows[number, : len(row)] = torch.from_numpy(row)
        mask[number, : len(row)] = 1
    device = next(plain.parameters()).device
    scores_MS = [
        member(rows.to(device), attention_mask=mask.to(device)).logits[:, 0].float().cpu().numpy()
        for member in members_of(plain)
    ]
    return np.mean(scores_MS, axis=0)
