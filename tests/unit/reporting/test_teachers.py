"""What the report says an aligned model learnt from."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from stages.config.graph import GRAPH, Stage
from stages.config.resolve import resolve
from stages.reporting.model_views import _means


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({}, "PPO trains 2 models beside 2 frozen ones and learns from the reward model."),
        (
            {"ppo.scorer.kind": "json_schema", "ppo.scorer.json_schema": "{}", "ppo.estimator.kind": "rloo"},
            "PPO trains 1 model beside 1 frozen one and learns from scores (json schema).",
        ),
    ],
)
def test_the_scorer_is_named(overrides: dict[str, Any], said: str) -> None:
    config = resolve({"recipe": "tiny", "alignment": "ppo", "overrides": overrides}).ppo
    manifest = SimpleNamespace(config=config.model_dump(mode="json"))
    assert _means(GRAPH[Stage.PPO], cast(Any, manifest)) == said
