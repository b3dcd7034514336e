"""Settings of the closing stages: evaluation, promotion, report."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from stages.config.base import AddedLater, Choice, Config
from stages.config.benchmarks import Benchmark, parse_benchmarks
from stages.config.errors import DataError
from stages.config.judging import GoldSettings, JudgeConfig
from stages.config.names import RunName
from stages.config.records import first_error, parse_json

WIN_RATE, SCORE, PREFERENCE_ACCURACY = "eval/win_rate", "eval/score_mean", "eval/preference_accuracy"
LONGEST_WAIT_HOURS = 10 * 365 * 24.0
"""For a person's answer; beyond some thousand years no calendar can tell when the wait is over."""


class ComparisonConfig(Config):
    """How sure a difference between two models must be; filled from `promote` when a run starts."""

    level: float = Field(default=0.05, gt=0, lt=0.5)
    """Share of equally good models that may be called better: `promote.level`, shared by the aligned models of the
    run."""
    power: float = Field(default=0.9, gt=0, lt=1)
    """Share of the better models that the needed number of items would find: `promote.power`."""
    least_difference: float = Field(default=0.0, ge=0)
    """Smallest difference that the needed number of items is for: `promote.least_difference`."""


class EvaluateConfig(Config):
    """Every model of the run on the same held-out data."""

    max_documents_tokens: int = Field(default=200_000, ge=1)
    """Held-out document tokens that perplexity is measured on."""
    max_documents: Annotated[int, AddedLater(256)] = Field(default=256, ge=1)
    """Held-out documents whose beginnings are the items of the suite `language`: bits per byte, for any tokenizer."""
    max_instructions: int = Field(default=256, ge=1)
    """Held-out conversations that response loss is measured on."""
    max_preferences: int = Field(default=512, ge=1)
    """Held-out pairs that preference accuracy is measured on."""
    max_prompts: int = Field(default=128, ge=1)
    """Held-out prompts that every model answers for scores and win rates."""
    num_samples: int = Field(default=12, ge=1)
    """Prompts whose answers are shown side by side."""
    max_response_length: int = Field(default=48, ge=1)
    """Maximum tokens per answer."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature for scores and win rates; the samples that are shown are greedy."""
    seed: int = Field(default=0, ge=0)
    """Sampling follows from it."""
    benchmarks: Annotated[tuple[str, ...], AddedLater(())] = ()
    """What else models are measured by: a file, a folder, `s3://` or `hf://` with `#name=`, `format=`, `rule=`, ...,
    a task file (.yaml) of lm-evaluation-harness or `lm-eval://task`, or one that needs no address:
    `heldout-continuation`, `heldout-question`, `refusals`, `toxicity` (docs/BENCHMARKS.md)."""
    comparison: Annotated[ComparisonConfig, AddedLater(ComparisonConfig())] = ComparisonConfig()
    """How sure a difference between two models must be; filled from `promote` when a run starts."""
    champion: Annotated[str, AddedLater("")] = ""
    """The champion that the run's models are compared with, `models:/name/version`; filled by Athanor."""
    champion_missing: Annotated[str, AddedLater("")] = ""
    """Why that champion cannot be measured; filled by Athanor."""
    gold: Annotated[GoldSettings, AddedLater(GoldSettings())] = GoldSettings()
    judge: Annotated[JudgeConfig, AddedLater(JudgeConfig())] = JudgeConfig()

    @property
    def parsed_benchmarks(self) -> tuple[Benchmark, ...]:
        """The benchmarks with their options apart."""
        return parse_benchmarks(self.benchmarks)

    @property
    def outside_benchmarks(self) -> tuple[str, ...]:
        """Addresses of those whose content lies outside the pipeline, each once."""
        return tuple(dict.fromkeys(made.uri for made in self.parsed_benchmarks if made.built_in is None))

    @model_validator(mode="after")
    def _benchmarks_are_understood(self) -> "EvaluateConfig":
        parse_benchmarks(self.benchmarks)
        return self


