"""What a verb is given: its config, its inputs as local folders, a place to write, and ways to report."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.artifacts.lease import Fence
from stages.artifacts.manifests import fetch
from stages.artifacts.store import Store
from stages.config.base import Config
from stages.config.errors import ConfigError, StageError
from stages.config.execution import ExecutionConfig
from stages.config.graph import BASE_MODEL, Stage
from stages.config.request import ArtifactRef, FileEntry, RunInfo, SourceEntry, StageRequest
from stages.job.progress import Progress
from stages.tracking.tracker import NullTracker, Tracker


@dataclass(frozen=True)
class StageOutcome:
    """What a verb hands back; its files lie in `output_dir`."""

    metrics: dict[str, float] = field(default_factory=dict)
    ledger: dict[str, Any] = field(default_factory=dict)
    files: tuple[FileEntry, ...] = ()
    """Files that a worker on another machine has already uploaded."""
    execution: dict[str, Any] = field(default_factory=dict)
    """How it ran, where the execution config leaves that to the hardware; recorded in the manifest."""


@dataclass(frozen=True)
class StageContext:
    """One attempt at one stage. Inputs are verified when they are first opened."""

    request: StageRequest
    config: Config
    fingerprint: str
    sources: tuple[SourceEntry, ...]
    """What the stage reads from outside, with the digests that the job found."""
    store: Store
    work_dir: Path
    output_dir: Path
    tracker: Tracker | NullTracker
    progress: Progress
    fence: Fence | None = None
    """Proof that this process still is the one that builds; None where no other process can, as in tests of verbs."""

    @property
    def execution(self) -> ExecutionConfig:
        return self.request.execution

    @property
    def run(self) -> RunInfo:
        return self.request.run

    @property
    def inputs(self) -> dict[str, ArtifactRef]:
        return self.request.inputs

    def check_lease(self) -> None:
        """Raise LeaseLostError when another process has taken over this build; ask before publishing anything."""
        if self.fence is not None:
            self.fence.check(self.store)

    def input_dir(self, role: str) -> Path:
        """Return a local folder with the files of an upstream artifact."""
        if role not in self.inputs:
            raise ConfigError(
                f"stage {self.request.stage.value} needs an input {role!r}, given: {', '.join(self.inputs) or 'none'}",
                advice="Run the stage that produces it, or give a base model.",
            )
        return fetch(self.inputs[role], self.work_dir.parent / "cache")

    @property
    def has_base_model(self) -> bool:
        """Whether this stage reads the model that the run starts from."""
        return self.has_given(BASE_MODEL)

    def has_given(self, role: str) -> bool:
        """Whether this stage reads a given model in this role."""
        return role in self.inputs or self._outside_model(role) is not None

    def given_dir(self, role: str) -> Path:
        """Return a local folder with a given model: an input when it is an artifact, else an outside source."""
        model = self._outside_model(role)
        if model is None:
            return self.input_dir(role)
        from stages.models.given import base_model_dir  # heavy, and few stages need it

        with naming(role):
            return base_model_dir(model.uri, self.work_dir.parent / "cache", revision=model.digest)

    def model_dir(self, role: str, *instead: str) -> Path:
        """Return the model in the input `role`, or the given model that takes its place: the first role of `instead`
        that is given."""
        given = next((name for name in instead if self.has_given(name)), None)
        return self.input_dir(role) if given is None else self.given_dir(given)

    def identity_of(self, *roles: str) -> str:
        """Return what identifies the model in the first of these roles that is given: the fingerprint of an artifact,
        the digest of an outside model; empty when there is none."""
        for role in roles:
            if role in self.inputs:
                return self.inputs[role].fingerprint
            if (model := self._outside_model(role)) is not None:
                return model.digest
        return ""

    def content_of(self, *roles: str) -> str:
        """Return the digest of the model in the first of these roles that is given; KeyError when there is none."""
        for role in roles:
            if role in self.inputs:
                return self.inputs[role].digest
            if (model := self._outside_model(role)) is not None:
                return model.digest
        raise KeyError(roles)

    def _outside_model(self, role: str) -> SourceEntry | None:
        return next((source for source in self.sources if source.role == role), None)


@contextmanager
def naming(role: str) -> Iterator[None]:
    """Let errors about a given model name the field that gives it: what reads models calls each one base_model."""
    try:
        yield
    except StageError as error:
        if role == BASE_MODEL:
            raise
        raise type(error)(error.message.replace(BASE_MODEL, role), advice=error.advice) from error


Verb = Callable[[StageContext], StageOutcome]
"""Does the work of one stage."""
VerbOf = Callable[[Stage], Verb]
"""Finds it; passed down from `stages/__main__.py`, so that no package below it imports a verb."""
