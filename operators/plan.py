"""What a run will do before it spends anything: per stage hit or run, why, how long, how much memory, at what price.

The walk is the pipeline's own: each stage's request is built and fingerprinted as its task will do it, with the
fingerprints, not the contents, of the stages before. So the plan needs no job and knows stages that do not exist yet.
Only outside data is identified elsewhere, by the job, where it lies; there the plan says what holds if it has not
changed since it was last read.
"""

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum
from typing import Any

from pydantic import ValidationError

from operators.champion import with_champion
from operators.look import read_look
from operators.prepare import build_request, input_stages, selection
from stages.artifacts.addresses import artifact_uri
from stages.artifacts.explain import BY_JOB, NEW, Builds, identity_fields
from stages.artifacts.hits import other_content
from stages.artifacts.manifests import DOUBT, find_manifest, fingerprint, input_identity, is_doubted, verify
from stages.artifacts.store import Store
from stages.config.base import Config
from stages.config.errors import DamagedArtifactError, StageError
from stages.config.estimate import (
    DataCounts,
    Devices,
    Estimate,
    Measured,
    assumed_counts,
    count_parameters,
    estimate,
    num_devices,
    workload,
)
from stages.config.execution import ExecutionConfig
from stages.config.graph import (
    BASE_MODEL,
    DATA_FIELDS,
    GOLD_MODEL,
    GRAPH,
    JUDGE,
    PROMPTS,
    REWARD_MODEL,
    Stage,
    pipeline_stages,
    stage_providing,
)
from stages.config.look import ModelFacts
from stages.config.pipeline import CONFIG_CLASSES, PipelineConfig, stage_config_from_json
from stages.config.request import ArtifactRef, Manifest, RunInfo, StageRequest, digests_of

logger = logging.getLogger(__name__)

_MAX_DIFFERENCES = 3


class Verdict(StrEnum):
    """What the stage's task will do."""

    HIT = "hit"
    HIT_IF_UNCHANGED = "hit if unchanged"
    RUN = "run"
    UNKNOWN = "unknown"


class StagePlan(Config):
    stage: Stage
    verdict: Verdict
    why: str
    estimate: Estimate | None = None
    """None for a certain hit, which costs nothing."""


class Plan(Config):
    """Table of a run, in the order of its stages."""

    recipe: str
    dry_run: bool
    stages: tuple[StagePlan, ...]
    remarks: tuple[str, ...] = ()
    """Models that the run is given and who reads them, and what it does without and why: a line each."""
    models: tuple[ModelFacts, ...] = ()
    """What was found out about the given models."""

    def of(self, stage: Stage) -> StagePlan:
        return next(plan for plan in self.stages if plan.stage is stage)


def make_plan(config: PipelineConfig, *, run: RunInfo, store: Store, devices: Devices | None = None) -> Plan:
    """Walk the graph; reads manifests only and changes nothing."""
    config, dry_run = config.model_copy(update={"dry_run": False}), config.dry_run
    walk = _Walk(config, run, store, devices or Devices())
    stages = tuple(walk.stage(stage) for stage in GRAPH if stage in walk.selected)
    return Plan(
        recipe=config.recipe,
        dry_run=dry_run,
        stages=stages,
        models=walk.looked_at.models,
        remarks=tuple(_remarks(config)),
    )


