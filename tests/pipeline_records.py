"""A whole pipeline run as published artifacts with invented content, for tests of tracking and of what reads it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.artifacts.addresses import artifact_uri, open_store
from stages.artifacts.manifests import content_digest, publish, upload_files
from stages.artifacts.store import Store
from stages.config.base import Config
from stages.config.execution import ExecutionConfig
from stages.config.graph import GRAPH, Stage, pipeline_stages
from stages.config.places import local_path
from stages.config.request import (
    ArtifactRef,
    Cost,
    InputEntry,
    Manifest,
    RunInfo,
    SourceEntry,
    SourceKind,
    StageRequest,
)
from stages.job.context import StageContext
from stages.job.progress import Progress
from stages.tracking.tracker import NullTracker, Tracker

RAW_DIGEST = "5eed" + "0" * 60
RAW_DATA = SourceEntry(role="documents", kind=SourceKind.DATA, uri="installed-docs", digest=RAW_DIGEST)
WHOLE_RUN = tuple(stage for stage in pipeline_stages() if not GRAPH[stage].provides and not GRAPH[stage].asked_by)
"""The stages of a run that is given no model."""
PLAIN_RUN = tuple(stage for stage in WHOLE_RUN if not GRAPH[stage].judges)
"""Those of a run that trains no gold scorer either."""
ROLE_OF = {stage: spec.role for stage, spec in GRAPH.items() if spec.role}

LEDGER: dict[str, Any] = {
    "documents": {
        "steps": [
            {
                "step": "read",
                "in": {"documents": 10, "bytes": 1000},
                "kept": {"documents": 9, "bytes": 900},
                "dropped": {"bad_json": {"documents": 1, "bytes": 100}},
                "samples": {
                    "bad_json": [
                        {"id": "doc-1", "text": "<script>alert('raw')</script>"},
                        {"id": "planted/toxic/3", "text": "a blithering booby"},
                    ]
                },
            },
            {
                "step": "toxicity",
                "in": {"documents": 9, "bytes": 900},
                "kept": {"documents": 7, "bytes": 700},
                "dropped": {"offensive_words": {"documents": 2, "bytes": 200}},
                "samples": {"offensive_words": [{"id": "doc-2", "text": "you utter nincompoop"}]},
            },
        ]
    },
    "planted": {"foreign": {"planted": 4, "found": 3, "missed": 1, "dropped_elsewhere": 0, "dropped_by": {}}},
}

EVALUATION: dict[str, Any] = {
    "models": {
        "base": {"eval/perplexity": 60.0, "eval/response_loss": 3.0, "eval/score_mean": -1.5},
        "sft": {"eval/perplexity": 70.0, "eval/response_loss": 2.4, "eval/score_mean": -0.5, "eval/score_std": 0.8},
        "ppo": {"eval/perplexity": 75.0, "eval/score_mean": 0.3, "eval/win_rate": 0.71, "eval/kl": 4.2},
        "dpo": {"eval/perplexity": 72.0, "eval/score_mean": 0.1, "eval/win_rate": 0.64, "eval/kl": 2.5},
    },
    "unigram_perplexity": 800.0,
    "reward": {"reward/accuracy": 0.86, "reward/margin": 1.4, "reward/accuracy_mismatch": 0.9},
    "data": {"digest": "d" * 64, "num_prompts": 128},
    "reward_fingerprint": "r" * 64,
}

SAMPLES = [
    {
        "prompt": "What does `html.escape` do?",
        "responses": {
            "base": "the the",
            "sft": "Escapes <b>text</b> & more.",
            "ppo": "</p><script>x()</script>",
            "dpo": "",
        },
        "scores": {"base": -2.0, "sft": -0.3, "ppo": 0.9, "dpo": 0.2},
    }
]


def run_info(run_id: str = "manual-1", **changes: Any) -> RunInfo:
    return RunInfo(run_id=run_id, name="demo", dag_id="llm_pipeline", airflow_run_id="manual__1", **changes)


def fingerprint_of(stage: Stage, salt: str = "") -> str:
    """Readable in failures, and hexadecimal like a real one."""
    return (stage.value + salt).encode().hex().ljust(64, "0")[:64]


def refs_for(stage: Stage, made: Mapping[Stage, ArtifactRef]) -> dict[str, ArtifactRef]:
    """The inputs that the graph gives a stage, of those that exist."""
    return {role: made[source] for role, source in GRAPH[stage].inputs if source in made}


def publish_artifact(
    store: Store,
    stage: Stage,
    inputs: Mapping[str, ArtifactRef],
    folder: Path,
    *,
    salt: str = "",
    fingerprint: str = "",
    **fields: Any,
) -> tuple[ArtifactRef, Manifest]:
    """Publish what lies in `folder` as this stage's artifact, under an invented fingerprint if none is given."""
    fingerprint, kind = fingerprint or fingerprint_of(stage, salt), GRAPH[stage].kind
    files = upload_files(store, folder, kind=kind, fingerprint=fingerprint)
    values: dict[str, Any] = {
        "execution": {"git_commit": "c0ffee", "submission_id": f"athanor-{stage.value}"},
        "config": {"seed": 0, "optimizer": {"learning_rate": 1e-3}},
        "cost": Cost(wall_seconds=90.0, cpu_seconds=170.0, peak_memory_bytes=2**30, attempts=1),
        "created_at": "2026-11-23T09:00:00+00:00",
        **fields,
    }
    manifest = Manifest(
        kind=kind,
        stage=stage,
        version=1,
        fingerprint=fingerprint,
        digest=content_digest(files),
        files=files,
        inputs=tuple(
            InputEntry(role=role, kind=ref.kind, uri=ref.uri, fingerprint=ref.fingerprint, digest=ref.digest)
            for role, ref in inputs.items()
        ),
        **values,
    )
    assert publish(store, manifest).uri == artifact_uri(store, kind, fingerprint)
    return manifest.ref(artifact_uri(store, kind, fingerprint)), manifest