class Sample(Config):
    """One prompt of samples.json with the answers of the run's models; what else it holds is not looked at."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=True)

    prompt: str = ""
    responses: dict[str, str] = Field(default_factory=dict)
    scores: dict[str, float | None] = Field(default_factory=dict)


def read_samples(data: bytes, where: str) -> list[Sample]:
    """Read samples.json of the evaluation at `where`; raises DataError when it is none."""
    found = parse_json(data, f"{where}/samples.json")
    try:
        return TypeAdapter(list[Sample]).validate_python(found)
    except ValidationError as error:
        raise DataError(
            f"{where}/samples.json does not hold prompts with answers: {first_error(error)}",
            advice="Clear the evaluate task to build it again.",
        ) from None


class Promotion(Choice):
    """What happens after the evaluation."""

    AUTO = "auto", "Automatic, when it wins"
    APPROVAL = "approval", "By approval: a person decides"
    NEVER = "never", "Never, candidates only"


class Verdict(StrEnum):
    """The answer to a question about a model or about data."""

    APPROVED = "approved"
    REJECTED = "rejected"
    TIMED_OUT = "timed_out"


class Approval(Config):
    """A person's answer. About the champion it is part of the configuration of `promote`, so it is in its fingerprint
    and its manifest."""

    verdict: Verdict
    """`approved`, `rejected`, or `timed_out`: no answer in time, which counts as a rejection."""
    by: str = ""
    """User who answered; empty without an answer."""
    at: str
    """When, UTC, ISO 8601."""
    comment: str = ""
    """The reason, in the person's own words."""


class Guard(Config):
    """A suite on which the candidate must not be worse by more than a margin."""

    suite: str
    """Its name: `language`, `responses`, a benchmark's, ..."""
    margin: float = Field(ge=0)
    """Most that it may be worse by, in units of the suite: the bound of the interval counts, not the difference."""


class PromoteConfig(Config):
    """Registration in MLflow, and who becomes champion."""

    retired: ClassVar[Mapping[str, str]] = {
        "min_win_rate": "A win rate judged by the run's own reward model no longer decides: see promote.primary, and "
        "promote.margin for promoting a model that is not better.",
    }

    run_name: RunName = "athanor"
    """Prefix of the registered model names."""
    promotion: Promotion = Promotion.AUTO
    """`auto` moves the alias `champion` when the aligned model wins, `approval`: a person decides in Airflow, `never`
    registers candidates only."""
    primary: tuple[str, ...] = Field(default=("gold", "judge", "pairs"), min_length=1)
    """Suites in order of preference: the first that both models were measured on, and that the candidate was not
    trained against, decides. A model that learnt from the reward model is never judged by `score` alone."""
    guards: tuple[Guard, ...] = ()
    """What must not get worse by more than a margin, whatever the primary suite says."""
    level: float = Field(default=0.05, gt=0, lt=0.5)
    """Share of candidates that are no better than the champion and may be promoted all the same. Two aligned models of
    a run have half of it each."""
    power: float = Field(default=0.9, gt=0, lt=1)
    """Share of better candidates that the needed number of items, which every decision states, would find."""
    least_difference: float = Field(default=0.0, ge=0)
    """Smallest difference worth finding, in units of the primary suite; the needed number of items is for it, or for
    the observed difference where that is larger."""
    margin: float = Field(default=0.0, ge=0)
    """With 0 a candidate must be better on the primary suite. More lets one become champion that is worse by at most so
    much, in units of that suite: for retraining that only has to keep up."""
    min_items: int = Field(default=20, ge=2)
    """Comparisons of fewer independent items decide nothing; a guard with fewer is not held."""
    approval_timeout_hours: float = Field(default=168.0, gt=0, le=LONGEST_WAIT_HOURS)
    """Hours that `promotion=approval` waits for a person; after them the model counts as rejected, nothing is lost."""
    approval: Approval | None = None
    """The person's answer, filled in by the pipeline; not to be set by hand."""

    @field_validator("primary")
    @classmethod
    def _each_suite_once(cls, primary: tuple[str, ...]) -> tuple[str, ...]:
        if twice := sorted({suite for suite in primary if primary.count(suite) > 1}):
            raise ValueError(f"{', '.join(twice)} stands there twice; name each suite once, in order of preference")
        return primary

    @field_validator("guards")
    @classmethod
    def _one_margin_each(cls, guards: tuple[Guard, ...]) -> tuple[Guard, ...]:
        names = [guard.suite for guard in guards]
        if twice := sorted({suite for suite in names if names.count(suite) > 1}):
            raise ValueError(f"{', '.join(twice)} has two margins; name each suite once")
        return guards


class ReportConfig(Config):
    """The page that describes the run."""

    title: str = "Athanor"
    """Heading of the page."""
    max_samples: int = Field(default=12, ge=1)
    """Prompts shown side by side."""
