"""What a comparison of alignment methods reads of the evaluations: every difference is taken prompt by prompt.

All models answered the same held-out prompts with the same random numbers, so models of different evaluations compare
as those of one do.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stages.config.compare import Combination
from stages.config.compare_results import LEVEL, ComparedModel, Comparison, Estimate, Versus
from stages.config.evaluation import CHAMPION_ROLE, GOLD_AGREEMENT, GOLD_SUITE, JUDGE_SUITE, REWARD_SUITE, Evaluation
from stages.config.graph import GRAPH, Stage
from stages.config.memory import recorded_memory
from stages.config.records import parse_object
from stages.config.request import Manifest
from stages.judge.results import METRICS
from stages.judge.scores import SCORES, Column, ScoreTable
from stages.judge.statistics import interval

_KL, _LENGTH = "kl", "eval/response_length"


@dataclass(frozen=True)
class Measured:
    """The evaluation of one combination."""

    evaluation: Evaluation
    scores: ScoreTable
    role: str
    """Of the model that the combination trained."""
    start: str
    """Of the model that it started from; empty where the evaluation did not measure one."""
    judge: str = ""

    @staticmethod
    def read(folder: Path, *, stage: Stage, uri: str) -> "Measured":
        """Read metrics.json and scores.parquet; raises DataError when they are not what an evaluation publishes."""
        report = parse_object((folder / METRICS).read_bytes(), f"{uri}/{METRICS}")
        evaluation = Evaluation.from_report(report, settings_digest="", uri=uri)
        role = GRAPH[stage].role
        others = {one.against for one in evaluation.comparisons if one.role == role} - {CHAMPION_ROLE}
        judge = report.get("judge")
        named = str(judge.get("model") or "a given model") if isinstance(judge, Mapping) else ""
        return Measured(evaluation, ScoreTable(folder / SCORES), role, min(others, default=""), named)

    def column(self, suite: str) -> Column:
        return self.scores.column(suite, self.role)


def compared_model(number: int, combination: Combination, manifest: Manifest, measured: Measured) -> ComparedModel:
    """Put together what one combination cost and reached."""
    gold, proxy = (_gain(measured, suite) for suite in (GOLD_SUITE, REWARD_SUITE))
    steps = manifest.ledger.get("steps")
    return ComparedModel(
        number=number,
        combination=combination,
        gold=_suite(measured, GOLD_SUITE),
        gold_gain=gold.difference,
        gold_gain_sd=gold.in_deviations,
        gold_win_rate=gold.win_rate,
        judge_win_rate=_suite(measured, JUDGE_SUITE),
        proxy_gain=proxy.difference,
        proxy_gain_sd=proxy.in_deviations,
        kl=_suite(measured, _KL),
        response_length=measured.evaluation.of(measured.role).get(_LENGTH),
        steps=steps if isinstance(steps, int) else None,
        memory=recorded_memory(manifest.execution),
        cost=manifest.cost,
    )


def comparison_of(title: str, models: list[ComparedModel], measured: Mapping[int, Measured]) -> Comparison:
    """Add what is about several models: who wins against whom, and what the scorers are worth."""
    first = next(iter(measured.values()), None)
    return Comparison(
        title=title,
        start=first.start if first else "",
        models=tuple(models),
        versus=tuple(_versus(models, measured)),
        reward_accuracy=first.evaluation.of(GRAPH[Stage.REWARD].role).get("reward/accuracy") if first else None,
        gold_agreement=_suite(first, GOLD_AGREEMENT, role=GRAPH[Stage.GOLD].role) if first else None,
        judge=first.judge if first else "",
        judge_is_proven=first.evaluation.judge_is_proven if first else True,
    )


@dataclass(frozen=True)
class _Gain:
    difference: Estimate | None = None
    in_deviations: float | None = None
    win_rate: Estimate | None = None


def _gain(measured: Measured, suite: str) -> _Gain:
    """The scores of a model against those of its start on a suite."""
    if not measured.start:
        return _Gain()
    ours, theirs = measured.column(suite), measured.scores.column(suite, measured.start)
    both = _paired(ours, theirs)
    if both is None:
        return _Gain()
    difference = _estimate(both.ours - both.theirs, both.clusters)
    deviation = float(np.std(both.theirs))
    in_deviations = difference.value / deviation if difference and deviation > 0 else None
    return _Gain(difference, in_deviations, _estimate(_wins(both), both.clusters))


@dataclass(frozen=True)
class _Paired:
    ours: np.ndarray
    theirs: np.ndarray
    clusters: np.ndarray


def _paired(ours: Column, theirs: Column) -> _Paired | None:
    """The items that both have a score for."""
    _, mine, other = np.intersect1d(
        ours.items.astype(str), theirs.items.astype(str), assume_unique=True, return_indices=True
    )
    if len(mine) == 0:
        return None
    return _Paired(ours.values[mine], theirs.values[other], ours.clusters[mine])


def _wins(both: _Paired) -> np.ndarray:
    """1 where ours scores higher, one half where both are equal."""
    return (both.ours > both.theirs) + 0.5 * (both.ours == both.theirs)


def _versus(models: list[ComparedModel], measured: Mapping[int, Measured]) -> list[Versus]:
    """Each method against each that comes after it, over all betas and seeds that both have. The same prompt of
    several pairs of models is one cluster: it is one prompt."""
    methods = list(dict.fromkeys(model.combination.method for model in models))
    by_key = {
        (model.combination.method, model.combination.beta, model.combination.seed): measured[model.number]
        for model in models
        if model.number in measured
    }
    found = []
    for place, method in enumerate(methods):
        for against in methods[place + 1 :]:
            pairs = [
                both
                for (name, beta, seed), ours in by_key.items()
                if name == method and (theirs := by_key.get((against, beta, seed))) is not None
                if (both := _paired(ours.column(GOLD_SUITE), theirs.column(GOLD_SUITE))) is not None
            ]
            if not pairs:
                continue
            rate = _estimate(
                np.concatenate([_wins(both) for both in pairs]), np.concatenate([both.clusters for both in pairs])
            )
            if rate is not None:
                found.append(Versus(method=method, against=against, win_rate=rate, pairs=len(pairs)))
    return found


def _suite(measured: Measured, suite: str, *, role: str = "") -> Estimate | None:
    """What the evaluation published about a suite."""
    result = measured.evaluation.suites.get(suite)
    score = result.roles.get(role or measured.role) if result else None
    if score is None or score.value is None or score.low is None or score.high is None:
        return None
    return Estimate(value=score.value, low=score.low, high=score.high, items=score.items)


def _estimate(values: Any, clusters: np.ndarray) -> Estimate | None:
    found = interval(np.asarray(values, dtype=np.float64), clusters, level=LEVEL)
    return None if found is None else Estimate(value=found.value, low=found.low, high=found.high, items=found.items)
