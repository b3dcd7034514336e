"""A task whose right answer is known: models that the product's own stages train, measured by a gold reward.

A small model learns to answer questions about software; its own responses are labelled by the gold reward through
Bradley-Terry, with a tenth of the labels turned round; every method learns from those labels alone. What is trained
here and how well it does is measured by the gold reward, which no stage has seen.
"""

import gzip
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from operators.given import given_artifacts
from stages.artifacts.addresses import open_store
from stages.artifacts.manifests import fetch
from stages.artifacts.store import Store
from stages.config.graph import Stage
from stages.config.request import ArtifactRef
from stages.config.resolve import resolve
from stages.data.tokens.packing import RowBudget, lay_out, prompt_and_response
from stages.data.tokens.views import Split, TokensArtifact
from stages.models.answers import Answerer, InProcess
from stages.models.build import load_causal_lm, load_reward_model
from stages.models.forward import segment_scores, target_logprobs
from stages.models.generation import Sampling
from tests.alignment.gold import Labelled, bayes_limit, gold_reward, label
from tests.playing import ONE_THREAD, play

RESPONSE_LENGTH = 40
TRAIN_PAIRS, HELDOUT_PAIRS, MEASURED_PROMPTS = 3_000, 400, 256
KL_BUDGET, LEAST_WINS, LEAST_OF_BAYES = 12.0, 0.65, 0.85
"""Nats a response; share of responses that beat SFT's by gold, ties half; accuracy of the reward model as a share of
the best that labels like these allow."""

METHODS: dict[str, dict[str, Any]] = {
    "dpo": {"dpo.loss.beta": 0.1},
    "ipo": {"dpo.loss.kind": "ipo", "dpo.loss.beta": 0.05},
    "simpo": {
        "dpo.loss.kind": "simpo",
        "dpo.loss.beta": 2.0,
        "dpo.loss.gamma": 0.3,
        "dpo.loss.sft_coefficient": 0.3,
    },
    "kto": {"dpo.loss.kind": "kto"},
    "ppo": {},
    "grpo": {"ppo.estimator.kind": "grpo"},
    "rloo": {"ppo.estimator.kind": "rloo"},
}
"""By name the settings in which a method differs from recipe `demo`; the prefix says which stage it is."""

_QUICK = {
    "curate.planted": 0,
    "curate.toxicity": "none",
    "tokenize.vocab_size": 2048,
    "sft.num_epochs": 2,
}
_LEARN = {
    "curate.planted": 0,
    "curate.toxicity": "none",
    "curate.max_preferences": TRAIN_PAIRS,
    "reward.num_epochs": 2,
    "reward.optimizer.weight_decay": 0.1,
    "dpo.num_epochs": 1,
    "ppo.max_response_length": RESPONSE_LENGTH,
}


@dataclass(frozen=True)
class Measured:
    """One aligned model against SFT."""

    method: str
    seed: int
    wins: float
    """Share of prompts at which its response has more gold than SFT's; ties count one half."""
    gold: float
    start_gold: float
    kl: float
    """Nats a response, from its own responses."""
    length: float
    """Tokens a response."""


@dataclass(frozen=True)
class Scored:
    """The reward model on held-out pairs."""

    accuracy: float
    """Expected share of labels that it agrees with, over the labels that could have been drawn."""
    limit: float

    @property
    def of_bayes(self) -> float:
        return self.accuracy / self.limit


