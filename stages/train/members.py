"""The members of an ensemble, trained one after another in one stage: each exactly as it would be trained alone.

Memory is that of one model. A member that is done leaves its last checkpoint, so a stage that is killed later loads it
and goes on with the next one. Steps are counted over all members: the series of the second begins where that of the
first ends.
"""

import hashlib
import json
import logging
from dataclasses import replace
from typing import Any

import numpy as np

from stages.config.preferences import RewardConfig
from stages.data.tokens.views import Split
from stages.job.context import StageContext, StageOutcome
from stages.models.ensemble import place_of_member, write_record
from stages.train.run import Place, Prepare, Trained, train_model
from stages.train.scores import Scores, score_metrics, write_statistics

logger = logging.getLogger(__name__)


def member_seed(seed: int, number: int) -> int:
    """The seed of a member. The first has that of the stage; those of the others are far from the stages' own seeds,
    which lie next to each other."""
    if number == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"member {number} of {seed}".encode()).digest()[:4], "big")


def train_members_on_worker(context: StageContext, prepare: Prepare) -> StageOutcome:
    """Train all members and export them into one folder: the body that runs on every worker."""
    config = context.config
    assert isinstance(config, RewardConfig)
    seeds = [member_seed(config.seed, number) for number in range(config.ensemble_size)]
    members: list[Trained] = []
    for number, seed in enumerate(seeds):
        logger.info("member %d of %d, seed %d", number + 1, len(seeds), seed)
        folder = place_of_member(context.output_dir, number)
        folder.mkdir(parents=True, exist_ok=True)
        alone = replace(context, config=config.model_copy(update={"seed": seed}), output_dir=folder)
        members.append(train_model(alone, prepare, Place(number, len(seeds))))
    scores = [member.scores for member in members if member.scores is not None]
    metrics = _mean_metrics(members) | score_metrics(_mean_scores(scores)) | _spread_metrics(scores)
    if members[0].is_main:
        write_record(context.output_dir, seeds=seeds)
        write_statistics(context.output_dir, scores)
        _join_histories(context, members, metrics)
    first = members[0].outcome
    return StageOutcome(
        metrics=metrics,
        # The first member's: data and lengths of all are the same.
        ledger=first.ledger | {"steps": sum(member.outcome.ledger["steps"] for member in members)},
        execution=first.execution,
    )


def _join_histories(context: StageContext, members: list[Trained], metrics: dict[str, float]) -> None:
    """One history for the stage, as MLflow has it, in the place of those of the members. Its last row is that of the
    ensemble, one step behind its last member: a step has one value of a metric."""
    lines: list[str] = []
    before = 0
    for number, member in enumerate(members):
        lines += [json.dumps({**row, "step": before + row["step"]}) + "\n" for row in member.history]
        before += member.history[-1]["step"]
        (place_of_member(context.output_dir, number) / "history.jsonl").unlink()
    lines.append(json.dumps({"step": before + 1, **metrics}) + "\n")
    (context.output_dir / "history.jsonl").write_text("".join(lines))


def _mean_metrics(members: list[Trained]) -> dict[str, float]:
    """Metrics of the models that were chosen, averaged: margins are then those of the ensemble's mean score."""
    return {name: float(np.mean([member.outcome.metrics[name] for member in members])) for name in _common(members)}


def _common(members: list[Trained]) -> list[str]:
    names: set[str] = set.intersection(*({*member.outcome.metrics} for member in members))
    return sorted(names)


def _mean_scores(members: list[Scores]) -> Scores:
    return {split: np.mean([scores[split] for scores in members], axis=0) for split in Split}


def _spread_metrics(members: list[Scores]) -> dict[str, float]:
    """How right the mean of the members is, and how far they are apart on an answer, over held-out pairs."""
    held: Any = np.stack([scores[Split.HELDOUT] for scores in members])
    if not held.size:
        return {}
    margins_P = held.mean(axis=0)[:, 0] - held.mean(axis=0)[:, 1]
    right = (margins_P > 0) + 0.5 * (margins_P == 0)
    return {"eval/ensemble_accuracy": float(right.mean()), "eval/score_spread": float(held.std(axis=0).mean())}
