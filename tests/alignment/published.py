"""Alignment of SmolLM2-135M-Instruct by adapters on two CPU cores: real human pairs, and a rule that rewards form.

`python -m tests.alignment.published FOLDER pairs`, `... reward` and `... rule` print the numbers of docs/REAL_MODEL.md;
what is finished in FOLDER is not made again.
"""

import argparse
import gzip
import json
import logging
import os
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from operators.given import given_artifacts
from operators.prepare import build_request
from stages.artifacts.addresses import open_store
from stages.artifacts.manifests import fetch
from stages.config.gate_records import asked_of
from stages.config.graph import Stage
from stages.config.places import SMOLLM2
from stages.config.request import ArtifactRef, RunInfo
from stages.config.resolve import resolve
from stages.data.tokens.packing import RowBudget, TokenSequence, lay_out
from stages.data.tokens.prompt_sets import read_prompt_set
from stages.data.tokens.views import Split, TokensArtifact
from stages.gate import examine
from stages.models.answers import Answerer, InProcess
from stages.models.build import load_causal_lm
from stages.models.forward import segment_logprobs
from stages.models.generation import Sampling
from stages.rules.schema import schema_value
from tests.playing import play

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"type": "string"}, "color": {"type": "string"}},
        "required": ["name", "color"],
        "additionalProperties": False,
    }
)
"""What the rule asks for; the prompts say it in words."""
ASKED = (
    'Describe {thing} as a JSON object with the keys "name" and "color".',
    'Write a JSON object with the keys "name" and "color" for {thing}.',
)
THINGS = """an apple; a hammer; the moon; a cat; a violin; gold; a bicycle; rice; a candle; the sea; a tiger; a
book; a lemon; a banana; a carrot; snow; coal; a rose; grass; a crow; a swan; milk; coffee; a brick; a tomato; a
cherry; an orange; a plum; a pear; a pumpkin; a potato; an onion; garlic; honey; butter; cheese; bread; salt;
sugar; pepper; chocolate; a lion; an elephant; a mouse; a horse; a cow; a pig; a sheep; a goat; a duck; a frog;
a snake; a whale; a shark; a parrot; a flamingo; a canary; a fox; a wolf; a bear; a panda; a zebra; a giraffe; a
camel; a monkey; an ant; a bee; a butterfly; a spider; a ladybird; a tulip; a daisy; a sunflower; an oak; a
pine; a cactus; ivy; moss; sand; clay; marble; silver; copper; iron; rust; a ruby; an emerald; a sapphire; a
pearl; amber; ink; chalk; a pencil; a notebook; an envelope; a stamp; a chair; a table; a lamp; a mirror; a
carpet; a curtain; a pillow; a blanket; a cup; a plate; a spoon; a knife; a kettle; a bottle; a piano; a drum; a
trumpet; a guitar; a flute; a ball; a kite; a doll; a car; a train; a bus; a boat; a plane; a tractor; a fire
engine; a bridge; a tower; a castle; a barn; a tent; a road; a river; a lake; a hill; a volcano; a cloud; the
sun; a star; a rainbow; fog; rain; lightning; fire; smoke; an umbrella; a hat; a scarf; a glove; a boot; a
shirt; jeans; a coat; a ring; a watch; a coin; a key; a lock; a rope; a nail; a saw; a ladder; a bucket; a
broom; a brush; soap; a sponge; a towel""".replace("\n", " ").split("; ")
RESPONSE_LENGTH = 32
SHORT = 450
"""Characters of a transcript, prompt and response, so that 300 pairs take minutes and not hours."""

