"""Settings of the closing stages: evaluation, promotion, report."""

from enum import StrEnum
from typing import Annotated

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from stages.config.base import AddedLater, Choice, Config
from stages.config.benchmarks import Benchmark, parse_benchmarks
from stages.config.errors import DataError
from stages.config.names import RunName
from stages.config.records import first_error, parse_json

WIN_RATE, SCORE, PREFERENCE_ACCURACY = "eval/win_rate", "eval/score_mean", "eval/preference_accuracy"
LONGEST_WAIT_HOURS = 10 * 365 * 24.0
"""For a person's answer; beyond some thousand years no calendar can tell when the wait is over."""


class EvaluateConfig(Config):
    """Every model of the run on the same held-out data."""

    max_documents_tokens: int = Field(default=200_000, ge=1)
    """Held-out document tokens that perplexity is measured on."""
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
    `heldout-continuation`, `heldout-question`, `refusals`, `toxicity`, `response-length`, `repetition`
    (docs/BENCHMARKS.md)."""

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
    """The answer to the question whether a model becomes champion."""

    APPROVED = "approved"
    REJECTED = "rejected"
    TIMED_OUT = "timed_out"


class Approval(Config):
    """A person's answer; part of the configuration of `promote`, so it is in its fingerprint and its manifest."""

    verdict: Verdict
    """`approved`, `rejected`, or `timed_out`: no answer in time, which counts as a rejection."""
    by: str = ""
    """User who answered; empty without an answer."""
    at: str
    """When, UTC, ISO 8601."""
    comment: str = ""
    """The reason, in the person's own words."""


class PromoteConfig(Config):
    """Registration in MLflow."""

    run_name: RunName = "athanor"
    """Prefix of the registered model names."""
    promotion: Promotion = Promotion.AUTO
    """`auto` moves the alias `champion` when the aligned model wins, `approval`: a person decides in Airflow, `never`
    registers candidates only."""
    min_win_rate: float = Field(default=0.5, ge=0, le=1)
    """Win rate, against the model that it was aligned from, that a model needs to become champion; a person may decide
    otherwise. Without a reward model, preference accuracy above 0.5 takes its place."""
    approval_timeout_hours: float = Field(default=168.0, gt=0, le=LONGEST_WAIT_HOURS)
    """Hours that `promotion=approval` waits for a person; after them the model counts as rejected, nothing is lost."""
    approval: Approval | None = None
    """The person's answer, filled in by the pipeline; not to be set by hand."""


class ReportConfig(Config):
    """The page that describes the run."""

    title: str = "Athanor"
    """Heading of the page."""
    max_samples: int = Field(default=12, ge=1)
    """Prompts shown side by side."""
