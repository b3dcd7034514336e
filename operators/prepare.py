"""What the operator needs before a Ray job: the run's configuration, the stage's request, its artifact if it exists."""

import logging
from collections.abc import Mapping
from typing import Any

from stages.artifacts import hits
from stages.artifacts.addresses import artifact_uri, run_key
from stages.artifacts.store import Store, write_json
from stages.config.closing import Approval, Promotion
from stages.config.curate import NEW_BYTES, NEW_PAIRS
from stages.config.errors import ConfigError, DataError
from stages.config.graph import GOLD_MODEL, GRAPH, Stage
from stages.config.pipeline import PREVIOUS, PipelineConfig, stage_config_from_json
from stages.config.records import parse_record
from stages.config.request import ArtifactRef, GateQuestions, RunInfo, StageRequest, StageResult, sha256_of
from stages.config.review import REVIEW_TASK, ReviewRecord

logger = logging.getLogger(__name__)


PIPELINE_RECORD = "pipeline.json"


def pipeline_key(run_id: str) -> str:
    return f"runs/{run_id}/{PIPELINE_RECORD}"


def params_key(run_id: str) -> str:
    """Where the values of the form are stored; a retraining starts from them."""
    return f"runs/{run_id}/params.json"


def read_own(store: Store, run: RunInfo, name: str) -> bytes:
    """Read what the first task of a run stored; raises DataError when it is no longer what that task wrote."""
    key = f"runs/{run.run_id}/{name}"
    data = store.read_bytes(key)
    if (written := run.records.get(name)) and sha256_of(data) != written:
        raise DataError(
            f"{store.root_uri}/{key} is not what the first task of the run wrote (sha256 {written[:12]})",
            advice="Something changed it. Clear the task `resolve`, which writes it again; see who may write there.",
        )
    return data


def load_config(store: Store, run: RunInfo) -> PipelineConfig:
    """Read what `resolve` stored for this run."""
    key = pipeline_key(run.run_id)
    advice = "Clear the task `resolve`; it writes the file."
    try:
        data = read_own(store, run, PIPELINE_RECORD)
    except FileNotFoundError:
        raise ConfigError(f"{store.root_uri}/{key} does not exist", advice=advice) from None
    try:
        config = parse_record(PipelineConfig, data, f"{store.root_uri}/{key}")
    except DataError as error:
        raise DataError(error.message, advice=advice) from None
    result = run_key(run.run_id, Stage.CURATE, "result.json")
    if PREVIOUS not in config.given or not store.exists(result):
        return config
    curated = parse_record(StageResult, store.read_bytes(result), f"{store.root_uri}/{result}")
    if missing := [name for name in (NEW_BYTES, NEW_PAIRS) if name not in curated.metrics]:
        raise DataError(f"{store.root_uri}/{result} has no metric {missing[0]!r}", advice="Clear the task `curate`.")
    return as_far_as_there_is_new_data(config, curated.metrics)


def as_far_as_there_is_new_data(config: PipelineConfig, curated: Mapping[str, float]) -> PipelineConfig:
    """Shorten a run that builds on previous data to the stages that have new data, by the metrics of its curation.

    Without enough new text there is no pretraining; without new pairs either, the run ends there and succeeds. Text
    alone is nothing new for a run that enters after pretraining.
    """
    if _has_enough_text(config, curated):
        return config
    if not brings_nothing_new(config, curated):
        logger.info("New pairs, but %d bytes of new text: no pretraining.", curated[NEW_BYTES])
        return config.model_copy(update={"continue_pretraining": False})
    logger.info(
        "Nothing new: %d bytes of new text (min_new_bytes=%d), %d new pairs. The run ends with curate.",
        curated[NEW_BYTES],
        config.min_new_bytes,
        curated[NEW_PAIRS],
    )
    return config.model_copy(update={"last_stage": Stage.CURATE})


def brings_nothing_new(config: PipelineConfig, curated: Mapping[str, float]) -> bool:
    """Whether a run that builds on previous data ends with curate, because there is nothing to train on."""
    if PREVIOUS not in config.given or _has_enough_text(config, curated):
        return False
    return not (curated[NEW_PAIRS] and config.base_model)


def _has_enough_text(config: PipelineConfig, curated: Mapping[str, float]) -> bool:
    return curated[NEW_BYTES] >= max(1, config.min_new_bytes) and not config.first_stage


def selection(config: PipelineConfig) -> frozenset[Stage]:
    """Return the stages that this run executes: none in a dry run."""
    return frozenset() if config.dry_run else config.selected


