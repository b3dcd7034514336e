"""The records that cross between Airflow, the Ray job and the object store: request in, manifest and result out."""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from stages.config.base import Config
from stages.config.execution import ExecutionConfig
from stages.config.graph import Stage


def _inside(path: str) -> str:
    """A manifest may come from a store that others write to, and its paths become files on a worker."""
    if "\\" in path or "\0" in path or any(part in ("", ".", "..") for part in path.split("/")):
        raise ValueError(f"path={path!r} leaves the artifact; use relative paths with forward slashes, without '..'")
    return path


def _one_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(f"{name!r} is no name of a folder; allowed are letters, digits, '.', '_' and '-'")
    return name


def safe_run_id(airflow_run_id: str) -> str:
    """The key under `runs/`: everything outside [A-Za-z0-9_.-] replaced by `-`, and dots that would be a path too."""
    return re.sub(r"[^A-Za-z0-9_.-]|^\.+$", "-", airflow_run_id)


FolderName = Annotated[str, AfterValidator(_one_name)]
"""One part of a path, which cannot lead anywhere else."""


class ArtifactRef(Config):
    """A published artifact, small enough for XCom."""

    kind: str
    """What it is: `curated`, `tokens`, `base-model`, ..."""
    uri: str
    """Root of its files in the object store."""
    fingerprint: str
    """Identity by stage, version, config and inputs (sha256, hex)."""
    digest: str
    """Hash over the content of its files (sha256, hex)."""
    mlflow_run_id: str | None = None
    """MLflow run that produced it."""
    mlflow_model_id: str | None = None
    """MLflow LoggedModel, for models."""


class RunInfo(Config):
    """The pipeline execution that a stage belongs to."""

    run_id: str
    """`safe_run_id` of Airflow's; the key under `runs/`."""
    name: str
    """What people call the run; also the prefix of registered model names."""
    dag_id: str = ""
    airflow_run_id: str = ""
    airflow_url: str = ""
    """Page of the Airflow run, for links in MLflow and in the report."""
    experiment: str = "athanor"
    """MLflow experiment."""
    parent_run_id: str | None = None
    """MLflow parent run; None when the tracking server was not reachable when the run started."""


class StageRequest(Config):
    """All that a Ray job needs to know; written to `runs/<run id>/<stage>/config.json`."""

    stage: Stage
    run: RunInfo
    store_uri: str
    """Root of the object store."""
    config: dict[str, Any]
    """The stage's own config, JSON form; re-validated by the job against the same class."""
    execution: ExecutionConfig
    inputs: dict[str, ArtifactRef] = Field(default_factory=dict)
    """Upstream artifacts by role."""
    sources: tuple[str, ...] = ()
    """Outside data that the job identifies itself, where the data is."""
    task_id: str = ""
    try_number: int = 1
    submission_id: str = ""


class FileEntry(Config):
    """One file of an artifact."""

    path: Annotated[str, AfterValidator(_inside)]
    """Relative to the artifact, with forward slashes."""
    size: int
    """Bytes."""
    sha256: str


class InputEntry(Config):
    """One edge of lineage."""

    role: str
    kind: str
    uri: str
    fingerprint: str
    digest: str


class Cost(Config):
    """What a stage spent, all attempts together."""

    wall_seconds: float = 0.0
    """Of the jobs, from the start of their processes' work to its end."""
    productive_seconds: float = 0.0
    """Part of `wall_seconds` that moved the stage further than any attempt before: less start, loading, waiting for
    room, saving the result, and what was done again after a failure. Their ratio is the goodput."""
    cpu_seconds: float = 0.0
    gpu_seconds: float = 0.0
    peak_memory_bytes: int = 0
    """Resident memory of the largest process."""
    attempts: int = 1


class Manifest(Config):
    """Record of a complete artifact, written last; lineage everywhere else is copied from it."""

    kind: FolderName
    stage: Stage
    version: int
    fingerprint: FolderName
    digest: FolderName
    files: tuple[FileEntry, ...]
    inputs: tuple[InputEntry, ...]
    sources: dict[str, str] = Field(default_factory=dict)
    """Digest of each outside source."""
    config: dict[str, Any]
    execution: dict[str, Any]
    """Resources, world size, git commit, library versions, submission id: what never decides identity."""
    metrics: dict[str, float] = Field(default_factory=dict)
    ledger: dict[str, Any] = Field(default_factory=dict)
    """What came in, what left, every loss with its reason."""
    cost: Cost = Cost()
    mlflow_run_id: str | None = None
    mlflow_model_id: str | None = None
    created_at: str
    """UTC, ISO 8601."""

    def ref(self, uri: str) -> ArtifactRef:
        return ArtifactRef(
            kind=self.kind,
            uri=uri,
            fingerprint=self.fingerprint,
            digest=self.digest,
            mlflow_run_id=self.mlflow_run_id,
            mlflow_model_id=self.mlflow_model_id,
        )


class StageResult(Config):
    """What the operator reads when the job is done: `runs/<run id>/<stage>/result.json`."""

    stage: Stage
    hit: bool
    """True when the artifact existed and nothing was executed."""
    artifact: ArtifactRef
    metrics: dict[str, float] = Field(default_factory=dict)
    wall_seconds: float = 0.0
    """Of this job; 0 for a hit found without a job."""
    cost: Cost | None = None
    """What building it took; None for a hit."""


class Failure(Config):
    """The job's last words: `runs/<run id>/<stage>/failure.json`."""

    category: str
    message: str
    advice: str = ""
    detail: str = ""
    """Traceback, for unexpected failures only."""
