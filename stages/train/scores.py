"""What a trained reward model scores: the mean and spread of answers that it has seen and of held-out ones.

Scores of a Bradley-Terry model have no unit. Whoever uses them later, such as PPO, finds here what they are measured
by, and a gate whether training and held-out answers are scored alike. Kept next to the model, in `scores.json`.

Shape legend: P pairs.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from stages.data.tokens.packing import Packed
from stages.data.tokens.views import Split, evenly
from stages.models.forward import segment_scores
from stages.train.engine import Engine
from stages.train.pairs import Pairs, PairSteps
from stages.train.plan import in_step, share

FILE = "scores.json"

Scores = Mapping[Split, np.ndarray]
"""Scores of chosen and rejected answers by split, shape (P, 2)."""


def scores_of_answers(
    engine: Engine, steps: PairSteps, pairs: Mapping[Split, tuple[Pairs, np.ndarray]], *, pad_id: int, at_most: int
) -> Scores:
    """Score the answers of at most `at_most` pairs of each split, evenly spread, by the part `reward`; `pairs` names
    those that may be taken. The same on every rank, in the order of the pairs."""

    def score(parts: nn.ModuleDict, batch: Packed) -> Tensor:
        return segment_scores(parts["reward"], batch, pad_id=pad_id)

    found: dict[Split, np.ndarray] = {}
    for split, (view, allowed) in pairs.items():
        chosen = allowed[evenly(len(allowed), at_most=at_most)] if len(allowed) else allowed
        if not len(chosen):
            found[split] = np.empty((0, 2))
            continue
        mine = share(np.arange(len(chosen)), rank=engine.rank, world_size=engine.world_size)
        batches = steps.micro_batches(view, chosen[mine]) if len(mine) else []
        spare = batches[0] if batches else steps.micro_batches(view, chosen[:1])[0]
        parts: list[np.ndarray] = []
        for batch, counted in in_step(engine, batches, spare=spare):
            scores_S = engine.infer(score, batch).float().cpu().numpy()
            parts += [scores_S] if counted else []
        both = np.concatenate(parts).reshape(-1, 2).tolist() if parts else []
        numbered = engine.gather(list(zip(mine.tolist(), both, strict=True)))
        found[split] = np.asarray([sides for _, sides in sorted(numbered)], dtype=np.float64)
    return found


def score_metrics(scores: Scores) -> dict[str, float]:
    """Mean and spread over held-out answers as metrics; nothing where none are held out."""
    held = scores[Split.HELDOUT]
    return {"eval/score_mean": float(held.mean()), "eval/score_std": float(held.std())} if held.size else {}


def write_statistics(folder: Path, members: Sequence[Scores]) -> None:
    """Write the statistics of a model, or of an ensemble's mean score and of each of its members."""
    mean = {split: np.mean([scores[split] for scores in members], axis=0) for split in members[0]}
    told: dict[str, Any] = _statistics(mean)
    if len(members) > 1:
        told["members"] = [_statistics(scores) for scores in members]
    (folder / FILE).write_text(json.dumps(told, indent=1))


def _statistics(scores: Scores) -> dict[str, Any]:
    return {
        split.value: {"mean": float(values.mean()), "std": float(values.std()), "answers": values.size}
        for split, values in scores.items()
        if values.size
    }
