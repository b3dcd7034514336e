"""What a verb is given: its config, its inputs as local folders, a place to write, and ways to report."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.artifacts.lease import Fence
from stages.artifacts.manifests import fetch
from stages.artifacts.store import Store
from stages.config.base import Config
from stages.config.errors import ConfigError
from stages.config.execution import ExecutionConfig
from stages.config.graph import Stage
from stages.config.request import BASE_MODEL, ArtifactRef, FileEntry, RunInfo, SourceEntry, StageRequest
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
        """Whether this stage starts from a given model."""
        return BASE_MODEL in self.inputs or self._outside_model is not None

    def base_model_dir(self) -> Path:
        """Return a local folder with the given model: an input when it is an artifact, else an outside source."""
        if self._outside_model is None:
            return self.input_dir(BASE_MODEL)
        from stages.models.given import base_model_dir  # heavy, and few stages need it

        model = self._outside_model
        return base_model_dir(model.uri, self.work_dir.parent / "cache", revision=model.digest)

    @property
    def _outside_model(self) -> SourceEntry | None:
        return next((source for source in self.sources if source.role == BASE_MODEL), None)


Verb = Callable[[StageContext], StageOutcome]
"""Does the work of one stage."""
VerbOf = Callable[[Stage], Verb]
"""Finds it; passed down from `stages/__main__.py`, so that no package below it imports a verb."""
