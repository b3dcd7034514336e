"""Which model becomes champion, and why: the rules alone, without MLflow, so that every branch can be tested.

Two scores compare when they were measured by the same judge on the same data with the same settings. Then the higher
mean reward score wins. Otherwise the scores say nothing about each other, and the win rate of the candidate against
the model that it was aligned from decides. A run without a judge has neither: then the accuracy of the candidate's
implicit reward on held-out preference pairs decides, which must be better than chance, and better than a champion's
that was measured on the same pairs. With `promotion=approval` a person has decided before, and that decision stands
whatever the numbers say; the reason states both.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from stages.config.closing import PREFERENCE_ACCURACY, SCORE, WIN_RATE, Approval, PromoteConfig, Promotion, Verdict
from stages.config.errors import ConfigError, DataError
from stages.config.graph import GRAPH, Stage

CANDIDATE, CHAMPION, PREVIOUS = "candidate", "champion", "previous"
"""Aliases of registered models in MLflow."""

CHANCE = 0.5
"""Preference accuracy of a model that prefers neither answer; ties count one half."""


@dataclass(frozen=True)
class Conditions:
    """How a score was measured; scores compare only when all conditions are known and equal."""

    data_digest: str = ""
    reward_fingerprint: str = ""
    """Of the judge; empty without one."""
    settings_digest: str = ""
    """Over version and configuration of the evaluation."""

    def tags(self) -> dict[str, str]:
        """As tags of a model version; an unknown condition is an empty tag, with which `evaluate_model` replaces an
        older value. `promote` leaves empty tags out."""
        return {f"evaluation.{name}": value for name, value in asdict(self).items()}

    @staticmethod
    def from_tags(tags: Mapping[str, str]) -> "Conditions":
        return Conditions(**{field.name: tags.get(f"evaluation.{field.name}", "") for field in fields(Conditions)})

    def allow_comparison(self, other: "Conditions") -> bool:
        return all(asdict(self).values()) and self == other

    def allow_comparison_of_pairs(self, other: "Conditions") -> bool:
        """Whether accuracies on preference pairs compare, which no judge has a part in."""
        mine, theirs = ((one.data_digest, one.settings_digest) for one in (self, other))
        return all(mine) and mine == theirs


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured: metrics by role of the model, and under which conditions."""

    metrics: dict[str, dict[str, float]]
    conditions: Conditions = Conditions()

    @staticmethod
    def from_report(report: Mapping[str, Any], *, settings_digest: str) -> "Evaluation":
        """Read the content of an evaluation's metrics.json; values that are not finite numbers are left out.

        Raises DataError when it names no models.
        """
        models = report.get("models") if isinstance(report, Mapping) else None
        if not isinstance(models, dict) or not all(isinstance(numbers, dict) for numbers in models.values()):
            raise DataError(
                "metrics.json of the evaluation has no object `models` with the numbers of each model",
                advice="Clear the evaluate task to build it again.",
            )
        measured = {**models, GRAPH[Stage.REWARD].role: _object(report, "reward")}
        return Evaluation(
            metrics={role: _finite(values) for role, values in measured.items()},
            conditions=Conditions(
                data_digest=str(_object(report, "data").get("digest") or ""),
                reward_fingerprint=str(report.get("reward_fingerprint") or ""),
                settings_digest=settings_digest,
            ),
        )

    def of(self, role: str) -> dict[str, float]:
        return self.metrics.get(role, {})


@dataclass(frozen=True)
class Candidate:
    """The aligned model that may become champion, as this run measured it."""

    fingerprint: str
    metrics: dict[str, float]
    conditions: Conditions


@dataclass(frozen=True)
class Champion:
    """The champion before this run, with the evaluation that the tags of its version record."""

    version: str
    fingerprint: str
    metrics: dict[str, float]
    conditions: Conditions

    @staticmethod
    def from_tags(version: str, tags: Mapping[str, str]) -> "Champion":
        return Champion(
            version=version,
            fingerprint=tags.get("lineage.fingerprint", ""),
            metrics=_finite({key: value for key, value in tags.items() if key.startswith("eval/")}),
            conditions=Conditions.from_tags(tags),
        )


@dataclass(frozen=True)
class Decision:
    """Whether the candidate becomes champion, and why in words for people."""

    promoted: bool
    reason: str
    comparison: str
    """`score`, `win_rate`, `preference_accuracy`, `same_model`, `person` or `none`: what decided."""


def choose_aligned(roles: Iterable[str], evaluation: Evaluation) -> str | None:
    """Return the role with the highest win rate against the start; ties, and runs without a judge, go by score, then by
    preference accuracy, then by order. None without roles."""

    def strength(role: str) -> tuple[float, ...]:
        measured = evaluation.of(role)
        return tuple(measured.get(key, -math.inf) for key in (WIN_RATE, SCORE, PREFERENCE_ACCURACY))

    return max(roles, key=strength, default=None)