def input_stages(stage: Stage, config: PipelineConfig) -> dict[str, Stage]:
    """Return role -> stage for the inputs that this run produces."""
    selected = selection(config)
    return {role: source for role, source in config.stage_inputs(stage).items() if source in selected}


def build_request(
    stage: Stage, *, run: RunInfo, store: Store, config: PipelineConfig, upstream: Mapping[Stage, Any]
) -> StageRequest:
    """Build the stage's request; `upstream` holds what the tasks of the input stages returned."""
    inputs = config.stage_given(stage)
    for role, source in input_stages(stage, config).items():
        if upstream.get(source) is None:
            raise ConfigError(
                f"{stage.value} needs {role!r} from task {source.value!r}, which left no artifact",
                advice=f"Clear {source.value!r} together with its downstream tasks.",
            )
        inputs[role] = ArtifactRef.model_validate(upstream[source])
    return StageRequest(
        stage=stage,
        run=run,
        store_uri=store.root_uri,
        config=config.stage_config(stage).model_dump(mode="json"),
        execution=config.stage_execution(stage),
        inputs=inputs,
        sources=config.stage_sources(stage),
        gate=_gate_questions(stage, config),
    )


def _gate_questions(stage: Stage, config: PipelineConfig) -> GateQuestions | None:
    """What the job of a training stage can answer for its gate. Not about a reward model that a gold scorer is asked
    about, too: that one may not be trained yet."""
    judged = GOLD_MODEL in config.given or any(GRAPH[other].judges for other in selection(config))
    if not (GRAPH[stage].trains and config.gates.recompute) or (judged and GRAPH[stage].learnt_from):
        return None
    return GateQuestions(max_pairs=config.gates.max_pairs, max_response_length=config.evaluate.max_response_length)


def asks_for_approval(config: PipelineConfig) -> bool:
    """Whether a person decides in this run: only if the form says so and there will be an aligned model."""
    selected = selection(config)
    return (
        config.promote.promotion is Promotion.APPROVAL
        and any(GRAPH[stage].aligned for stage in selected)
        and Stage.PROMOTE in selected
    )


def with_approval(request: StageRequest, config: PipelineConfig, answer: Any) -> StageRequest:
    """Put the person's answer into the request of `promote`, and so into its fingerprint and its manifest."""
    if not asks_for_approval(config):
        return request
    if answer is None:
        raise ConfigError(
            "promotion=approval, and the task 'approve' left no decision",
            advice="Clear 'approve' together with its downstream tasks.",
        )
    approval = Approval.model_validate(answer).model_dump(mode="json")
    return request.model_copy(update={"config": {**request.config, "approval": approval}})


def reviewed_inputs(stage: Stage, config: PipelineConfig) -> dict[str, Stage]:
    """Return role -> stage for the inputs that a person reads before this stage does."""
    return {role: source for role, source in input_stages(stage, config).items() if source in config.reviewed}


def require_review(request: StageRequest, config: PipelineConfig, answer: Any) -> None:
    """Raise ConfigError unless a person has approved exactly what the stage would read of made data."""
    advice = f"Clear {REVIEW_TASK!r} together with its downstream tasks."
    if answer is None:
        raise ConfigError(f"review_made_data=True, and the task {REVIEW_TASK!r} left no approval", advice=advice)
    record = ReviewRecord.model_validate(answer)
    for role, source in reviewed_inputs(request.stage, config).items():
        seen = record.artifacts.get(source.value)
        if not record.is_approved or seen is None or seen.digest != request.inputs[role].digest:
            raise ConfigError(
                f"what {source.value} has made is not what was approved in the task {REVIEW_TASK!r}", advice=advice
            )


def find_hit(store: Store, request: StageRequest) -> StageResult | None:
    """Return the artifact if it exists and is complete; a damaged one is logged, discarded and built again.

    Returns None where only the job can know: with outside sources, whose identity is established where the data is, and
    for an artifact that a reader reported as damaged, because all of it must be read.
    """
    if request.sources:
        return None
    stage = request.stage
    config = stage_config_from_json(stage, request.config)
    found = hits.find_hit(store, stage, config, inputs=request.inputs, unless_doubted=True)
    if (manifest := found.manifest) is None:
        return None
    ref = manifest.ref(artifact_uri(store, manifest.kind, found.fingerprint))
    result = StageResult(stage=stage, hit=True, artifact=ref, metrics=manifest.metrics)
    write_json(store, run_key(request.run.run_id, stage, "result.json"), result.model_dump(mode="json"))
    return result