def _remarks(config: PipelineConfig) -> Iterator[str]:
    for role, address in config.given_models.items():
        readers = [stage.value for stage in pipeline_stages() if role in config.given_roles(stage)]
        yield f"{role}: `{address}` is given, read by {', '.join(readers) or 'no stage'}"
    stages_by_reason: dict[str, list[str]] = {}
    for stage, why in config.skipped.items():
        # Without a GGUF file nobody misses the conversion, and what is not asked for nobody misses either.
        if (config.converts or not GRAPH[stage].provides) and not GRAPH[stage].asked_by:
            stages_by_reason.setdefault(why, []).append(stage.value)
    for why, stages in stages_by_reason.items():
        yield f"{', '.join(stages)}: skipped, {why}"
    if config.gates.override:
        yield f"gates that may fail: {', '.join(config.gates.override)}, because {config.gates.reason}"
    if not config.gates.recompute:
        yield f"gates do not load the models (gates.recompute=false), because {config.gates.reason}"
    if config.reviewed:
        names = " and ".join(stage.value for stage in config.reviewed)
        hours = config.review.timeout_hours
        yield f"review: waits up to {hours:g} hours for a person to read what {names} made (review_made_data)"
    for name in DATA_FIELDS if Stage.CURATE in config.selected else ():
        if not getattr(config.curate, name) and name != PROMPTS:  # most runs have none, and miss nothing
            yield f"{name}: none are read, no stage of this run needs them"


