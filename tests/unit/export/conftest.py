"""A small store with real models: an SFT model, a DPO model and a reward model with adapters on it, and their past."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.artifacts.addresses import open_store
from stages.artifacts.store import Store
from stages.config.graph import Stage
from stages.config.places import local_path
from stages.config.request import ArtifactRef, SourceEntry, SourceKind
from stages.config.train import LoRAConfig
from stages.data.tokens.views import TokensArtifact
from stages.models.build import load_causal_lm, load_reward_model, new_causal_lm, save_model
from stages.models.lora import add_adapter
from tests.pipeline_records import publish_artifact
from tests.small_world import MODEL, make_tokens

IDS = torch.tensor([[0, 4, 70, 71, 72, 1, 5]])
SOURCES = (
    SourceEntry(role="documents", kind=SourceKind.DATA, uri="file:///home/ada/secret-project/books", digest="b" * 64),
    SourceEntry(
        role="instructions", kind=SourceKind.DATA, uri="hf://org/chats?split=train#weight=0.3", digest="c" * 64
    ),
)
LORA = LoRAConfig(rank=2, alpha=8.0)


@dataclass(frozen=True)
class House:
    """Artifacts by stage; those of `dpo` and `reward` have an adapter."""

    home: Path
    store: Store
    made: dict[Stage, ArtifactRef]

    def folder(self, stage: Stage) -> Path:
        return local_path(self.made[stage].uri)


def stirred(model: Any, *, seed: int = 5) -> Any:
    """Weights that are trained start as zero; give them something to say."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.fixture(scope="session")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    home = tmp_path_factory.mktemp("house")
    tokens_ref = make_tokens(home)
    tokens = TokensArtifact(local_path(tokens_ref.uri))
    store = open_store((home / "store").as_uri())
    curated = home / "curated"
    curated.mkdir()
    (curated / "ledger.json").write_text("{}")
    made = {Stage.TOKENIZE: tokens_ref}
    made[Stage.CURATE], _ = publish_artifact(store, Stage.CURATE, {}, curated, sources=SOURCES)

    def add(stage: Stage, model: Any, inputs: dict[str, ArtifactRef], **fields: Any) -> None:
        folder = home / f"model-{stage.value}"
        folder.mkdir()
        save_model(model, model.state_dict(), folder, tokens)
        (folder / "history.jsonl").write_text('{"step": 1}\n')
        made[stage], _ = publish_artifact(store, stage, inputs, folder, **fields)

    base = new_causal_lm(MODEL, tokens, seed=1)
    both = {"tokens": tokens_ref}
    add(Stage.PRETRAIN, base, {"curated": made[Stage.CURATE]}, ledger={"tokens_trained": 5_000_000})
    add(Stage.SFT, new_causal_lm(MODEL, tokens, seed=2), {**both, "model": made[Stage.PRETRAIN]})
    start = local_path(made[Stage.SFT].uri)
    adapted = {**both, "model": made[Stage.SFT]}
    config = {"seed": 0, "lora": LORA.model_dump(mode="json"), "file": "/home/ada/secret-project/x"}
    dpo = stirred(add_adapter(load_causal_lm(start, tokens), LORA, seed=0))
    add(Stage.DPO, dpo, adapted, config=config, metrics={"eval/dpo_accuracy": 0.75})
    reward = stirred(add_adapter(load_reward_model(start, tokens), LORA, seed=0))
    add(Stage.REWARD, reward, adapted, config=config)
    return House(home, store, made)


Logits = Callable[[Any], torch.Tensor]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits
