"""Worlds for the judges' tests: a run with its curated data, and a champion that may have another tokenizer."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stages import evaluate, tokenize
from stages.config.closing import EvaluateConfig
from stages.config.curate import CurateConfig
from stages.config.graph import Stage
from stages.config.preferences import GoldConfig
from stages.config.request import ArtifactRef
from stages.config.tokens import TokenizeConfig
from stages.data.tokens.views import TokensArtifact
from stages.job.context import StageContext, StageOutcome
from stages.models.build import load_reward_model, new_causal_lm, save_model
from tests.small_world import CONFIGS, MODEL, make_context, make_models, published, write_curated

SMALL = EvaluateConfig(
    max_documents=5,
    max_prompts=6,
    max_preferences=6,
    max_instructions=6,
    max_response_length=4,
    num_samples=2,
)
TINY = TokenizeConfig(vocab_size=300, sequence_length=64, max_prompt_length=32, bpe_train_bytes=10_000)
Inputs = dict[str, ArtifactRef]


@dataclass(frozen=True)
class World:
    """A store with a run's tokens, curated data and models; `dpo` is the SFT model itself."""

    home: Path
    inputs: Inputs


def make_world(home: Path, settings: TokenizeConfig = TINY) -> World:
    """Curate by hand, tokenize for real, publish an untrained model and a reward model."""
    curate = make_context(home, Stage.CURATE, CurateConfig())
    write_curated(curate.output_dir)
    curated = published(curate)
    context = make_context(home, Stage.TOKENIZE, settings, {"curated": curated})
    tokenize.run(context)
    tokens = published(context)
    models = make_models(home, tokens)[Stage.PPO]
    return World(
        home,
        {
            "tokens": tokens,
            "curated": curated,
            "reward": models["reward"],
            "sft": models["model"],
            "dpo": models["model"],
        },
    )


def published_copy(home: Path, model: ArtifactRef, **changed: str) -> ArtifactRef:
    """Publish a model again, as if another run had made it, with other texts in some of its files."""
    context = make_context(home, Stage.DPO, CONFIGS[Stage.DPO], {"model": model})
    shutil.copytree(context.input_dir("model"), context.output_dir, dirs_exist_ok=True)
    (context.output_dir / "manifest.json").unlink(missing_ok=True)
    for name, text in changed.items():
        (context.output_dir / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return published(context)


def published_model(world: World, *, seed: int) -> ArtifactRef:
    """Publish a model of random weights, as a DPO model of the run."""
    context = make_context(world.home, Stage.DPO, CONFIGS[Stage.DPO].model_copy(update={"seed": seed}), world.inputs)
    tokens = TokensArtifact(context.input_dir("tokens"))
    model = new_causal_lm(MODEL, tokens, seed=seed)
    save_model(model, model.state_dict(), context.output_dir, tokens)
    return published(context)


def published_scorer(world: World, *, seed: int) -> ArtifactRef:
    """Publish a reward model with a random head, as the run's gold scorer."""
    config = GoldConfig(seed=seed)
    context = make_context(
        world.home, Stage.GOLD, config, {"tokens": world.inputs["tokens"], "model": world.inputs["sft"]}
    )
    tokens = TokensArtifact(context.input_dir("tokens"))
    model: Any = load_reward_model(context.input_dir("model"), tokens)
    torch.manual_seed(seed)
    torch.nn.init.normal_(model.score.weight, std=0.5)
    save_model(model, model.state_dict(), context.output_dir, tokens)
    return published(context)


def evaluated(world: World, config: EvaluateConfig = SMALL, **more: ArtifactRef) -> tuple[dict[str, Any], StageOutcome]:
    """Run the evaluation; return metrics.json and the outcome."""
    context = evaluation(world, config, **more)
    outcome = evaluate.measure_models(context)
    return json.loads((context.output_dir / "metrics.json").read_text()), outcome


def evaluation(world: World, config: EvaluateConfig = SMALL, **more: ArtifactRef) -> StageContext:
    return make_context(world.home, Stage.EVALUATE, config, {**world.inputs, **more})