class Task:
    """The runs of one seed in a folder of its own; what is finished there is not trained again."""

    def __init__(self, home: Path, seed: int) -> None:
        self.home, self.seed = home, seed
        home.mkdir(parents=True, exist_ok=True)
        self.store: Store = open_store((home / "store").as_uri())
        self._start: dict[Stage, ArtifactRef] = self._play("start", {"last_stage": "sft"}, _QUICK)
        self.tokens = TokensArtifact(self._folder(self._start[Stage.TOKENIZE]))

    def _play(self, name: str, params: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[Stage, ArtifactRef]:
        """What Airflow does between the tasks, without Airflow, Ray and MLflow."""
        values = {"recipe": "demo", "seed": self.seed, "gold_scorer": "none", **params}
        values["overrides"] = {**ONE_THREAD, **overrides}
        config = resolve(values)
        config = config.with_given(given_artifacts(config))
        return play(self.store, config, name)

    def _folder(self, artifact: ArtifactRef) -> Path:
        return fetch(artifact, self.home / "cache")

    def aligned(self, method: str) -> Path:
        """Train with a method's settings; returns the model's folder."""
        stage = Stage.PPO if method in ("ppo", "grpo", "rloo") else Stage.DPO
        return self._folder(self._learn(stage, METHODS[method])[stage])

    def reward_model(self) -> Path:
        return self._folder(self._learn(Stage.REWARD, {})[Stage.REWARD])

    def _learn(self, last: Stage, overrides: Mapping[str, Any]) -> dict[Stage, ArtifactRef]:
        params = {
            "base_model": self._start[Stage.SFT].uri,
            "first_stage": "dpo" if last is Stage.DPO else "reward",
            "last_stage": last.value,
            "alignment": "dpo" if last is Stage.DPO else "ppo",
            "instructions": [str(self._instructions())],
            "preferences": [str(self._preferences())],
        }
        return self._play(f"learn-{last.value}", params, {**_LEARN, **overrides})

    def _instructions(self) -> Path:
        """The training conversations of the start: PPO takes their prompts."""
        path = self.home / "instructions.jsonl"
        if not path.exists():
            _write(path, [{"messages": row["messages"]} for row in self._conversations(Split.TRAIN)])
        return path

    def _conversations(self, split: Split) -> list[dict[str, Any]]:
        path = self._folder(self._start[Stage.CURATE]) / "instructions" / f"{split}.jsonl.gz"
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]

    def _preferences(self) -> Path:
        """Labelled pairs of SFT's responses to training prompts."""
        path = self.home / "preferences.jsonl"
        if not path.exists():
            _write(path, [pair.row() for pair in self.pairs(Split.TRAIN, at_most=TRAIN_PAIRS)])
        return path

    def pairs(self, split: Split, *, at_most: int) -> list[Labelled]:
        """Two different responses of SFT to each prompt, in the order that a rater gave them."""
        texts = list(dict.fromkeys(row["messages"][0]["content"] for row in self._conversations(split)))
        chat = self._chat()
        prompts = [chat.encode_prompt([{"role": "user", "content": text}]) for text in texts]
        room = self.tokens.sequence_length - RESPONSE_LENGTH
        usable = [number for number, ids in enumerate(prompts) if len(ids) <= room]
        rounds = max(1, round(at_most / max(1, len(usable))))
        rng, pairs = random.Random(self.seed), list[Labelled]()
        model = self.start_model()
        for turn in range(rounds):
            asked = [prompts[number] for number in usable]
            both = [self.responses(model, asked, stream=100 + 2 * turn + side) for side in range(2)]
            for number, first, second in zip(usable, *both, strict=True):
                if first.text and second.text and first.text != second.text:
                    pairs.append(label(texts[number], first.text, second.text, rng))
        rng.shuffle(pairs)
        return pairs[:at_most]

    def _chat(self) -> Any:
        from stages.models.given_tokenizer import given_tokenizer

        return given_tokenizer(self._folder(self._start[Stage.SFT])).chat()

    def start_model(self) -> torch.nn.Module:
        return load_causal_lm(self._folder(self._start[Stage.SFT]), self.tokens).eval()

    def responses(self, model: torch.nn.Module, prompts: list[np.ndarray], *, stream: int) -> "list[Response]":
        sampling = Sampling(RESPONSE_LENGTH, self.tokens.eos_id, self.tokens.pad_id, temperature=1.0)
        answerer = Answerer(InProcess(model, torch.device("cpu"), "fp32"), sampling, seed=self.seed, stream=stream)
        tokenizer = self.tokens.tokenizer()
        return [
            Response(ids, tokenizer.decode(ids.tolist(), skip_special_tokens=True).strip())
            for ids in answerer.answers(prompts)
        ]

    def measure(self, method: str) -> Measured:
        """Compare sampled responses to held-out prompts with SFT's."""
        start = self.start_model()
        model = load_causal_lm(self.aligned(method), self.tokens).eval()
        texts, prompts = self._heldout_prompts()
        mine, theirs = (self.responses(one, prompts, stream=stream) for one, stream in ((model, 1), (start, 2)))
        gold = np.array([gold_reward(text, one.text) for text, one in zip(texts, mine, strict=True)])
        before = np.array([gold_reward(text, one.text) for text, one in zip(texts, theirs, strict=True)])
        return Measured(
            method=method,
            seed=self.seed,
            wins=float(np.mean((gold > before) + 0.5 * (gold == before))),
            gold=float(gold.mean()),
            start_gold=float(before.mean()),
            kl=self._kl(model, start, prompts, mine),
            length=float(np.mean([len(one.ids) for one in mine])),
        )

    def _heldout_prompts(self) -> tuple[list[str], list[np.ndarray]]:
        texts = json.loads((self.tokens.folder / "prompts" / Split.HELDOUT / "texts.json").read_text())
        ids = self.tokens.prompts(Split.HELDOUT)
        room = self.tokens.sequence_length - RESPONSE_LENGTH
        usable = [number for number in range(len(texts)) if len(ids[number]) <= room][:MEASURED_PROMPTS]
        return [texts[number] for number in usable], [ids[number] for number in usable]

    @torch.no_grad()
    def _kl(
        self, model: torch.nn.Module, start: torch.nn.Module, prompts: list[np.ndarray], responses: "list[Response]"
    ) -> float:
        total = 0.0
        for batch in self._batches(prompts, responses):
            mine, theirs = (target_logprobs(one, batch).logprobs_N for one in (model, start))
            total += float((mine - theirs).sum())
        return total / len(prompts)

    def _batches(self, prompts: list[np.ndarray], responses: "list[Response]") -> Iterator[Any]:
        sequences = [prompt_and_response(ids, one.ids) for ids, one in zip(prompts, responses, strict=True)]
        for part in RowBudget(row_length=self.tokens.sequence_length, max_rows=16).cut(sequences):
            yield lay_out(part)

    def score(self) -> Scored:
        """Measure the reward model on held-out pairs."""
        model = load_reward_model(self.reward_model(), self.tokens).eval()
        pairs = self.pairs(Split.HELDOUT, at_most=HELDOUT_PAIRS)
        scores = {side: self._scores(model, pairs, side) for side in ("chosen", "rejected")}
        agreed = 0.0
        for pair, chosen, rejected in zip(pairs, scores["chosen"], scores["rejected"], strict=True):
            golds = [gold_reward(pair.prompt, text) for text in (pair.chosen, pair.rejected)]
            # Which label was drawn is luck; whether the model agrees with the likelier one is not.
            with_gold = 0.5 if golds[0] == golds[1] else float((chosen > rejected) == (golds[0] > golds[1]))
            agreed += with_gold * pair.odds + (1 - with_gold) * (1 - pair.odds)
        return Scored(agreed / len(pairs), bayes_limit(pairs))

    @torch.no_grad()
    def _scores(self, model: torch.nn.Module, pairs: list[Labelled], side: str) -> list[float]:
        chat, tokenizer = self._chat(), self.tokens.tokenizer()
        prompts = [chat.encode_prompt([{"role": "user", "content": pair.prompt}]) for pair in pairs]
        texts = [tokenizer.encode(getattr(pair, side), add_special_tokens=False).ids for pair in pairs]
        answers = [Response(np.array([*ids, self.tokens.eos_id]), "") for ids in texts]
        return [
            float(score)
            for batch in self._batches(prompts, answers)
            for score in segment_scores(model, batch, pad_id=self.tokens.pad_id)
        ]


@dataclass(frozen=True)
class Response:
    """Sampled ids and their text."""

    ids: np.ndarray
    text: str


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def table(scored: Mapping[int, Scored], measured: list[Measured]) -> str:
    """What was measured, in Markdown."""
    lines = ["| seed | reward model | limit | share of it |", "|---|---|---|---|"]
    lines += [f"| {seed} | {one.accuracy:.3f} | {one.limit:.3f} | {one.of_bayes:.3f} |" for seed, one in scored.items()]
    lines += ["", "| method | seed | wins | gold (SFT) | KL | tokens |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {one.method} | {one.seed} | {one.wins:.2f} | {one.gold:.2f} ({one.start_gold:.2f}) | {one.kl:.1f} | "
        f"{one.length:.0f} |"
        for one in measured
    ]
    return "\n".join(lines)
