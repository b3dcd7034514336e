"""From a request to a published artifact: validate, identify outside sources, look for a hit, run the verb, write the
manifest last.

Nothing heavy is imported before a verb is needed: a cache hit costs an interpreter start and two small reads.
"""

import importlib.metadata
import logging
import os
import platform
import signal
import time
from collections.abc import Callable

from stages.artifacts.addresses import artifact_key, artifact_uri, open_store, run_key
from stages.artifacts.hits import find_hit
from stages.artifacts.lease import Fence, Owner, acquire
from stages.artifacts.manifests import content_digest, manifest_bytes, publish, upload_files, utc_now
from stages.artifacts.store import Store, write_json
from stages.config.base import Config
from stages.config.curate import CurateConfig
from stages.config.endpoint_keys import keyed_endpoints
from stages.config.errors import EXIT_CODES, ConfigError, DataError, ExitCode, StageError
from stages.config.gate_records import GateRequest, asked_of
from stages.config.graph import GRAPH
from stages.config.heard import quiet_seconds
from stages.config.pipeline import ONE_VERSION, stage_config_from_json
from stages.config.records import Record, parse_record, without_non_finite
from stages.config.request import (
    REQUEST_DIGEST,
    InputEntry,
    Manifest,
    Source,
    SourceEntry,
    SourceKind,
    StageRequest,
    StageResult,
    digests_of,
    sha256_of,
)
from stages.job.attempt import git_commit, opened_context
from stages.job.context import StageContext, StageOutcome, Verb, VerbOf, naming
from stages.job.failures import record_failure
from stages.job.logs import log_for_request, log_for_uri
from stages.job.progress import Progress, read_progress
from stages.job.stopping import raise_stopped
from stages.lineage.signatures import Signer
from stages.tracking.tracker import record_hit

logger = logging.getLogger("athanor")

_HISTORY = "history.jsonl"
_WAITING_SHOWN_SECONDS = 10.0
_LOOK_AGAIN_SECONDS, _LONGEST_PAUSE_SECONDS = 0.05, 30.0
_RECORDED_PACKAGES = ("torch", "transformers", "ray", "mlflow", "datatrove", "tokenizers", "athanor")


def run_stage(config_uri: str, verb_of: VerbOf, *, examine: Callable[[GateRequest], None] | None = None) -> int:
    """Run the stage that `config_uri` describes and return the process's exit code.

    `examine` answers what the stage's gate will ask, where this process has trained the model and so has all libraries
    in memory: the gate then needs no job of its own.
    """
    signal.signal(signal.SIGTERM, raise_stopped)
    try:
        log_for_uri(config_uri)
        request, store = load_request(config_uri)
        log_for_request(request)
    except StageError as error:
        logger.error("%s %s", error.message, error.advice)
        return EXIT_CODES[error.category]
    try:
        result = execute(request, store, verb_of)
    except BaseException as error:  # noqa: BLE001 - every failure becomes an exit code and a file; none is swallowed
        return record_failure(store, request, error)
    write_json(store, run_key(request.run.run_id, request.stage, "result.json"), result.model_dump(mode="json"))
    logger.info("%s %s: %s", request.stage.value, "hit" if result.hit else "built", result.artifact.uri)
    trained_here = not result.hit and request.execution.train_workers == 0
    if examine is not None and trained_here and (asked := asked_of(request, result.artifact)):
        examine(asked)
    return ExitCode.OK


def load_request(config_uri: str) -> tuple[StageRequest, Store]:
    """Read a StageRequest from `<store root>/runs/<run id>/<stage>/config.json`."""
    return read_request(StageRequest, config_uri)


