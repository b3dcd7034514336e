"""How near a number must be to what training measured: by the number format, and for a sum by its length."""

from typing import Any

import pytest

from stages.config.gate_records import Outcome
from stages.config.graph import Stage
from stages.config.request import Manifest
from stages.judge.gates.again import DRIFT
from stages.judge.gates.heldout import compare_again


def trained(compute_dtype: str, recorded: float) -> Manifest:
    return Manifest(
        kind="dpo-model",
        stage=Stage.DPO,
        version=1,
        files=(),
        inputs=(),
        config={},
        created_at="2026-01-01T00:00:00+00:00",
        fingerprint="f" * 64,
        digest="d" * 64,
        metrics={DRIFT: recorded},
        execution={"compute_dtype": compute_dtype},
    )


@pytest.mark.parametrize(
    ("compute_dtype", "alike", "found", "outcome"),
    [
        ("bfloat16", False, -0.69, Outcome.PASSED),  # measured on SmolLM2: recorded in bfloat16, again in float32
        ("bfloat16", False, -1.50, Outcome.FAILED),  # 100 targets of 1e-2
        ("bfloat16", True, -0.69, Outcome.PASSED),
        ("bfloat16", True, -0.80, Outcome.FAILED),  # 100 targets of 3e-3
        ("float32", True, -0.4905, Outcome.PASSED),
        ("float32", True, -0.492, Outcome.FAILED),  # 100 targets of 1e-5
        ("bfloat16", True, float("nan"), Outcome.FAILED),
    ],
)
def test_a_drift_over_a_hundred_targets(compute_dtype: str, alike: bool, found: float, outcome: Outcome):
    options: dict[str, Any] = {"alike": alike, "targets": 100.0}
    assert compare_again(trained(compute_dtype, -0.49), DRIFT, found, **options).outcome is outcome


def test_a_difference_of_large_scores_is_as_exact_as_they_are():
    manifest = trained("bfloat16", 0.5)
    assert compare_again(manifest, DRIFT, 0.6, size=10.0).outcome is Outcome.PASSED
    assert compare_again(manifest, DRIFT, 0.6).outcome is Outcome.FAILED