class _Walk:
    """From stage to stage: what is known of the artifacts so far, existing or not."""

    def __init__(self, config: PipelineConfig, run: RunInfo, store: Store, devices: Devices) -> None:
        self._config, self._run, self._store, self._devices = config, run, store, devices
        self.selected = selection(config)
        with ThreadPoolExecutor() as pool:
            self._builds = dict(
                zip(self.selected, pool.map(lambda stage: Builds(store, stage), self.selected), strict=True)
            )
        self._refs: dict[Stage, ArtifactRef | None] = {}
        """None: it has a fingerprint that no artifact has yet, or nobody knows which."""
        self._unchanged: dict[Stage, str] = {}
        """Stages whose fingerprint holds only if outside data is what it was, and which data."""
        self._unknown: set[Stage] = set()
        self.looked_at = read_look(store, run)
        facts = self.looked_at.of(BASE_MODEL)
        self._counts = self._of_given_vocabulary(assumed_counts(config))
        self._parameters: int | None = facts.parameters if facts else None
        """Size of a given base model: as it was looked at, or of a build that started from it."""

    def stage(self, stage: Stage) -> StagePlan:
        verdict, why, manifest = self._verdict(stage)
        if verdict is Verdict.UNKNOWN:
            self._unknown.add(stage)
        if stage is Stage.TOKENIZE:
            counted = _counted(self._config, manifest, self._builds[stage])
            self._counts = self._of_given_vocabulary(counted) if counted else self._counts
        if manifest and stage is stage_providing(BASE_MODEL):
            self._parameters = _stored_parameters(manifest)
        took = None if verdict is Verdict.HIT else self._estimate(stage)
        return StagePlan(stage=stage, verdict=verdict, why=why, estimate=took)

    def _of_given_vocabulary(self, counts: DataCounts) -> DataCounts:
        """With the rows of a given model's embedding, which may be more than its tokenizer has entries."""
        facts = self.looked_at.of(BASE_MODEL)
        return counts.model_copy(update={"vocab_size": facts.vocab_size}) if facts and facts.vocab_size else counts

    def _verdict(self, stage: Stage) -> tuple[Verdict, str, Manifest | None]:
        builds, before = self._builds[stage], set(input_stages(stage, self._config).values())
        self._refs[stage] = None
        if unknown := before & self._unknown:
            return Verdict.UNKNOWN, f"depends on {', '.join(sorted(unknown))}, which is unknown", None
        request = self._request(stage, before)
        wanted = identity_fields(
            stage,
            request.config,
            inputs={role: self._stands_for(ref) for role, ref in request.inputs.items()},
            sources=dict.fromkeys(request.source_uris, BY_JOB),
        )
        if any(self._refs[source] is None for source in before):
            return Verdict.RUN, _explain(builds, wanted), None
        seen = builds.known_sources(wanted, request.source_uris) if request.sources else None
        if request.sources and seen is None:
            if not builds.complete:
                return Verdict.UNKNOWN, f"{_named(request.source_uris)} is identified by the job, where it lies", None
            return Verdict.RUN, _explain(builds, wanted), None
        digests = digests_of(seen.sources) if seen else {}
        assumed = [self._unchanged[source] for source in GRAPH if source in before & self._unchanged.keys()]
        # Stages that run, although what was made from them is there: it is a hit only if they make the same again.
        again = [source for source in GRAPH if source in before and (ref := self._refs[source]) and not ref.digest]
        assumed += [f"{source.value} makes the same again" for source in again]
        if seen:
            assumed.append(f"{_named(request.source_uris)} is as it was {seen.created_at[:16]} (its job will see)")
        if assumed:
            self._unchanged[stage] = "; ".join(dict.fromkeys(assumed))
        manifest, damage = self._find(request, digests)
        if manifest is None:
            wanted |= {f"source {uri}": digest for uri, digest in digests.items()}
            return Verdict.RUN, damage or _explain(builds, wanted), None
        built = f"built {manifest.created_at[:16]}"
        if assumed:
            return Verdict.HIT_IF_UNCHANGED, f"{built}, if {self._unchanged[stage]}", manifest
        return Verdict.HIT, built, manifest

    def _request(self, stage: Stage, before: set[Stage]) -> StageRequest:
        """The request that the stage's task will make, as far as it is known; what is built anew has no identity."""
        anew = ArtifactRef(kind="", uri="", fingerprint=NEW, digest="")
        upstream = {source: self._refs[source] or anew for source in before}
        request = build_request(stage, run=self._run, store=self._store, config=self._config, upstream=upstream)
        if "champion" not in request.config:
            return request
        try:
            return with_champion(request, self._config)
        except StageError as error:
            logger.warning("Planned without the champion: %s", error)
            return request

    def _find(self, request: StageRequest, digests: dict[str, str]) -> tuple[Manifest | None, str]:
        """Look for the artifact and remember it, existing or not, for the stages after it."""
        stage, kind = request.stage, GRAPH[request.stage].kind
        stage_config = stage_config_from_json(stage, request.config)
        asked: dict[str, Any] = {"inputs": request.inputs, "sources": digests, "store_uri": self._store.root_uri}
        identity, differs = fingerprint(stage, stage_config, **asked), list[str]()
        manifest, damage = self._intact(kind, identity)
        if manifest is not None and (differs := other_content(manifest, request.inputs)):
            identity = fingerprint(stage, stage_config, **asked, with_content=True)
            manifest, damage = self._intact(kind, identity)
        uri = artifact_uri(self._store, kind, identity)
        digest = manifest.digest if manifest else ""
        self._refs[stage] = ArtifactRef(kind=kind, uri=uri, fingerprint=identity, digest=digest)
        return manifest, damage or ("; ".join(differs) if manifest is None else "")

    def _stands_for(self, ref: ArtifactRef) -> str:
        return NEW if ref.fingerprint == NEW else input_identity(ref, self._store.root_uri)

    def _intact(self, kind: str, identity: str) -> tuple[Manifest | None, str]:
        if is_doubted(self._store, kind, identity):
            return (
                None,
                f"damaged: a reader found other content than its manifest records; {DOUBT} beside it tells where",
            )
        try:
            manifest = find_manifest(self._store, kind, identity)
            if manifest is not None:
                verify(self._store, manifest)
        except DamagedArtifactError as error:
            return None, f"damaged: {error.message}"
        return manifest, ""

    def _estimate(self, stage: Stage) -> Estimate:
        builds, start = self._builds[stage], self._start(stage)
        try:
            self._parameters = self._parameters or _given_size(self._config.base_model, builds)
            return estimate(
                stage,
                self._config,
                selected=self.selected,
                counts=self._counts,
                devices=self._devices,
                measured=self._measured(stage, builds),
                measured_parameters=start.parameters if start and start.role != BASE_MODEL else self._parameters,
                given=start.shape if start else None,
            )
        except Exception as error:  # noqa: BLE001 - a plan is a courtesy: the run must not depend on its arithmetic
            logger.warning("No estimate for %s: %s: %s", stage.value, type(error).__name__, error)
            return Estimate(basis=(f"unknown: {type(error).__name__}: {error}",))

    def _start(self, stage: Stage) -> ModelFacts | None:
        """The given model that a stage starts from, or that its start was made from; None for one not looked at."""
        starts = [role for role in self._config.given_roles(stage) if role not in (REWARD_MODEL, GOLD_MODEL, JUDGE)]
        return self.looked_at.of(next(iter(starts), BASE_MODEL))

    def _measured(self, stage: Stage, builds: Builds) -> Measured | None:
        """Return the newest build on the same kind of device that tells its time."""
        on_gpu = num_devices(self._config.stage_execution(stage))[1]
        for manifest in builds.manifests:
            known = {key: value for key, value in manifest.execution.items() if key in ExecutionConfig.model_fields}
            try:
                number, was_gpu = num_devices(ExecutionConfig.model_validate(known))
                earlier = self._config.model_copy(
                    update={stage.value: CONFIG_CLASSES[stage].model_validate(manifest.config)}
                )
            except ValidationError:
                continue  # of a version whose settings were others: no measure for today's
            if was_gpu != on_gpu or not manifest.cost.wall_seconds:
                continue
            load = workload(stage, earlier, self._counts, selected=self.selected)
            size = _stored_parameters(manifest) or self._known_parameters()
            return Measured(
                fingerprint=manifest.fingerprint,
                wall_seconds=manifest.cost.wall_seconds,
                devices=number,
                on_gpu=was_gpu,
                peak_memory_bytes=manifest.cost.peak_memory_bytes,
                work=load.passes * size if load and size else None,
            )
        return None

    def _known_parameters(self) -> int | None:
        if self._config.base_model:
            return self._parameters
        return count_parameters(self._config.pretrain.model, self._counts.vocab_size)