def read_request(kind: type[Record], config_uri: str) -> tuple[Record, Store]:
    """Read what Airflow wrote for this job; raises DataError when it is not what Airflow sent it to read."""
    root, separator, tail = config_uri.rpartition("/runs/")
    if not separator:
        raise ConfigError(
            f"config uri {config_uri!r} is not of the form <store>/runs/<run id>/<stage>/config.json",
            advice="Start stages through the Airflow DAG, or write the request there first.",
        )
    store = open_store(root)
    try:
        data = store.read_bytes(f"runs/{tail}")
    except FileNotFoundError:
        raise ConfigError(
            f"config uri {config_uri!r} does not exist",
            advice="Check that Airflow and the Ray cluster see the same ARTIFACT_STORE.",
        ) from None
    if (sent := os.environ.get(REQUEST_DIGEST)) and sha256_of(data) != sent:
        raise DataError(
            f"{config_uri} is not the request that Airflow wrote (sha256 {sent[:12]}): something changed it",
            advice="Clear the task, which writes it again; see who may write to the store.",
        )
    return parse_record(kind, data, config_uri, advice=ONE_VERSION), store


def execute(request: StageRequest, store: Store, verb_of: VerbOf) -> StageResult:
    """Return the stage's artifact, building it when it does not exist yet."""
    started = time.monotonic()
    config = stage_config_from_json(request.stage, request.config)
    _require_keys(request, config)
    sources = identify_sources(request, config)
    kind = GRAPH[request.stage].kind
    # `acquire` waits while another run builds the artifact and returns None once it exists. It is then looked for
    # again, because it may be damaged, which discards it, or made from something else: then this process builds it.
    pause = _LOOK_AGAIN_SECONDS
    while True:
        found = find_hit(store, request.stage, config, inputs=request.inputs, sources=digests_of(sources))
        identity = found.fingerprint
        if (manifest := found.manifest) is not None:
            ref = manifest.ref(artifact_uri(store, manifest.kind, identity))
            record_hit(request, ref)
            return StageResult(stage=request.stage, hit=True, artifact=ref, metrics=manifest.metrics)
        lease = acquire(
            store, kind=kind, fingerprint=identity, owner=Owner.of(request), on_wait=_waiting(request, store)
        )
        if lease is not None:
            break
        # Usually the next look finds it. A store that says two things about it is not asked hundreds of times a second.
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
    with lease:
        verb = verb_of(request.stage)
        manifest = _build(verb, request, store, sources=sources, identity=identity, fence=lease.fence)
    return StageResult(
        stage=request.stage,
        hit=False,
        artifact=manifest.ref(artifact_uri(store, manifest.kind, identity)),
        metrics=manifest.metrics,
        wall_seconds=round(time.monotonic() - started, 3),
        cost=manifest.cost,
    )


def _require_keys(request: StageRequest, config: Config) -> None:
    """Open the sealed keys of endpoints once, before anything is done: not at the first question, hours later."""
    if endpoints := keyed_endpoints(config, request.stage.value):
        from stages.models.endpoint.keys import require_keys

        require_keys(endpoints, job=request.submission_id)


def identify_sources(request: StageRequest, config: Config) -> tuple[SourceEntry, ...]:
    """Return the outside sources with the digests of their content; cheap enough to run before every cache look-up."""
    return tuple(source.identified(digest_of(source, config)) for source in request.sources)


def digest_of(source: Source, config: Config) -> str:
    """The digest of an outside source as it is now; `config` is that of the stage that reads it."""
    match source.kind:
        case SourceKind.DATA:
            from stages.data.sources.readers import snapshot_rows, snapshot_source

            if isinstance(config, CurateConfig):
                return snapshot_source(source.uri, config)
            return snapshot_rows(source.uri, field=source.role)
        case SourceKind.MODEL:
            from stages.models.given import snapshot_base_model

            with naming(source.role):
                return snapshot_base_model(source.uri)
        case SourceKind.BENCHMARK:
            from stages.data.sources.benchmarks import identify_benchmark

            return identify_benchmark(source.uri)
        case SourceKind.PRINCIPLES:
            from stages.data.constitution.principles import snapshot_principles

            return snapshot_principles(source.uri)