def publish_run(
    root: Path,
    *,
    without: frozenset[Stage] = frozenset(),
    salt: str = "",
    evaluation: Mapping[str, Any] = EVALUATION,
    promotion: Mapping[str, Any] | None = None,
    made_data: Mapping[Stage, ArtifactRef] | None = None,
) -> tuple[Store, dict[Stage, ArtifactRef]]:
    """Publish every stage's artifact up to promote; `salt` makes another run's models in the same store, `made_data` is
    curated with the rest."""
    store = open_store((root / "store").as_uri())
    made: dict[Stage, ArtifactRef] = dict(made_data or {})
    for stage, spec in GRAPH.items():
        if not spec.role or stage in without:
            continue
        folder = root / f"content-{stage.value}{salt}"
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in content_of(stage, evaluation, promotion or {}).items():
            (folder / name).write_text(text + salt if name == "model.safetensors" else text, encoding="utf-8")
        own = salt if stage not in (Stage.CURATE, Stage.TOKENIZE) else ""
        sources = {"sources": (RAW_DATA,), "ledger": LEDGER} if stage is Stage.CURATE else {}
        made[stage], _ = publish_artifact(store, stage, refs_for(stage, made), folder, salt=own, **sources)
    return store, made


def tampered(ref: ArtifactRef, **changes: Any) -> None:
    """Change fields of a manifest in a folder store, as whoever may write there can."""
    path = local_path(ref.uri) / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def content_of(stage: Stage, evaluation: Mapping[str, Any], promotion: Mapping[str, Any]) -> dict[str, str]:
    """Files of an artifact that are read as text, and something in place of a model's weights."""
    if GRAPH[stage].trains:
        rows = [{"step": step, "train/loss": 4.0 - step / 100, **_own_metrics(stage, step)} for step in range(1, 101)]
        return {"model.safetensors": stage.value, "history.jsonl": "".join(json.dumps(row) + "\n" for row in rows)}
    match stage:
        case Stage.EVALUATE:
            return {"metrics.json": json.dumps(evaluation), "samples.json": json.dumps(SAMPLES)}
        case Stage.PROMOTE:
            return {"promotion.json": json.dumps(promotion)}
        case _:
            return {"ledger.json": json.dumps(LEDGER)}


def _own_metrics(stage: Stage, step: int) -> dict[str, float]:
    match stage:
        case Stage.PPO:
            return {"ppo/score": step / 50 - 1, "ppo/kl": step / 25, **({"eval/score": 0.9} if step == 100 else {})}
        case Stage.DPO:
            return {"dpo/accuracy": 0.5 + step / 400, "dpo/margin": step / 100, "dpo/chosen_drift": -step / 50}
        case Stage.REWARD:
            return {"reward/accuracy": 0.5 + step / 300}
        case _:
            return {}


def request_for(
    stage: Stage,
    store: Store,
    inputs: Mapping[str, ArtifactRef],
    config: Config | None = None,
    run: RunInfo | None = None,
) -> StageRequest:
    return StageRequest(
        stage=stage,
        run=run or run_info(),
        store_uri=store.root_uri,
        config=config.model_dump(mode="json") if config else {},
        execution=ExecutionConfig(),
        inputs=dict(inputs),
        task_id=stage.value,
        submission_id=f"athanor-{stage.value}",
    )


def context_for(
    request: StageRequest, store: Store, config: Config, root: Path, tracker: Tracker | NullTracker | None = None
) -> StageContext:
    """What the runner would hand to a verb."""
    work_dir = root / f"work-{request.stage.value}-{len(list(root.iterdir()))}"
    output_dir = work_dir / "output"
    output_dir.mkdir(parents=True)
    return StageContext(
        request=request,
        config=config,
        fingerprint=fingerprint_of(request.stage),
        sources=(),
        store=store,
        work_dir=work_dir,
        output_dir=output_dir,
        tracker=tracker or NullTracker(),
        progress=Progress(store, request.run.run_id, request.stage),
    )
