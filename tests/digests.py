"""What recipe `tiny` builds, stage by stage, without Airflow, Ray head or MLflow: `python -m tests.digests [file]`.

Refactoring must change none of it. Run it before and after on the same machine: the first run writes the file, a later
one compares with it and names each file that differs. Digests of trained models differ between kinds of processor.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from stages.artifacts.addresses import open_store, run_key
from stages.artifacts.manifests import read_manifest
from stages.artifacts.store import Store, write_json
from stages.config.graph import GRAPH, Stage, pipeline_stages
from stages.config.pipeline import PipelineConfig
from stages.config.request import ArtifactRef, RunInfo, StageRequest, StageResult
from stages.config.resolve import resolve
from tests.places import REPOSITORY

RUN = RunInfo(run_id="digests", name="tiny")


def build(stage: Stage, config: PipelineConfig, store: Store, inputs: dict[str, ArtifactRef]) -> ArtifactRef:
    """Run one stage in a process of its own, as a Ray job would."""
    request = StageRequest(
        stage=stage,
        run=RUN,
        store_uri=store.root_uri,
        config=config.stage_config(stage).model_dump(mode="json"),
        execution=config.stage_execution(stage),
        inputs=inputs,
        sources=config.stage_sources(stage),
    )
    key = run_key(RUN.run_id, stage, "config.json")
    write_json(store, key, request.model_dump(mode="json"))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    done = subprocess.run(
        [sys.executable, "-m", "stages", f"{store.root_uri}/{key}"],
        env={**environment, "ARTIFACT_STORE": store.root_uri},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{stage.value} failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return StageResult.model_validate_json(store.read_bytes(run_key(RUN.run_id, stage, "result.json"))).artifact


def built(folder: Path) -> dict[str, Any]:
    """Build every stage that needs no MLflow; return fingerprint, digest and hashes of files by stage."""
    store, config = open_store(folder.as_uri()), resolve({"recipe": "tiny"})
    refs: dict[Stage, ArtifactRef] = {}
    found: dict[str, Any] = {}
    for stage in (stage for stage in pipeline_stages() if stage in config.selected):
        if GRAPH[stage].closing and stage is not Stage.EVALUATE:
            continue  # promotion and report record addresses and times
        refs[stage] = build(
            stage, config, store, {role: refs[source] for role, source in config.stage_inputs(stage).items()}
        )
        files = {entry.path: entry.sha256 for entry in read_manifest(refs[stage]).files}
        found[stage.value] = {"fingerprint": refs[stage].fingerprint, "digest": refs[stage].digest, "files": files}
        print(f"{stage.value:9} {refs[stage].fingerprint[:12]} {refs[stage].digest[:12]}", flush=True)
    return found


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Name what differs, a line each."""
    lines = []
    for stage in sorted(before.keys() | after.keys()):
        old, new = (found.get(stage) or {"fingerprint": "", "files": {}} for found in (before, after))
        if old["fingerprint"] != new["fingerprint"]:
            lines.append(f"{stage}: another fingerprint, so older artifacts no longer hit")
        paths = {path for path in old["files"] | new["files"] if old["files"].get(path) != new["files"].get(path)}
        lines += [f"{stage}: {path} differs" for path in sorted(paths)]
    return lines


def main(arguments: list[str]) -> int:
    known = Path(arguments[0]) if arguments else None
    with tempfile.TemporaryDirectory() as folder:
        found = built(Path(folder))
    if known is None:
        return 0
    if not known.exists():
        known.write_text(json.dumps(found, indent=1) + "\n")
        print(f"written to {known}; run this again after your change")
        return 0
    lines = differences(json.loads(known.read_text()), found)
    print("\n".join(lines) or f"all as in {known}")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