_ADAPTER = {"lora.rank": 16, "lora.alpha": 32}
_SHORT_PAIRS = {
    "curate.max_preferences": 300,
    "curate.max_heldout_pairs": 300,
    "curate.heldout_fraction": 0.5,
    "tokenize.sequence_length": 176,
    "tokenize.max_prompt_length": 128,
}
_PAIRS = {
    **_SHORT_PAIRS,
    "dpo.num_epochs": 1,
    "dpo.global_batch_size": 12,
    "dpo.optimizer.learning_rate": 5e-4,
    "dpo.loss.beta": 0.1,
    "dpo.eval_items": 8,
    **{f"dpo.{name}": value for name, value in _ADAPTER.items()},
}
_REWARD = {
    **_SHORT_PAIRS,
    "reward.num_epochs": 1,
    "reward.global_batch_size": 12,
    "reward.optimizer.learning_rate": 4e-4,
    "reward.eval_items": 8,
    "gates.max_pairs": 300,
    **{f"reward.{name}": value for name, value in _ADAPTER.items()},
}
_RULE = {
    "ppo.scorer.kind": "json_schema",
    "ppo.estimator.kind": "rloo",
    "ppo.estimator.responses_per_prompt": 4,
    "ppo.num_rollouts": 10,
    "ppo.rollout_size": 32,
    "ppo.global_batch_size": 32,
    "ppo.num_epochs": 1,
    "ppo.max_response_length": RESPONSE_LENGTH,
    "ppo.optimizer.learning_rate": 4e-4,
    "ppo.kl_coefficient": 0.01,
    "ppo.eval_items": 8,
    "curate.heldout_fraction": 0.2,
    "tokenize.sequence_length": 96,
    "tokenize.max_prompt_length": 64,
    **{f"ppo.{name}": value for name, value in _ADAPTER.items()},
}


@dataclass(frozen=True)
class Share:
    """A share of held-out items before and after training."""

    before: float
    after: float
    low: float
    high: float
    """95 % interval of the difference, by bootstrap over items, each with both of its values."""
    items: int
    seconds: float
    """Of the training and all before it."""

    @classmethod
    def of(cls, before: np.ndarray, after: np.ndarray, seconds: float) -> "Share":
        rng, gains = np.random.default_rng(0), after - before
        means = gains[rng.integers(len(gains), size=(10_000, len(gains)))].mean(axis=1)
        low, high = np.quantile(means, [0.025, 0.975])
        return cls(float(before.mean()), float(after.mean()), float(low), float(high), len(gains), seconds)


class Trained:
    """One alignment of the published model in a folder."""

    def __init__(self, home: Path, params: dict[str, Any], overrides: dict[str, Any], last: Stage) -> None:
        began = time.monotonic()
        values = {"recipe": "smollm", "base_model": SMOLLM2, "first_stage": last.value, "last_stage": last.value}
        config = resolve({**values, "gold_scorer": "none", **params, "overrides": overrides})
        config = config.with_given(given_artifacts(config))
        self._config, self._store, self._last = config, open_store((home / "store").as_uri()), last
        self._done: dict[Stage, ArtifactRef] = play(self._store, config, last.value)
        self._cache, self.seconds = home / "cache", time.monotonic() - began
        self.tokens = TokensArtifact(self.folder(Stage.TOKENIZE))

    @cached_property
    def start(self) -> torch.nn.Module:
        """What training began from."""
        return load_causal_lm(self.folder(Stage.CONVERT), self.tokens).eval()

    @cached_property
    def model(self) -> torch.nn.Module:
        return load_causal_lm(self.folder(self._last), self.tokens).eval()

    def examined(self) -> dict[str, float]:
        """What the gate of the last stage measures."""
        run = RunInfo(run_id=self._last.value, name=self._last.value)
        request = build_request(self._last, run=run, store=self._store, config=self._config, upstream=self._done)
        asked = asked_of(request, self._done[self._last])
        assert asked is not None
        return dict(examine(asked).metrics)

    def folder(self, stage: Stage) -> Path:
        return fetch(self._done[stage], self._cache)


def on_pairs(home: Path, preferences: Path, **settings: Any) -> tuple[Share, Share]:
    """DPO on 300 short human pairs: shares of held-out pairs whose chosen response is likelier, and whose chosen
    response gained more likelihood than the rejected one; before, none has gained any, which counts one half."""
    params = {"alignment": "dpo", "documents": [], "instructions": [], "preferences": [str(_short(home, preferences))]}
    trained = Trained(home, params, {**_PAIRS, **settings}, Stage.DPO)
    view = trained.tokens.pairs(Split.HELDOUT)
    pairs = [view[number] for number in range(len(view))]
    chosen, rejected = ([getattr(pair, side) for pair in pairs] for side in ("chosen", "rejected"))
    before, after = (
        _logprobs(model, trained.tokens, chosen) - _logprobs(model, trained.tokens, rejected)
        for model in (trained.start, trained.model)
    )
    likelier = Share.of(_right(before), _right(after), trained.seconds)
    return likelier, Share.of(np.full(len(pairs), 0.5), _right(after - before), trained.seconds)


