"""Data that SmolLM2-135M-Instruct makes with itself as critic and generator, on one CPU core.

`python -m tests.alignment.made FOLDER constitution|synthesis --sources FILE` prints what was made and why the rest was
not; what is finished in FOLDER is not made again.
"""

import argparse
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from operators.given import given_artifacts
from stages.artifacts.addresses import open_store
from stages.artifacts.manifests import fetch, read_manifest
from stages.config.graph import Stage
from stages.config.places import SMOLLM2
from stages.config.resolve import resolve
from tests.playing import ONE_THREAD, play

_TASKS: dict[str, tuple[Stage, dict[str, Any], dict[str, Any]]] = {
    "constitution": (
        Stage.CONSTITUTION,
        {"ai_feedback": "both"},
        {
            "constitution.num_prompts": 32,
            "constitution.max_response_length": 256,
            "constitution.max_critique_length": 96,
            "constitution.temperature": 0.5,
        },
    ),
    "synthesis": (
        Stage.SYNTHESIZE,
        {"synthesis": "self_instruct"},
        {
            "synthesize.num_rows": 20,
            "synthesize.prompts_per_round": 4,
            "synthesize.max_rounds": 8,
            "synthesize.max_task_length": 160,
            "synthesize.max_response_length": 128,
        },
    ),
}
_SOURCES = {"constitution": "constitution_prompts", "synthesis": "synthesis_sources"}


def made(home: Path, task: str, sources: Sequence[str], **settings: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The ledger of the stage and its transcript: one record for each response, with what became of it."""
    stage, params, overrides = _TASKS[task]
    config = resolve(
        {
            "recipe": "smollm",
            "base_model": SMOLLM2,
            "last_stage": "curate",
            _SOURCES[task]: list(sources),
            **params,
            "overrides": {**ONE_THREAD, **overrides, **settings},
        }
    )
    config = config.with_given(given_artifacts(config))
    done = play(open_store((home / "store").as_uri()), config, task, only=(Stage.CONVERT, stage))[stage]
    lines = (fetch(done, home / "cache") / "transcript.jsonl").read_text(encoding="utf-8").splitlines()
    return read_manifest(done).ledger, [json.loads(line) for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.alignment.made")
    parser.add_argument("folder", type=Path)
    parser.add_argument("task", choices=tuple(_TASKS))
    parser.add_argument("--sources", nargs="+", required=True)
    parser.add_argument("--settings", type=json.loads, default={}, help="overrides, as JSON")
    chosen = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    os.environ["ATHANOR_SCRATCH"] = str(chosen.folder / "scratch")
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    ledger, transcript = made(chosen.folder, chosen.task, chosen.sources, **chosen.settings)
    print(json.dumps(ledger, indent=1))
    for record in transcript:
        print(json.dumps(record, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
