"""What the closing stages read of an evaluation's metrics.json: numbers, suites, comparisons, and the conditions.

`evaluate` compares every aligned model with the champion and with the model that it started from, item by item, so
whoever decides needs no arithmetic beyond reading this.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from typing import Any, Literal, TypeVar

from pydantic import FiniteFloat, NonNegativeInt, TypeAdapter, ValidationError

from stages.config.errors import DataError
from stages.config.graph import GRAPH, Stage
from stages.config.records import first_error

CHAMPION_ROLE = "champion"
"""Under which an evaluation keeps what the champion got."""
REWARD_SUITE = "score"
"""The suite whose scorer is the run's reward model, which some models were trained against."""

GOLD_SUITE, GOLD_AGREEMENT = "gold", "gold_agreement"
"""The suite of the gold scorer, and how often that agrees with held-out pairs, under its own role."""

REWARD_PAIRS = "reward"
"""In the place of a suite: how often the run's reward model is right about held-out pairs."""

JUDGE_SUITE = "judge"
"""The suite of a judge that is a model, which must first have shown that it agrees with known pairs."""

_ADVICE = "Clear the evaluate task to build it again."
_T = TypeVar("_T")


@dataclass(frozen=True)
class Conditions:
    """How an evaluation was made, and where it lies; tags of every version that it measured."""

    data_digest: str = ""
    reward_fingerprint: str = ""
    """Of the scorer of the suite `score`; empty without one."""
    settings_digest: str = ""
    """Over version and configuration of the evaluation."""
    uri: str = ""
    """Its artifact, with the value of every item in scores.parquet."""

    def tags(self) -> dict[str, str]:
        """As tags of a model version; an unknown condition is an empty tag, with which `evaluate_model` replaces an
        older value. `promote` leaves empty tags out."""
        return {f"evaluation.{name}": value for name, value in asdict(self).items()}

    @staticmethod
    def from_tags(tags: Mapping[str, str]) -> "Conditions":
        return Conditions(**{field.name: tags.get(f"evaluation.{field.name}", "") for field in fields(Conditions)})


@dataclass(frozen=True)
class Compared:
    """One model compared with another on the items of a suite that both have."""

    role: str
    against: str
    suite: str
    difference: FiniteFloat
    """Mean of `role` minus mean of `against`, in units of the suite."""
    low: FiniteFloat
    high: FiniteFloat
    level: FiniteFloat
    """Rate at which the true difference is below `low`, and at which it is above `high`."""
    p: FiniteFloat
    """Share of equally good models that differ at least so much for the better."""
    items: NonNegativeInt
    clusters: NonNegativeInt
    missing: NonNegativeInt = 0
    """Items that `against` has a score for and `role` has not; unknown, and so 0, in earlier evaluations."""
    needed_items: NonNegativeInt | None = None
    """So many items would find the difference with the stated power; None where there is nothing to find."""


@dataclass(frozen=True)
class SuiteScore:
    """What one model got on a suite."""

    value: FiniteFloat | None = None
    low: FiniteFloat | None = None
    high: FiniteFloat | None = None
    items: NonNegativeInt = 0
    skipped: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class SuiteResult:
    """A suite, and what each model got on it."""

    metric: str = ""
    better: Literal["higher", "lower", ""] = ""
    chance: FiniteFloat | None = None
    digest: str = ""
    items: NonNegativeInt = 0
    roles: dict[str, SuiteScore] = field(default_factory=dict)

    def is_above_chance(self, score: SuiteScore) -> bool:
        """With the whole interval; a value above chance may be luck."""
        if self.chance is None or score.low is None or score.high is None:
            return False
        return score.high < self.chance if self.better == "lower" else score.low > self.chance


@dataclass(frozen=True)
class ByReason:
    """What one model got on the held-out pairs whose raters gave a reason."""

    role: str
    suite: str
    reason: str
    """`helpful`, `honest`, `harmless`, or `none` for pairs without one of them."""
    value: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat
    items: NonNegativeInt


@dataclass(frozen=True)
class MeasuredChampion:
    """The champion that an evaluation measured next to the run's models, or why it could not."""

    name: str = ""
    version: str = ""
    fingerprint: str = ""
    digest: str = ""
    uri: str = ""
    missing: str = ""


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured."""

    metrics: dict[str, dict[str, float]]
    """By role of the model."""
    conditions: Conditions = Conditions()
    suites: dict[str, SuiteResult] = field(default_factory=dict)
    comparisons: tuple[Compared, ...] = ()
    champion: MeasuredChampion | None = None
    judge_is_proven: bool = True
    """Whether the judge that is a model agrees with known pairs more often than chance."""

    @staticmethod
    def from_report(report: Mapping[str, Any], *, settings_digest: str, uri: str = "") -> "Evaluation":
        """Read the content of an evaluation's metrics.json; of the metrics, what is no finite number is left out.

        Raises DataError when it names no models, or when suites or comparisons are not what they should be.
        """
        models = report.get("models") if isinstance(report, Mapping) else None
        if not isinstance(models, dict) or not all(isinstance(numbers, dict) for numbers in models.values()):
            raise DataError(
                "metrics.json of the evaluation has no object `models` with the numbers of each model",
                advice=_ADVICE,
            )
        measured = {**models, GRAPH[Stage.REWARD].role: _object(report, "reward")}
        return Evaluation(
            metrics={role: _finite(values) for role, values in measured.items()},
            conditions=Conditions(
                data_digest=str(_object(report, "data").get("digest") or ""),
                reward_fingerprint=str(report.get("reward_fingerprint") or ""),
                settings_digest=settings_digest,
                uri=uri,
            ),
            suites=_read(dict[str, SuiteResult], report, "suites", {}),
            comparisons=tuple(_read(list[Compared], report, "comparisons", [])),
            champion=_read(MeasuredChampion | None, report, "champion", None),
            judge_is_proven=_object(report, "judge").get("better_than_chance", True) is True,
        )

    def of(self, role: str) -> dict[str, float]:
        return self.metrics.get(role, {})

    def gold_is_proven(self, *, min_items: int) -> bool:
        """Whether the gold scorer agrees with known pairs more often than chance; true where none were there to ask it
        about."""
        measured = self.suites.get(GOLD_AGREEMENT)
        known = measured.roles.get(GRAPH[Stage.GOLD].role) if measured else None
        if known is None or known.low is None:
            return True
        return known.low > 0.5 and known.items >= min_items

    def compared(self, role: str, *, against: str, suite: str) -> Compared | None:
        """Return the comparison of two models on a suite, None when there is none."""
        wanted = (role, against, suite)
        return next((one for one in self.comparisons if (one.role, one.against, one.suite) == wanted), None)


def _read(kind: Any, report: Mapping[str, Any], name: str, missing: _T) -> _T:
    """Earlier evaluations have none of these."""
    if report.get(name) is None:
        return missing
    try:
        return _adapter(kind).validate_python(report[name])
    except ValidationError as error:
        raise DataError(
            f"metrics.json of the evaluation: {name} is not valid: {first_error(error)}", advice=_ADVICE
        ) from None


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


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
