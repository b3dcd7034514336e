"""The records of a gate: what its job is asked, what the job found, and the outcome that is kept with the run.

They lie under `runs/<run id>/gate_<stage>/`; `gate.json` there is the outcome, with the evidence for it. What a job
found is kept once more under `gates/<fingerprint>/`, by all that it depends on, so that no job measures it twice.
"""

import hashlib
import json
from enum import StrEnum
from typing import Any

from pydantic import Field

from stages.config.base import Config
from stages.config.execution import ExecutionConfig
from stages.config.gates import GATE_VERSION, gate_name
from stages.config.graph import Stage
from stages.config.request import ArtifactRef, GateQuestions, Metrics, RunInfo, StageRequest

GATE_RECORD = "gate.json"
NO_PAIRS = "there are no held-out preference pairs"
"""Why a reward model was not measured: no stage of the run needs pairs, or none was held out."""
WANT_OF_COMPUTE = "FLOPs"
"""In the words of every check that was left out because another machine could have made it, and of no other."""


class Outcome(StrEnum):
    """Of one check."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"
    """It could not be made, or is not about this artifact; `found` says why."""


class Check(Config):
    """One thing that was compared."""

    name: str
    """Such as `chat_template`, or the metric of a bound."""
    outcome: Outcome
    found: str
    """What there is, with its number."""
    allowed: str = ""
    """What there must be, with its number."""
    advice: str = ""
    """What to do, for a check that failed."""

    def in_words(self) -> str:
        if self.outcome is not Outcome.FAILED:
            return f"{self.name}: {self.found}" + (f" ({self.allowed})" if self.allowed else "")
        return f"{self.name}: {self.found}; allowed: {self.allowed}. {self.advice}".rstrip()


def passed(name: str, found: str, allowed: str = "") -> Check:
    return Check(name=name, outcome=Outcome.PASSED, found=found, allowed=allowed)


def failed(name: str, found: str, allowed: str, advice: str) -> Check:
    return Check(name=name, outcome=Outcome.FAILED, found=found, allowed=allowed, advice=advice)


def skipped(name: str, why: str) -> Check:
    return Check(name=name, outcome=Outcome.SKIPPED, found=why)


def compared(name: str, same: bool, found: str, allowed: str, advice: str) -> Check:
    return passed(name, found, allowed) if same else failed(name, found, allowed, advice)


class Findings(Config):
    """What the job measured on the published artifact: `runs/<run id>/gate_<stage>/result.json`."""

    checks: tuple[Check, ...] = ()
    metrics: Metrics = Field(default_factory=dict)
    """Numbers that bounds may name, such as those of a reward model's acceptance."""
    unmeasured: dict[str, str] = Field(default_factory=dict)
    """Metrics of that kind that could not be measured, with the reason."""
    tables: dict[str, Any] = Field(default_factory=dict)
    """Numbers by group, for people and the report: accuracy by source and by difference of length."""
    seconds: float = 0.0

    @property
    def worth_another_look(self) -> str:
        """Why these findings are measured again when they are asked for; empty where they can be kept."""
        for check in self.checks:
            if check.outcome is Outcome.FAILED:
                return f"{check.name} failed"
            if check.outcome is Outcome.SKIPPED and WANT_OF_COMPUTE in check.found:
                return f"{check.name} was left out: {check.found}"
        return next((f"{name}: {why}" for name, why in self.unmeasured.items() if WANT_OF_COMPUTE in why), "")


class GateRequest(GateQuestions):
    """What the job is asked: `runs/<run id>/gate_<stage>/config.json`."""

    stage: Stage
    run: RunInfo
    store_uri: str
    artifact: ArtifactRef
    """What the stage published."""
    inputs: dict[str, ArtifactRef] = Field(default_factory=dict)
    """What the run gave the stage, by role."""
    is_given: bool = False
    """The run was given the artifact instead of making it: a reward model. Where it comes from is not the run's to
    check; it is asked about the run's data."""
    gold: ArtifactRef | None = None
    """A scorer that training never saw, for the best of n."""
    earlier: ArtifactRef | None = None
    """The reward model that the run's start was trained with: the new one is compared with it."""
    execution: ExecutionConfig = ExecutionConfig()
    task_id: str = ""
    try_number: int = 1
    submission_id: str = ""

    @property
    def name(self) -> str:
        """Of its folder under the run's."""
        return gate_name(self.stage)

    @property
    def identity(self) -> str:
        """Hash over all that decides what the job finds."""
        fields = {
            "version": GATE_VERSION,
            "artifact": [self.artifact.fingerprint, self.artifact.digest],
            "inputs": {role: ref.digest for role, ref in self.inputs.items()},
            "is_given": self.is_given,
            "gold_scorer": self.gold.digest if self.gold else "",
            "max_pairs": self.max_pairs,
            "on_gpu": self.execution.gpus_per_worker > 0,  # a CPU leaves out what takes too long
            "max_response_length": self.max_response_length if self.gold else 0,
            **({"earlier": self.earlier.digest} if self.earlier else {}),  # without one, as before there was any
        }
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def asked_of(request: StageRequest, artifact: ArtifactRef) -> GateRequest | None:
    """What the stage's gate will ask about the artifact that the stage has published; None where it asks nothing."""
    if request.gate is None:
        return None
    return GateRequest(
        **request.gate.model_dump(),
        stage=request.stage,
        run=request.run,
        store_uri=request.store_uri,
        artifact=artifact,
        inputs=request.inputs,
        execution=request.execution,
    )


class GateOverride(Config):
    """Who let a failed gate pass."""

    by: str
    """The user who triggered the run; empty where Airflow knows none."""
    reason: str


class GateRecord(Config):
    """The outcome of a gate, with its evidence: `runs/<run id>/gate_<stage>/gate.json`."""

    stage: Stage
    artifact: ArtifactRef
    is_given: bool = False
    """The run was given the artifact."""
    version: int = GATE_VERSION
    outcome: Outcome
    """`failed` also where a person let it pass, see `override`."""
    override: GateOverride | None = None
    bounds: tuple[str, ...] = ()
    checks: tuple[Check, ...] = ()
    metrics: Metrics = Field(default_factory=dict)
    tables: dict[str, Any] = Field(default_factory=dict)
    job: str = ""
    """`none`: no job was needed; `kept`: what the training process or an earlier job found; else the id of its job."""
    seconds: float = 0.0
    """Of the job's own work."""
    at: str
    """When, UTC, ISO 8601."""

    @property
    def failures(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.outcome is Outcome.FAILED)

    @property
    def lets_pass(self) -> bool:
        return self.outcome is not Outcome.FAILED or self.override is not None

    def summary(self) -> str:
        """Say it in one line."""
        count = {outcome: sum(check.outcome is outcome for check in self.checks) for outcome in Outcome}
        words = ", ".join(f"{number} {outcome}" for outcome, number in count.items() if number)
        if self.override:
            return f"{words}; passed by {self.override.by or 'an unnamed user'}: {self.override.reason}"
        return words


def gate_key(run_id: str, stage: Stage, name: str = GATE_RECORD) -> str:
    """Key of one of a gate's records in a run."""
    return f"runs/{run_id}/{gate_name(stage)}/{name}"


def findings_key(request: GateRequest) -> str:
    """Where what a job found is kept."""
    return f"gates/{request.artifact.fingerprint}/{request.identity}.json"