def _waiting(request: StageRequest, store: Store) -> Callable[[Owner, float], None]:
    """Report the progress of the run that builds the artifact as our own while we wait for it, and name that run."""
    progress, shown_at = Progress(store, request.run.run_id, request.stage, record=None), -_WAITING_SHOWN_SECONDS

    def show(holder: Owner, seconds: float) -> None:
        nonlocal shown_at
        if seconds - shown_at < _WAITING_SHOWN_SECONDS:
            return
        shown_at = seconds
        latest = read_progress(store, holder.run_id, request.stage)
        quiet = quiet_seconds({"at": latest.at}, now=time.time())
        progress(
            latest.done or 0.0,
            latest.total,
            latest.unit,
            waiting_for=f"run {holder.run_id}, which builds it",
            waited_seconds=seconds,
            **({"not_heard_of_seconds": quiet} if quiet else {}),
        )

    return show


def _build(
    verb: Verb, request: StageRequest, store: Store, *, sources: tuple[SourceEntry, ...], identity: str, fence: Fence
) -> Manifest:
    signer = Signer.from_environment()  # a key that cannot be read is an error now, not after days of training
    with opened_context(request, store, fingerprint=identity, sources=sources, fence=fence) as context:
        outcome = verb(context)
        context.check_lease()
        manifest = _manifest(context, outcome)
        # The MLflow run ends before the manifest is written, because the manifest carries its ids.
        run_id, model_id = context.tracker.finish(manifest, history=_history(store, manifest))
        manifest = manifest.model_copy(update={"mlflow_run_id": run_id, "mlflow_model_id": model_id})
        context.check_lease()
        if signer is not None:
            signer.sign(store, manifest, manifest_bytes(manifest))
        publish(store, manifest)
    store.delete(f"checkpoints/{identity}")
    return manifest


def _manifest(context: StageContext, outcome: StageOutcome) -> Manifest:
    request, spec = context.request, GRAPH[context.request.stage]
    written = upload_files(context.store, context.output_dir, kind=spec.kind, fingerprint=context.fingerprint)
    files = (*outcome.files, *written)
    # JSON has no NaN, and null is no metric: it is left out, and the ledger says what it was.
    metrics, not_finite = without_non_finite(outcome.metrics)
    ledger, lost = without_non_finite(outcome.ledger)
    if not_finite or lost:
        logger.warning("not finite and so not recorded: %s", {**not_finite, **lost})
        ledger = {**ledger, "not_finite": {**not_finite, **lost}}
    return Manifest(
        kind=spec.kind,
        stage=spec.stage,
        version=spec.version,
        fingerprint=context.fingerprint,
        digest=content_digest(files),
        files=files,
        inputs=tuple(
            InputEntry(role=role, kind=ref.kind, uri=ref.uri, fingerprint=ref.fingerprint, digest=ref.digest)
            for role, ref in request.inputs.items()
        ),
        sources=context.sources,
        config=request.config,
        execution={
            **request.execution.model_dump(mode="json"),
            **outcome.execution,
            "submission_id": request.submission_id,
            "run_id": request.run.run_id,
            "git_commit": git_commit(),
            "python": platform.python_version(),
            "versions": _versions(),
        },
        metrics=metrics,
        ledger=ledger,
        cost=context.progress.cost(),
        created_at=utc_now(),
    )


def _history(store: Store, manifest: Manifest) -> str:
    """The metrics of every step, read from the store because a worker on another machine may have written them."""
    if not GRAPH[manifest.stage].trains or _HISTORY not in {entry.path for entry in manifest.files}:
        return ""
    return store.read_bytes(f"{artifact_key(manifest.kind, manifest.fingerprint)}/{_HISTORY}").decode(errors="replace")


def _versions() -> dict[str, str]:
    installed = {}
    for name in _RECORDED_PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = "not installed"
    return installed
