"""The small world, made once per session."""

from pathlib import Path

import pytest

from stages.config.graph import Stage
from stages.config.request import ArtifactRef
from tests.small_world import EXPERTS, make_models, make_tokens


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("world")


@pytest.fixture(scope="session")
def tokens(world: Path) -> ArtifactRef:
    return make_tokens(world)


@pytest.fixture(scope="session")
def stage_inputs(world: Path, tokens: ArtifactRef) -> dict[Stage, dict[str, ArtifactRef]]:
    return make_models(world, tokens)


@pytest.fixture(scope="session")
def expert_inputs(tmp_path_factory: pytest.TempPathFactory, tokens: ArtifactRef) -> dict[Stage, dict[str, ArtifactRef]]:
    """As `stage_inputs`, with mixtures of experts."""
    return make_models(tmp_path_factory.mktemp("experts"), tokens, EXPERTS)
