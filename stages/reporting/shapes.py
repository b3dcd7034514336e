"""What the page needs of the records that it shows; the rest is not looked at. Older records lack most of it."""

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter

from stages.config.base import Config


def _with_step(row: dict[str, float | None]) -> dict[str, float | None]:
    if row.get("step") is None:
        raise ValueError("a line without a step")
    return row


def _finite(value: Any) -> Any:
    """JSON's readers accept NaN and infinities; nothing here can be drawn at either."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[float | None, BeforeValidator(_finite)]


class Shape(Config):
    """Fields that are not named are left alone."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=True)


class SuiteScore(Shape):
    """What one model got on one suite, with its 95 % interval."""

    value: Number = None
    low: Number = None
    high: Number = None
    items: int = 0
    skipped: dict[str, int] = Field(default_factory=dict)


class SuiteResult(Shape):
    """One suite."""

    metric: str = ""
    better: Literal["higher", "lower", ""] = ""
    chance: Number = None
    digest: str = ""
    items: int = 0
    roles: dict[str, SuiteScore] = Field(default_factory=dict)


class Compared(Shape):
    """One model minus another on the items of a suite that both have."""

    role: str
    against: str
    suite: str
    difference: Number = None
    low: Number = None
    high: Number = None
    level: Number = None
    p: Number = None
    items: int = 0
    clusters: int = 0
    needed_items: int | None = None


class Evaluated(Shape):
    """metrics.json of an evaluation."""

    models: dict[str, dict[str, float | None]] = Field(default_factory=dict)
    reward: dict[str, float | None] = Field(default_factory=dict)
    unigram_perplexity: float | None = None
    data: dict[str, Any] = Field(default_factory=dict)
    left_out: dict[str, str] = Field(default_factory=dict)
    suites: dict[str, SuiteResult] = Field(default_factory=dict)
    comparisons: tuple[Compared, ...] = ()
    champion: dict[str, Any] = Field(default_factory=dict)


class RegisteredModel(Shape):
    name: str
    version: str = Field(pattern="^[0-9]+$")
    role: str
    model_id: str
    is_new: bool


class Promoted(Shape):
    """promotion.json."""

    promoted: bool = False
    reason: str = ""
    chosen: str | None = None
    models: tuple[RegisteredModel, ...] = ()


EVALUATION, PROMOTION = TypeAdapter(Evaluated), TypeAdapter(Promoted)
HISTORY_ROW = TypeAdapter(Annotated[dict[str, float | None], AfterValidator(_with_step)])