def decide(candidate: Candidate, champion: Champion | None, config: PromoteConfig) -> Decision:
    """Decide whether the candidate becomes champion.

    Raises ConfigError when a person should have decided and `config` has no answer.
    """
    if config.promotion is Promotion.NEVER:
        return Decision(False, "promotion=never: the models are registered as candidates only", "none")
    by_numbers = _decide_by_numbers(candidate, champion, min_win_rate=config.min_win_rate)
    if config.promotion is not Promotion.APPROVAL:
        return by_numbers
    if config.approval is None:
        raise ConfigError(
            "promotion=approval needs a decision, and promote.approval is empty",
            advice="Clear the task `approve` together with its downstream tasks.",
        )
    return _decide_by_person(config.approval, by_numbers)


def _decide_by_person(approval: Approval, by_numbers: Decision) -> Decision:
    """Rejecting a model that is champion already takes nothing from it: the previous champion stays."""
    promoted = approval.verdict is Verdict.APPROVED
    if approval.verdict is Verdict.TIMED_OUT:
        verdict = f"no decision until {approval.at}, which counts as a rejection"
    else:
        verdict = f"{approval.verdict.value} by {approval.by or 'an unnamed user'} at {approval.at}"
    reason = f"{verdict}: {approval.comment}" if approval.comment else verdict
    if by_numbers.comparison == "same_model":
        return Decision(promoted, f"{reason}; {by_numbers.reason}", "same_model" if promoted else "person")
    agree = "agree" if by_numbers.promoted == promoted else "disagree"
    return Decision(promoted, f"{reason}; the numbers {agree}: {by_numbers.reason}", "person")


def _decide_by_numbers(candidate: Candidate, champion: Champion | None, *, min_win_rate: float) -> Decision:
    if champion and champion.fingerprint == candidate.fingerprint:
        return Decision(True, f"the model is champion already (version {champion.version})", "same_model")
    if (
        champion
        and candidate.conditions.allow_comparison(champion.conditions)
        and SCORE in candidate.metrics
        and SCORE in champion.metrics
    ):
        new, old = candidate.metrics[SCORE], champion.metrics[SCORE]
        verb = "beats" if new > old else "does not beat"
        reason = (
            f"mean reward score {new:.4f} {verb} {old:.4f} of the champion (version {champion.version}) "
            "on the same prompts with the same reward model"
        )
        return Decision(new > old, reason, "score")
    if champion is None:
        why = "there is no champion yet"
    else:
        why = (
            f"the champion (version {champion.version}) was evaluated on other data, by another reward model or with "
            "other settings, so its scores do not compare"
        )
    win_rate = candidate.metrics.get(WIN_RATE)
    if win_rate is None:
        return _decide_by_pairs(candidate, champion)
    wins = win_rate >= min_win_rate
    relation = "reaches" if wins else "is below"
    against = "against the model that it started from"
    reason = f"{why}; win rate {win_rate:.3f} {against} {relation} min_win_rate={min_win_rate:g}"
    return Decision(wins, reason, "win_rate")


def _decide_by_pairs(candidate: Candidate, champion: Champion | None) -> Decision:
    """Without a judge: does the candidate, relative to its start, prefer what people chose, and more often than the
    champion does?"""
    no_judge = "no reward model has judged its answers"
    accuracy = candidate.metrics.get(PREFERENCE_ACCURACY)
    if accuracy is None:
        return Decision(False, f"{no_judge}, and there are no held-out preference pairs to measure it on", "none")
    found = f"{no_judge}; it prefers the chosen answer in {accuracy:.1%} of the held-out pairs"
    if accuracy <= CHANCE:
        return Decision(False, f"{found}, which is not above chance ({CHANCE:.0%})", "preference_accuracy")
    if champion is None:
        return Decision(True, f"{found}, above chance ({CHANCE:.0%}); there is no champion yet", "preference_accuracy")
    before = champion.metrics.get(PREFERENCE_ACCURACY)
    who = f"the champion (version {champion.version})"
    if before is None or not candidate.conditions.allow_comparison_of_pairs(champion.conditions):
        reason = f"{found}, above chance ({CHANCE:.0%}); {who} was not measured on these pairs with these settings"
        return Decision(True, reason, "preference_accuracy")
    relation = "more" if accuracy > before else "not more"
    return Decision(accuracy > before, f"{found}, {relation} than {who} with {before:.1%}", "preference_accuracy")


def _object(report: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = report.get(name)
    return found if isinstance(found, dict) else {}


def _finite(values: Mapping[str, Any]) -> dict[str, float]:
    numbers = {}
    for key, value in values.items():
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            continue  # the evaluation also holds tables and texts
        if math.isfinite(number):
            numbers[key] = number
    return numbers
