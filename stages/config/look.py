"""What crosses between Airflow and the job that looks at a run's given models and benchmarks before anything is spent.

The request and what comes back lie under `runs/<run id>/look/`, by the names that a stage's records have.
"""

from typing import Any, ClassVar

from pydantic import Field

from stages.config.base import Config
from stages.config.execution import ExecutionConfig
from stages.config.graph import Stage, trained_stages
from stages.config.pipeline import PipelineConfig
from stages.config.request import ArtifactRef, RunInfo
from stages.config.text import compact
from stages.config.train import ModelConfig

LOOK = "look"
"""Folder of its records under a run's."""


class GivenModel(Config):
    """A model that the run is given, by the role that it has in it."""

    role: str
    """`base_model`, `reward_model`, `reward_base`, or the role of a stage's model in a re-evaluation."""
    uri: str
    """The address as it was given, or that of the artifact."""
    artifact: ArtifactRef | None = None
    """What the address led to, where it is an artifact of ours."""


class LookRequest(Config):
    """All that the job needs to know: `runs/<run id>/look/config.json`."""

    name: ClassVar = LOOK
    run: RunInfo
    store_uri: str
    config: dict[str, Any]
    """The run's PipelineConfig, JSON form; validated again by the job."""
    models: tuple[GivenModel, ...]
    execution: ExecutionConfig = ExecutionConfig()
    """Where the job's own process runs, and how long it may wait for that."""
    try_number: int = 1
    submission_id: str = ""


class ModelFacts(Config):
    """What the look found out about one model."""

    role: str
    uri: str
    revision: str = ""
    """Of a hub id: the commit that was looked at. It is not pinned for the stages, which pin what they find."""
    architecture: str = ""
    """The class in transformers; empty where the model was not opened, see `notes`."""
    parameters: int | None = None
    vocab_size: int | None = None
    """Rows of the embedding."""
    context: int | None = None
    """Positions that the model has; None where it names no limit."""
    shape: ModelConfig | None = None
    """Its measures, where they can be said in our own terms; estimates of memory and time come from them."""
    template: str = ""
    """Where its chat template comes from, and how the assistant's turns are found in it."""
    memory_bytes: dict[str, float] = Field(default_factory=dict)
    """Estimate for one worker, by stage."""
    notes: tuple[str, ...] = ()
    """What the look had to leave to the stages, and why."""
    warnings: tuple[str, ...] = ()
    """What will probably go wrong."""

    def summary(self) -> str:
        """Say it in one line."""
        size = f"{compact(self.parameters)} parameters" if self.parameters is not None else ""
        words = f"vocabulary {self.vocab_size}" if self.vocab_size is not None else ""
        context = f"context {self.context}" if self.context is not None else "no limit of its context"
        known = [self.architecture, size, words, context, self.template] if self.architecture else []
        return f"{self.role}={self.uri!r}: " + ("; ".join([*filter(None, known), *self.notes]) or "nothing is known")


class BenchmarkFacts(Config):
    """What the look found out about one suite of a benchmark."""

    uri: str
    suite: str
    metric: str
    items: int
    bad: dict[str, int] = Field(default_factory=dict)
    """Rows that are no items, by reason."""

    def summary(self) -> str:
        """Say it in one line."""
        bad = f"; rows that are no items: {self.bad}" if self.bad else ""
        return f"benchmarks={self.uri!r}: suite {self.suite}, {self.items} items, {self.metric}{bad}"


class Look(Config):
    """The job's result: `runs/<run id>/look/result.json`."""

    models: tuple[ModelFacts, ...] = ()
    benchmarks: tuple[BenchmarkFacts, ...] = ()

    def suites(self) -> dict[str, list[str]]:
        """Names of the suites that each benchmark has, by its address."""
        found: dict[str, list[str]] = {}
        for facts in self.benchmarks:
            found.setdefault(facts.uri, []).append(facts.suite)
        return found

    def of(self, role: str) -> ModelFacts | None:
        return next((facts for facts in self.models if facts.role == role), None)


def look_key(run_id: str, name: str) -> str:
    return f"runs/{run_id}/{LOOK}/{name}"


def given_benchmarks(config: PipelineConfig) -> tuple[str, ...]:
    """The addresses of the benchmarks that a run reads from outside."""
    return config.evaluate.outside_benchmarks if Stage.EVALUATE in config.selected else ()


def given_models(config: PipelineConfig) -> tuple[GivenModel, ...]:
    """The models that a run is given, the one that its policy starts from first."""
    found = [_given(role, address, config) for role, address in config.given_models.items()]
    if config.only is not None:
        found += [_given(spec.role, "", config) for spec in trained_stages()]
    return tuple(model for model in found if model.uri)


def _given(role: str, address: str, config: PipelineConfig) -> GivenModel:
    artifact = config.given.get(role)
    return GivenModel(role=role, uri=artifact.uri if artifact else address, artifact=artifact)
