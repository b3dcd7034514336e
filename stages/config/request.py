"""The records that cross between Airflow, the Ray job and the object store: request in, manifest and result out.

Stores outlive the code that wrote them, so records of earlier versions are still read: `_sources_with_kinds` turns
their sources, which had no kind, into today's form. It is the only place that knows the old form.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from stages.config.base import Choice, Config
from stages.config.execution import ExecutionConfig
from stages.config.graph import BASE_MODEL, Stage


def _inside(path: str) -> str:
    """A manifest may come from a store that others write to, and its paths become files on a worker."""
    if "\\" in path or "\0" in path or any(part in ("", ".", "..") for part in path.split("/")):
        raise ValueError(f"path={path!r} leaves the artifact; use relative paths with forward slashes, without '..'")
    return path


def _one_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(f"{name!r} is not a folder name; allowed are letters, digits, '.', '_' and '-'")
    return name


def _moment(text: str) -> str:
    """MLflow is told it in milliseconds since 1970."""
    try:
        if datetime.fromisoformat(text).timestamp() >= 0:
            return text
    except (ValueError, OverflowError):
        pass
    raise ValueError(f"no date and time since 1970 in ISO 8601: {text[:40]!r}")


def safe_run_id(airflow_run_id: str) -> str:
    """Everything outside [A-Za-z0-9_.-] replaced by `-`, and dots that would be a path too.

    The whole name of a folder under `runs/` in stores that are older than `run_folder`; different run ids may share it.
    """
    return re.sub(r"[^A-Za-z0-9_.-]|^\.+$", "-", airflow_run_id)


def run_folder(dag_id: str, airflow_run_id: str) -> str:
    """The folder under `runs/` of one run of one DAG: a part that people recognise, and a hash over the exact pair."""
    digest = hashlib.sha256(json.dumps([dag_id, airflow_run_id]).encode()).hexdigest()[:12]
    readable = re.sub("^[^A-Za-z0-9]+", "", safe_run_id(airflow_run_id))[:_LONGEST_READABLE]
    return f"{readable or 'run'}-{digest}"


def _run_folder_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", name) or not name.strip("."):
        raise ValueError(f"run_id={name!r} is not a folder under runs/; allowed are letters, digits, '.', '_' and '-'")
    return name


_LONGEST_READABLE = 100
"""Airflow allows 250 characters, most file systems 255 bytes for the whole name."""

FolderName = Annotated[str, AfterValidator(_one_name)]
"""One part of a path, which cannot lead anywhere else."""

PREVIOUS = "previous"
"""Role of the curated data that a run is given to add to; those of given models stand in the graph."""

REQUEST_DIGEST = "ATHANOR_REQUEST_SHA256"
"""Variable of a job's environment with the SHA-256 of its request; unset for a stage started by hand."""

MANIFEST_VERSION = 2
"""1 had `sources: {uri: digest}`, without roles and kinds, and no version number."""


class SourceKind(Choice):
    """What comes from outside the pipeline."""

    DATA = "data", "Raw data: documents, conversations, pairs, word lists"
    MODEL = "model", "A model that was not made here"
    BENCHMARK = "benchmark", "Items that models are measured by, and nothing is trained on"
    PRINCIPLES = "principles", "Principles by which a model criticises and compares responses"


class Source(Config):
    """Something from outside the pipeline that a stage reads; it has no manifest."""

    role: str
    """The setting that names it: `documents`, `base_model`, ..."""
    kind: SourceKind
    uri: str

    def identified(self, digest: str) -> "SourceEntry":
        return SourceEntry(role=self.role, kind=self.kind, uri=self.uri, digest=digest)


class SourceEntry(Source):
    """An outside source as the job found it: one edge of lineage that ends at raw data or at a given model."""

    digest: str
    """Hash over its content, or the version that its storage gives it."""


def digests_of(sources: Iterable[SourceEntry]) -> dict[str, str]:
    """Digest by URI: the part of outside sources that decides a stage's identity."""
    return {source.uri: source.digest for source in sources}


def _sources_with_kinds(data: Any) -> Any:
    """Upgrade the sources of a request (URIs) or manifest (URI -> digest) that was written before sources had kinds.

    Then only curate read data from outside; what other stages were given from outside was the base model.
    """
    if not isinstance(data, Mapping):
        return data
    match data.get("sources"):
        case Mapping() as digests:
            bare = [{"uri": uri, "digest": digest} for uri, digest in digests.items()]
        case [*uris] if uris and all(isinstance(uri, str) for uri in uris):
            bare = [{"uri": uri} for uri in uris]
        case _:
            return data
    role, kind = ("source", SourceKind.DATA) if data.get("stage") == Stage.CURATE else (BASE_MODEL, SourceKind.MODEL)
    return {**data, "sources": [{"role": role, "kind": kind, **source} for source in bare]}


