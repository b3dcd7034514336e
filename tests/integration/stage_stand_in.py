"""What the Ray jobs of the operator's tests run instead of a verb: `python stage_stand_in.py <config uri> <behaviour>`.

It keeps the contract of `python -m stages` (request in, manifest and result out, failure.json and exit code) in a
fraction of a second, and can end in every way a stage can end.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

from stages.artifacts.addresses import artifact_uri, run_key
from stages.artifacts.manifests import content_digest, fingerprint, publish, upload_files, utc_now
from stages.artifacts.store import Store, write_json
from stages.config.errors import EXIT_CODES, Category
from stages.config.gate_records import Findings, GateRequest, findings_key, gate_key
from stages.config.graph import GRAPH, Stage
from stages.config.pipeline import stage_config_from_json
from stages.config.request import Cost, Failure, InputEntry, Manifest, StageRequest, StageResult, digests_of
from stages.job.runner import load_request, read_request
from tests.pipeline_records import EVALUATION, SAMPLES


def build(request: StageRequest, store: Store) -> None:
    """Publish an artifact of small files, and the result."""
    config, spec = stage_config_from_json(request.stage, request.config), GRAPH[request.stage]
    sources = tuple(source.identified("digest") for source in request.sources)
    identity = fingerprint(
        request.stage, config, inputs=request.inputs, sources=digests_of(sources), store_uri=store.root_uri
    )
    folder = Path(tempfile.mkdtemp())
    for name, text in content(request, identity).items():
        (folder / name).write_text(text)
    files = upload_files(store, folder, kind=spec.kind, fingerprint=identity)
    manifest = Manifest(
        kind=spec.kind,
        stage=spec.stage,
        version=spec.version,
        fingerprint=identity,
        digest=content_digest(files),
        files=files,
        inputs=tuple(
            InputEntry(role=role, **ref.model_dump(include={"kind", "uri", "fingerprint", "digest"}))
            for role, ref in request.inputs.items()
        ),
        sources=sources,
        config=request.config,
        execution={"submission_id": request.submission_id},
        metrics={"curate/documents_kept": 3.0} if request.stage is Stage.CURATE else {},
        mlflow_run_id="mlflow-run-of-the-stand-in",
        created_at=utc_now(),
    )
    publish(store, manifest)
    ref = manifest.ref(artifact_uri(store, spec.kind, identity))
    result = StageResult(
        stage=request.stage,
        hit=False,
        artifact=ref,
        wall_seconds=0.1,
        cost=Cost(wall_seconds=10, productive_seconds=8, cpu_seconds=7),
    )
    write_json(store, run_key(request.run.run_id, request.stage, "result.json"), result.model_dump(mode="json"))


def content(request: StageRequest, identity: str) -> dict[str, str]:
    """What the next task reads of this stage; one file with anything where nothing is read."""
    match request.stage:
        case Stage.EVALUATE:
            models = {role: EVALUATION["models"][role] for role in request.inputs if role in EVALUATION["models"]}
            samples = [
                {**sample, "responses": {role: sample["responses"][role] for role in models}} for sample in SAMPLES
            ]
            # What a gate compares: the data and the scorer are those of the run.
            refs = request.inputs
            data = {**EVALUATION["data"], "digest": refs["tokens"].digest} if "tokens" in refs else EVALUATION["data"]
            scorer = refs["reward"].fingerprint if "reward" in refs else None
            report = {**EVALUATION, "models": models, "data": data, "reward_fingerprint": scorer}
            return {
                "metrics.json": json.dumps(report),
                "samples.json": json.dumps(samples),
            }
        case Stage.RESPOND:
            rows = [
                {"id": f"prompt-{n}", "prompt": f"What is {n} + {n}?", "responses": [f"It is {2 * n}.", f"{n}, twice."]}
                for n in range(request.config["num_prompts"])
            ]
            return {"responses.jsonl": "".join(json.dumps(row) + "\n" for row in rows)}
        case _:
            return {"content.txt": identity}


def mlflow_run(request: StageRequest) -> dict[str, str]:
    """A page that exists where there is an MLflow: the parent run's. Invented otherwise."""
    parent = request.run.parent_run_id or ""
    return {"run_id": parent} if len(parent) == 32 else {"run_id": "mlflow-run-of-the-stand-in", "experiment_id": "3"}


def fail(request: StageRequest, store: Store, category: Category, message: str) -> int:
    failure = Failure(category=category, message=message, advice="Do something about it.")
    write_json(store, run_key(request.run.run_id, request.stage, "failure.json"), failure.model_dump(mode="json"))
    return EXIT_CODES[category]


def examine(config_uri: str) -> int:
    """In the place of `python -m stages.gate`: there is no model in what `build` publishes, and nothing is wrong."""
    request, store = read_request(GateRequest, config_uri)
    for key in (findings_key(request), gate_key(request.run.run_id, request.stage, "result.json")):
        write_json(store, key, Findings().model_dump(mode="json"))
    return 0


def main(config_uri: str, behaviour: str) -> int:
    if behaviour == "gate":
        return examine(config_uri)
    request, store = load_request(config_uri)
    print("attempt", request.try_number, "of", request.submission_id, flush=True)
    match behaviour.partition(":"):
        case ("succeed", _, seconds):
            print("ATHANOR_MLFLOW_RUN", json.dumps(mlflow_run(request)), flush=True)
            print("ATHANOR_PROGRESS", json.dumps({"stage": request.stage.value, "done": 1, "total": 2, "unit": "step"}))
            time.sleep(float(seconds or 0))
            build(request, store)
        case ("fail", _, category):
            return fail(request, store, Category(category), f"the stand-in fails with {category}.")
        case ("fail_once", _, category) if request.try_number == 1:
            return fail(request, store, Category(category), f"the stand-in fails with {category}.")
        case ("fail_once", _, _):
            build(request, store)
        case ("fail_at", _, stage) if stage == request.stage:
            return fail(request, store, Category.DATA, f"{stage} has nothing to work on.")
        case ("fail_at", _, _):
            build(request, store)
        case ("die", _, _):
            os.kill(os.getpid(), signal.SIGKILL)
        case ("forget", _, _):
            pass
        case _:
            raise ValueError(behaviour)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
