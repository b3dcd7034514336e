"""Small models with random weights, which write nonsense, as a server and a chat load them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from stages.artifacts.addresses import open_store
from stages.artifacts.store import Store
from stages.config.graph import Stage
from stages.config.places import local_path
from stages.config.request import ArtifactRef
from stages.data.tokens.views import TokensArtifact
from stages.models.build import new_causal_lm, save_model
from stages.serve.address import Address
from stages.serve.loading import ServedModel, load_model, model_files
from tests.pipeline_records import publish_artifact
from tests.small_world import MODEL, make_tokens


@dataclass(frozen=True)
class House:
    """A store with a base model and an SFT model, which differ in their weights."""

    home: Path
    store: Store
    made: dict[Stage, ArtifactRef]

    def uri(self, stage: Stage) -> str:
        return self.made[stage].uri


@pytest.fixture(scope="session")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    home = tmp_path_factory.mktemp("serve")
    tokens_ref = make_tokens(home)
    tokens = TokensArtifact(local_path(tokens_ref.uri))
    store = open_store((home / "store").as_uri())
    made: dict[Stage, ArtifactRef] = {Stage.TOKENIZE: tokens_ref}
    for seed, (stage, role) in enumerate(((Stage.PRETRAIN, ""), (Stage.SFT, "model"))):
        model = new_causal_lm(MODEL.model_copy(update={"initializer_range": 0.3}), tokens, seed=seed)
        folder = home / f"model-{stage.value}"
        folder.mkdir()
        save_model(model, model.state_dict(), folder, tokens)
        inputs = {"tokens": tokens_ref, **({role: made[Stage.PRETRAIN]} if role else {})}
        made[stage], _ = publish_artifact(store, stage, inputs, folder)
    return House(home, store, made)


Load = Callable[..., ServedModel]


@pytest.fixture(scope="session")
def load(house: House) -> Load:
    """Load the model of a stage as a server does."""

    def loaded(stage: Stage = Stage.SFT, name: str = "", context: int = 0) -> ServedModel:
        address = Address(name or stage.value, house.uri(stage))
        files = model_files(address, house.home / "cache")
        return load_model(address, files, device=torch.device("cpu"), dtype=torch.float32, context_length=context)

    return loaded


@pytest.fixture(scope="session")
def served(load: Load) -> ServedModel:
    return load()