def _finite(metrics: Any) -> Any:
    """Leave out metrics that are no numbers: earlier versions stored NaN and infinities, as such or as null."""
    if not isinstance(metrics, Mapping):
        return metrics
    return {
        name: value
        for name, value in metrics.items()
        if value is not None and not (isinstance(value, float) and not math.isfinite(value))
    }


Metrics = Annotated[dict[str, float], BeforeValidator(_finite)]
"""Finite numbers by name."""


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

    run_id: Annotated[str, AfterValidator(_run_folder_name)]
    """The folder under `runs/`, and the run's name in MLflow's tags: `run_folder` of DAG id and Airflow's run id."""
    name: str
    """Name shown to people; also the prefix of registered model names."""
    dag_id: str = ""
    airflow_run_id: str = ""
    airflow_url: str = ""
    """Page of the Airflow run, for links in MLflow and in the report."""
    experiment: str = "athanor"
    """MLflow experiment."""
    parent_run_id: str | None = None
    """MLflow parent run; None when the tracking server was not reachable when the run started."""
    records: dict[str, str] = Field(default_factory=dict)
    """SHA-256 of what the run's first task stored for the later ones, by file name. It travels through Airflow, so that
    whoever may write to the store cannot change what a run does; empty for runs of earlier versions."""


def sha256_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class GateQuestions(Config):
    """What the gate of a training stage asks about the published model, besides which model it is."""

    max_pairs: int = 512
    max_response_length: int = 48
    """Tokens of an answer, for the best of n."""


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
    sources: tuple[Source, ...] = ()
    """What it reads from outside; the job finds the digests, because it runs where the data is."""
    gate: GateQuestions | None = None
    """What the stage's gate will ask. A job that trains in its own process answers before it ends; None where there is
    nothing to ask, or where the answer also depends on an artifact that is not an input."""
    task_id: str = ""
    try_number: int = 1
    submission_id: str = ""

    _upgrade = model_validator(mode="before")(_sources_with_kinds)

    @property
    def name(self) -> str:
        """Of its folder under the run's."""
        return self.stage.value

    @property
    def source_uris(self) -> tuple[str, ...]:
        return tuple(source.uri for source in self.sources)


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

    def ref(self) -> ArtifactRef:
        """The artifact as the manifest says that it was; reading it by this reference checks the content."""
        return ArtifactRef(kind=self.kind, uri=self.uri, fingerprint=self.fingerprint, digest=self.digest)


class Cost(Config):
    """What a stage spent, all attempts together."""

    wall_seconds: float = 0.0
    """Of the jobs, from the start of their work to its end."""
    productive_seconds: float = 0.0
    """Part of `wall_seconds` that moved the stage further than any earlier attempt: without start, loading, waiting
    for capacity, saving the result, and work repeated after a failure. Their ratio is the goodput."""
    cpu_seconds: float = 0.0
    gpu_seconds: float = 0.0
    peak_memory_bytes: int = 0
    """Resident memory of the largest process."""
    attempts: int = 1


class Manifest(Config):
    """Record of a complete artifact, written last; lineage everywhere else is copied from it."""

    manifest_version: int = MANIFEST_VERSION
    """Form of this record; not the version of the stage."""
    kind: FolderName
    stage: Stage
    version: int
    """Of the stage, see StageSpec."""
    fingerprint: FolderName
    digest: FolderName
    files: tuple[FileEntry, ...]
    inputs: tuple[InputEntry, ...]
    sources: tuple[SourceEntry, ...] = ()
    config: dict[str, Any]
    execution: dict[str, Any]
    """Resources, world size, git commit, library versions, submission id: what does not change the result."""
    metrics: Metrics = Field(default_factory=dict)
    ledger: dict[str, Any] = Field(default_factory=dict)
    """What came in, what left, and the reason for every loss."""
    cost: Cost = Cost()
    mlflow_run_id: str | None = None
    mlflow_model_id: str | None = None
    created_at: Annotated[str, AfterValidator(_moment)]
    """UTC, ISO 8601."""

    _upgrade = model_validator(mode="before")(_sources_with_kinds)

    @field_validator("manifest_version")
    @classmethod
    def _known_version(cls, version: int) -> int:
        if version > MANIFEST_VERSION:
            raise ValueError(f"{version} is newer than {MANIFEST_VERSION}, which this code reads; update Athanor")
        return MANIFEST_VERSION

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
    metrics: Metrics = Field(default_factory=dict)
    wall_seconds: float = 0.0
    """Of this job; 0 for a hit found without a job."""
    cost: Cost | None = None
    """Of building it; None for a hit."""


class Failure(Config):
    """Why a job failed, written by the job itself: `runs/<run id>/<stage>/failure.json`."""

    category: str
    message: str
    advice: str = ""
    detail: str = ""
    """Traceback, for unexpected failures only."""
