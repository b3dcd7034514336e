"""What the page needs of the records that it shows; the rest is not looked at. Older records lack most of it."""

from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, field_validator

from stages.config.base import Config
from stages.config.decision import Decision, Ruling
from stages.config.evaluation import ByReason, Compared, MeasuredChampion, SuiteResult


def _with_step(row: dict[str, float | None]) -> dict[str, float | None]:
    if row.get("step") is None:
        raise ValueError("a line without a step")
    return row


class _Shape(Config):
    """Fields that are not named are left alone."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=True)


class Agreement(_Shape):
    """How often a judge prefers what people preferred."""

    accuracy: float
    low: float
    high: float
    items: int
    decided: float = 0.0
    accuracy_decided: float | None = None
    first_place: float | None = None


class AtEqualLength(_Shape):
    """A win rate as if both answers were equally long."""

    win_rate: float
    low: float
    high: float


class Judge(_Shape):
    """A model that judges, and what it is worth."""

    model: str = ""
    method: str = ""
    agreement: Agreement | None = None
    better_than_chance: bool = False
    against: str = ""
    length_controlled: dict[str, AtEqualLength] = Field(default_factory=dict)

    @field_validator("agreement", mode="before")
    @classmethod
    def _empty_is_none(cls, value: Any) -> Any:
        return value or None


class Evaluated(_Shape):
    """metrics.json of an evaluation."""

    models: dict[str, dict[str, float | None]] = Field(default_factory=dict)
    reward: dict[str, float | None] = Field(default_factory=dict)
    unigram_perplexity: float | None = None
    data: dict[str, Any] = Field(default_factory=dict)
    left_out: dict[str, str] = Field(default_factory=dict)
    suites: dict[str, SuiteResult] = Field(default_factory=dict)
    comparisons: tuple[Compared, ...] = ()
    by_reason: tuple[ByReason, ...] = ()
    champion: MeasuredChampion | None = None
    judge: Judge | None = None


class RegisteredModel(_Shape):
    """A version that `promote` made or found."""

    name: str
    version: str = Field(pattern="^[0-9]+$")
    role: str
    model_id: str
    is_new: bool


class Promoted(_Shape):
    """promotion.json."""

    promoted: bool = False
    reason: str = ""
    comparison: str = ""
    chosen: str | None = None
    rulings: tuple[Ruling, ...] = ()
    """Empty in records of releases that decided by win rates."""
    models: tuple[RegisteredModel, ...] = ()

    @property
    def decision(self) -> Decision:
        return Decision(self.promoted, self.reason, self.comparison, self.chosen, self.rulings)


class GateCheck(_Shape):
    """One thing that a gate compared."""

    name: str
    outcome: str
    found: str = ""
    allowed: str = ""
    advice: str = ""


class GatePassed(_Shape):
    """Who let a failed gate pass, and why."""

    by: str = ""
    reason: str = ""


class Gated(_Shape):
    """What a gate looked at."""

    fingerprint: str = ""
    digest: str = ""


class GateFound(_Shape):
    """gate.json of one gate of the run."""

    outcome: str
    artifact: Gated | None = None
    override: GatePassed | None = None
    checks: tuple[GateCheck, ...] = ()
    tables: dict[str, Any] = Field(default_factory=dict)
    at: str = ""


GATE = TypeAdapter(GateFound)
EVALUATION, PROMOTION = TypeAdapter(Evaluated), TypeAdapter(Promoted)
HISTORY_ROW = TypeAdapter(Annotated[dict[str, float | None], AfterValidator(_with_step)])
