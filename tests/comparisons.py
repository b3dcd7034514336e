"""Suites and comparisons as an evaluation publishes them, for tests of what reads them."""

from collections.abc import Mapping
from typing import Any

CHAMPION = {
    "name": "demo-aligned",
    "version": "4",
    "fingerprint": "old",
    "digest": "",
    "uri": "file:///store/artifacts/ppo-model/old",
}


def compared(role: str = "ppo", against: str = "champion", suite: str = "pairs", **changes: Any) -> dict[str, Any]:
    """By default a clear gain: +6 points on 400 items, at least +3."""
    return {
        "role": role,
        "against": against,
        "suite": suite,
        "difference": 0.06,
        "low": 0.03,
        "high": 0.09,
        "level": 0.025,
        "p": 0.001,
        "items": 400,
        "clusters": 400,
        "needed_items": 120,
        **changes,
    }


TIE: dict[str, Any] = {"difference": 0.01, "low": -0.02, "high": 0.04, "p": 0.4, "needed_items": 3_000}
"""What changes of a clear gain when it is a tie."""
WORSE: dict[str, Any] = {"difference": -0.06, "low": -0.09, "high": -0.03, "p": 0.999, "needed_items": None}


def with_comparisons(
    evaluation: Mapping[str, Any],
    *comparisons: Mapping[str, Any],
    champion: Mapping[str, Any] | None = None,
    better: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return the evaluation with these comparisons and their suites, and the champion that it measured."""
    ways = {"language": "lower", "responses": "lower", "length": "", **(better or {})}
    roles = ("sft", "ppo", "dpo", *(("champion",) if champion else ()))
    suites = {
        one["suite"]: {
            "metric": {"language": "bits_per_byte", "pairs": "accuracy"}.get(one["suite"], "mean"),
            "better": ways.get(one["suite"], "higher"),
            "chance": 0.5 if one["suite"] == "pairs" else None,
            "digest": "5" * 64,
            "items": one["items"],
            "roles": {
                role: {"value": 0.6, "low": 0.55, "high": 0.65, "items": one["items"], "skipped": {}} for role in roles
            },
        }
        for one in comparisons
    }
    found = {**evaluation, "suites": suites, "comparisons": [dict(one) for one in comparisons]}
    return found if champion is None else {**found, "champion": dict(champion)}


def win_over_start(evaluation: Mapping[str, Any], role: str = "ppo", **changes: Any) -> dict[str, Any]:
    """An evaluation without a champion, in which one aligned model is clearly better than its start and the other
    is not."""
    other = "dpo" if role == "ppo" else "ppo"
    return with_comparisons(
        evaluation, compared(role, "sft", **changes), compared(other, "sft", **TIE), compared(role, "sft", "language")
    )
