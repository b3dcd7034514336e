"""The same tasks on the same published model, by lm-evaluation-harness's own command line and through the stages."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip(
    "lm_eval", reason="lm-evaluation-harness is not installed; `make test-real` installs the extra `eval`"
)

from stages.artifacts.manifests import fetch, read_manifest
from stages.config.graph import Stage
from stages.config.request import SourceKind
from stages.judge.scores import ScoreTable
from tests.playing import ONE_THREAD, alone
from tests.real.conftest import play_in
from tests.real.harness_tasks import write_tasks

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(3600)]

_METRICS = {
    "small_products": ("small_products", "acc,none"),
    "small_products-acc_norm": ("small_products", "acc_norm,none"),
    "small_sentences": ("small_sentences", "acc,none"),
    "small_sums": ("small_sums", "exact_match,strict"),
    "small_sums-exact_match-first-number": ("small_sums", "exact_match,first-number"),
}
"""Suites of ours, and what the harness calls their numbers."""
_STAGES = (Stage.CONVERT, Stage.CURATE, Stage.TOKENIZE, Stage.EVALUATE)
_CURATE: dict[str, Any] = {
    "curate.packages": ["click"],
    "curate.heldout_packages": [],
    "curate.include_stdlib": False,
    "curate.max_bytes": 60_000,
    "curate.planted": 0,
    "curate.heldout_fraction": 0.2,
    "tokenize.sequence_length": 128,
    "tokenize.max_prompt_length": 64,
    "evaluate.max_documents_tokens": 1024,
    "evaluate.max_documents": 4,
    "evaluate.max_instructions": 4,
    "evaluate.max_preferences": 4,
    "evaluate.max_prompts": 2,
    "evaluate.num_samples": 2,
    "evaluate.max_response_length": 8,
    **ONE_THREAD,
}


@dataclass(frozen=True)
class Both:
    """What the product and the command line say."""

    report: dict[str, Any]
    """`metrics.json` of the evaluation."""
    scores: ScoreTable
    sources: list[tuple[SourceKind, str]]
    """Of the evaluation's manifest."""
    harness: dict[str, dict[str, float]]
    samples: dict[str, list[dict[str, Any]]]
    """What the command line wrote for each item, by task."""


@pytest.fixture(scope="module")
def both(model_address: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    home = tmp_path_factory.mktemp("parity")
    files = write_tasks(_folder(home / "tasks"))
    params = {
        "recipe": "smollm",
        "base_model": model_address,
        "first_stage": "evaluate",
        "documents": ["installed-docs"],
        "instructions": ["derived"],
        "preferences": ["derived"],
        "benchmarks": [str(path) for path in files.values()],
        "overrides": _CURATE,
    }
    with alone(home):
        done = play_in(home, params, _STAGES)
        cache = home / "scratch" / "cache"
        evaluation = fetch(done[Stage.EVALUATE], cache)
        model = fetch(done[Stage.CONVERT], cache)
        harness, samples = _by_command_line(model, files, home / "out")
        yield Both(
            json.loads((evaluation / "metrics.json").read_text()),
            ScoreTable(evaluation / "scores.parquet"),
            [(source.kind, source.uri) for source in read_manifest(done[Stage.EVALUATE]).sources],
            harness,
            samples,
        )


def _folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


def _by_command_line(
    model: Path, files: dict[str, Path], out: Path
) -> tuple[dict[str, dict[str, float]], dict[str, list[dict[str, Any]]]]:
    """Run `lm_eval` as its documentation says, in the tasks' folder, because it finds their data from there."""
    folder = next(iter(files.values())).parent
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={model},dtype=float32"]
    command += ["--tasks", ",".join(files), "--include_path", str(folder), "--device", "cpu", "--batch_size", "4"]
    command += ["--output_path", str(out), "--log_samples"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(out / "home"), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=2700
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = out.rglob("results_*.json")
    found = json.loads(results.read_text())["results"]
    samples = {}
    for task in files:
        (path,) = out.rglob(f"samples_{task}_*.jsonl")
        samples[task] = [json.loads(line) for line in path.read_text().splitlines()]
    return found, samples


@pytest.mark.parametrize("suite", _METRICS)
def test_the_product_gives_the_numbers_of_the_command_line(both: Both, suite: str) -> None:
    task, metric = _METRICS[suite]
    ours = both.report["suites"][suite]["roles"]["base"]
    assert ours["skipped"] == {}
    assert ours["value"] == pytest.approx(both.harness[task][metric], abs=1e-9)
    assert ours["low"] <= ours["value"] <= ours["high"]


def test_so_do_perplexities_up_to_rounding(both: Both) -> None:
    import math

    ours = both.report["suites"]["small_sentences-perplexity"]["roles"]["base"]["value"]
    assert math.exp(-ours) == pytest.approx(both.harness["small_sentences"]["perplexity,none"], rel=1e-4)


@pytest.mark.parametrize("suite", _METRICS)
def test_every_item_has_the_value_that_the_command_line_gave_it(both: Both, suite: str) -> None:
    task, key = _METRICS[suite]
    metric, kind = key.split(",")
    theirs = {str(one["doc_id"]): float(one[metric]) for one in both.samples[task] if one["filter"] == kind}
    column = both.scores.column(suite, "base")
    assert dict(zip(column.items, column.values.tolist(), strict=True)) == theirs


def test_the_model_is_neither_always_right_nor_always_wrong(both: Both) -> None:
    """Or equal numbers would say little."""
    values = {both.report["suites"][suite]["roles"]["base"]["value"] for suite in _METRICS}
    assert any(0 < value < 1 for value in values)
    assert len(values) > 2


def test_the_task_files_are_benchmarks_in_the_manifest(both: Both) -> None:
    kinds = [kind for kind, _ in both.sources]
    assert kinds.count(SourceKind.BENCHMARK) == 3