def rewards_of_pairs(home: Path, preferences: Path, **settings: Any) -> dict[str, float]:
    """A reward model on the same pairs: what its gate measures on the held-out ones, by name (docs/GATES.md)."""
    params = {"documents": [], "instructions": [], "preferences": [str(_short(home, preferences))]}
    return Trained(home, params, {**_REWARD, **settings}, Stage.REWARD).examined()


def _short(home: Path, preferences: Path) -> Path:
    """The pairs both of whose transcripts are short, as a file in `home`."""
    home.mkdir(parents=True, exist_ok=True)
    short = home / "pairs.jsonl"
    with gzip.open(preferences, "rt", encoding="utf-8") as lines, short.open("w") as kept:
        kept.writelines(line for line in lines if all(len(text) <= SHORT for text in json.loads(line).values()))
    return short


@torch.no_grad()
def _logprobs(model: torch.nn.Module, tokens: TokensArtifact, answers: list[TokenSequence]) -> np.ndarray:
    """Log-probability of each answer, in nats."""
    budget = RowBudget(row_length=tokens.sequence_length, max_rows=4)
    parts = [segment_logprobs(model, lay_out(part)) for part in budget.cut(answers)]
    return torch.cat(parts).double().numpy()


def _right(margins: np.ndarray) -> np.ndarray:
    return np.where(margins == 0, 0.5, (margins > 0).astype(float))


def on_a_rule(home: Path, **settings: Any) -> Share:
    """RLOO on the rule that a response is JSON of the schema: shares of fresh responses to held-out prompts."""
    home.mkdir(parents=True, exist_ok=True)
    prompts = home / "prompts.jsonl"
    rows = [{"prompt": asked.format(thing=thing), "schema": json.loads(SCHEMA)} for thing in THINGS for asked in ASKED]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    params = {"alignment": "ppo", "documents": [], "instructions": [], "preferences": [], "prompts": [str(prompts)]}
    trained = Trained(home, params, {**_RULE, **settings}, Stage.PPO)
    before, after = (_follows(model, trained.tokens) for model in (trained.start, trained.model))
    return Share.of(before, after, trained.seconds)


def _follows(model: torch.nn.Module, tokens: TokensArtifact) -> np.ndarray:
    sampling = Sampling(RESPONSE_LENGTH, tokens.eos_id, tokens.pad_id, temperature=1.0)
    answerer = Answerer(InProcess(model, torch.device("cpu"), "fp32"), sampling, seed=0, stream=5)
    prompts, tokenizer = read_prompt_set(tokens.folder, Split.HELDOUT).prompts, tokens.tokenizer()
    answers = answerer.answers([prompts[number] for number in range(len(prompts))])
    texts = [tokenizer.decode(answer.tolist(), skip_special_tokens=True) for answer in answers]
    return np.array([schema_value(text, SCHEMA, fenced=True, parsed_value=0.0) for text in texts])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.alignment.published")
    parser.add_argument("folder", type=Path)
    parser.add_argument("task", choices=("pairs", "reward", "rule"))
    parser.add_argument("--preferences", type=Path, help="Anthropic HH rows: pairs of transcripts")
    parser.add_argument("--settings", type=json.loads, default={}, help="overrides, as JSON")
    chosen = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    os.environ["ATHANOR_SCRATCH"] = str(chosen.folder / "scratch")
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    if chosen.task == "pairs":
        print(*on_pairs(chosen.folder, chosen.preferences, **chosen.settings), sep="\n")
    elif chosen.task == "reward":
        for name, value in sorted(rewards_of_pairs(chosen.folder, chosen.preferences, **chosen.settings).items()):
            print(f"{name}\t{value:.3f}")
    else:
        print(on_a_rule(chosen.folder, **chosen.settings))


if __name__ == "__main__":
    main()