def _counted(config: PipelineConfig, manifest: Manifest | None, builds: Builds) -> DataCounts | None:
    """What the tokenizer counted: in the very artifact, else in the newest one."""
    source = manifest or next(iter(builds.manifests), None)
    try:
        ledger = source.ledger["train"] if source else None
        kept = ledger["conversations"]["kept"] if ledger else 0
        if not source or not ledger or not kept:
            return None
        return DataCounts(
            conversations=kept,
            conversation_tokens=ledger["conversations"]["tokens"] / kept,
            preferences=ledger["preferences"].get("kept", 0),
            unpaired=ledger.get("unpaired", {}).get("kept", 0),
            vocab_size=int(source.metrics["tokens/vocab_size"]) if manifest else config.tokenize.vocab_size,
            basis=f"data as counted in tokens {source.fingerprint[:12]}",
        )
    except (KeyError, TypeError):
        return None


def _stored_parameters(manifest: Manifest) -> int | None:
    """Trained weights are exported in float32; a converted model says how many it has."""
    if counted := manifest.metrics.get("convert/parameters"):
        return int(counted)
    size = sum(entry.size for entry in manifest.files if entry.path.endswith(".safetensors"))
    return size // 4 or None


def _given_size(base_model: str, builds: Builds) -> int | None:
    started_from = (manifest for manifest in builds.manifests if base_model in digests_of(manifest.sources))
    sizes = (_stored_parameters(manifest) for manifest in started_from)
    return next(filter(None, sizes), None)


def _explain(builds: Builds, wanted: dict[str, Any]) -> str:
    nearest = builds.nearest(wanted)
    if nearest is None:
        return "never built in this store"
    found = builds.differences(nearest, wanted)
    if not found:
        return f"unlike {nearest.fingerprint[:12]}, whose inputs had other content or lay elsewhere"
    more = f" and {len(found) - _MAX_DIFFERENCES} more" if len(found) > _MAX_DIFFERENCES else ""
    return f"unlike {nearest.fingerprint[:12]}: {'; '.join(found[:_MAX_DIFFERENCES])}{more}"


def _named(uris: tuple[str, ...]) -> str:
    return ", ".join(f"`{uri}`" for uri in uris)
