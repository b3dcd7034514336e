"""Experience for PPO: sample responses, score them, and keep what the update needs as token sequences.

Every rank samples its share and then holds the whole rollout, so minibatches, statistics and checkpoints do not depend
on the number of ranks.

Shape legend: N targets of a micro-batch, R tokens of one response, S sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from stages.config.train import PPOConfig
from stages.data.tokens.packing import Packed, TokenSequence, collate, plan_rows
from stages.losses import gae, shaped_rewards, whiten
from stages.models.forward import segment_scores, target_logprobs, target_values
from stages.models.generation import generate, uniforms
from stages.models.lora import start_of
from stages.train.engine import Engine
from stages.train.plan import batches, in_step, share

FIELDS = ("old_logprobs", "old_values", "advantages", "returns")

_PROMPTS_AT_ONCE = 64


@dataclass(frozen=True)
class Sampled:
    """One scored response of the policy."""

    prompt: np.ndarray
    response: np.ndarray
    logprobs_R: np.ndarray
    ref_logprobs_R: np.ndarray
    values_R: np.ndarray
    score: float
    finished: bool
    """True when it ended with the end token."""

    @property
    def kl(self) -> float:
        """Sampled KL to the reference over the whole response, in nats."""
        return float((self.logprobs_R - self.ref_logprobs_R).sum())


@dataclass(frozen=True)
class FrozenModels:
    """What PPO reads and never changes; None is the policy, or the critic, without its adapter."""

    reference: nn.Module | None
    reward: nn.Module | None


@dataclass(frozen=True)
class Sampler:
    """Samples and scores with fixed settings."""

    config: PPOConfig
    frozen: FrozenModels
    eos_id: int
    pad_id: int
    row_length: int
    max_rows: int

    def sample(self, engine: Engine, prompts: Sequence[np.ndarray], *, stream: int) -> list[Sampled]:
        """Return one scored response per prompt, in order and on every rank; draws depend on (seed, stream,
        position)."""
        everything = np.arange(len(prompts))
        mine = batches(share(everything, rank=engine.rank, world_size=engine.world_size), _PROMPTS_AT_ONCE)
        scored: list[tuple[int, Sampled]] = []
        for part, counted in in_step(engine, mine, spare=everything[:1]):
            chosen = [prompts[int(index)] for index in part]
            draws_SR = uniforms(
                seed=self.config.seed, stream=stream, indices=part.tolist(), length=self.config.max_response_length
            )
            responses = engine.infer(self._generate, chosen, draws_SR, engine.all_done)
            samples = self._score(engine, chosen, responses)
            scored += zip(part.tolist(), samples, strict=True) if counted else ()
        return [item for _, item in sorted(engine.gather(scored), key=lambda pair: pair[0])]

    def _generate(self, parts: nn.ModuleDict, prompts: list[np.ndarray], draws_SR: np.ndarray, all_done):
        return generate(
            parts["policy"],
            prompts,
            max_response_length=self.config.max_response_length,
            eos_id=self.eos_id,
            pad_id=self.pad_id,
            temperature=self.config.temperature,
            uniforms_SR=draws_SR,
            all_done=all_done,
        )

    def _score(self, engine: Engine, prompts: list[np.ndarray], responses: list[np.ndarray]) -> list[Sampled]:
        sequences = [
            TokenSequence(np.concatenate([prompt, response]), _response_mask(prompt, response))
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        measured: list[tuple[np.ndarray, ...]] = []
        plan = plan_rows([len(sequence.ids) for sequence in sequences], self.row_length)
        parts = [plan[start : start + self.max_rows] for start in range(0, len(plan), self.max_rows)]
        for part, counted in in_step(engine, parts, spare=parts[0]):
            rows = [[sequences[index] for index in row] for row in part]
            values = engine.infer(self._measure, collate(rows))
            if not counted:
                continue
            lengths = [int(sequence.loss_mask.sum()) for row in rows for sequence in row]
            cuts = np.cumsum(lengths)[:-1]
            *per_token, scores_S = (value.float().cpu().numpy() for value in values)
            measured += zip(*(np.split(value, cuts) for value in per_token), scores_S, strict=True)
        return [
            Sampled(prompt, response, logprobs, ref_logprobs, values, float(score), bool(response[-1] == self.eos_id))
            for prompt, response, (logprobs, ref_logprobs, values, score) in zip(
                prompts, responses, measured, strict=True
            )
        ]

    def _measure(self, parts: nn.ModuleDict, batch: Packed) -> tuple[Tensor, ...]:
        temperature = self.config.temperature
        with start_of(parts["policy"], self.frozen.reference) as reference:
            ref_logprobs_N = target_logprobs(reference, batch, temperature=temperature).logprobs_N
        with start_of(parts["critic"], self.frozen.reward) as reward:
            scores_S = segment_scores(reward, batch, pad_id=self.pad_id)
        return (
            target_logprobs(parts["policy"], batch, temperature=temperature).logprobs_N,
            ref_logprobs_N,
            target_values(parts["critic"], batch),
            scores_S,
        )


@dataclass(frozen=True)
class ScoreScale:
    """Mean and spread of the first rollout's scores: rewards are in units of what SFT answers differ by."""

    mean: float
    std: float

    @staticmethod
    def of(samples: Sequence[Sampled]) -> "ScoreScale":
        scores = np.array([sample.score for sample in samples])
        return ScoreScale(float(scores.mean()), float(scores.std()))

    def normalised(self, score: float) -> float:
        return (score - self.mean) / (self.std + 1e-8)


def to_experience(
    samples: Sequence[Sampled], config: PPOConfig, *, scale: ScoreScale, kl_coefficient: float
) -> tuple[list[TokenSequence], float]:
    """Turn samples into sequences with advantages (whitened over the rollout) and returns; also the mean shaped
    reward."""
    estimates, totals = [], []
    for sample in samples:
        score = scale.normalised(sample.score) - (0.0 if sample.finished else config.missing_eos_penalty)
        rewards_R = shaped_rewards(
            logprobs_R=torch.from_numpy(sample.logprobs_R),
            ref_logprobs_R=torch.from_numpy(sample.ref_logprobs_R),
            score=score,
            kl_coefficient=kl_coefficient,
        )
        totals.append(float(rewards_R.sum()))
        values_R = torch.from_numpy(sample.values_R)
        estimates.append(gae(rewards_R=rewards_R, values_R=values_R, gamma=config.gamma, gae_lambda=config.gae_lambda))
    everything_N = torch.cat([estimate.advantages_R for estimate in estimates])
    mean, std = float(everything_N.mean()), float(everything_N.std(unbiased=False))
    sequences = []
    for sample, estimate in zip(samples, estimates, strict=True):
        fields = {
            "old_logprobs": sample.logprobs_R,
            "old_values": sample.values_R,
            "advantages": whiten(estimate.advantages_R, mean=mean, std=std).numpy(),
            "returns": estimate.returns_R.numpy(),
        }
        head = np.zeros(len(sample.prompt), dtype=np.float32)
        sequences.append(
            TokenSequence(
                np.concatenate([sample.prompt, sample.response]),
                _response_mask(sample.prompt, sample.response),
                {name: np.concatenate([head, values]).astype(np.float32) for name, values in fields.items()},
            )
        )
    return sequences, float(np.mean(totals))


def to_tensors(sequences: Sequence[TokenSequence]) -> dict[str, Tensor]:
    """Flatten a rollout for a checkpoint."""
    if not sequences:
        return {}
    flat = {
        "lengths": np.array([len(sequence.ids) for sequence in sequences]),
        "ids": np.concatenate([sequence.ids for sequence in sequences]),
        "loss_mask": np.concatenate([sequence.loss_mask for sequence in sequences]),
        **{name: np.concatenate([sequence.fields[name] for sequence in sequences]) for name in FIELDS},
    }
    return {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in flat.items()}


def from_tensors(tensors: dict[str, Tensor]) -> list[TokenSequence]:
    """Invert `to_tensors`, whatever else lies beside."""
    if "lengths" not in tensors:
        return []
    cuts = np.cumsum(tensors["lengths"].numpy())[:-1]
    split = {name: np.split(tensors[name].numpy(), cuts) for name in ("ids", "loss_mask", *FIELDS)}
    return [
        TokenSequence(split["ids"][i], split["loss_mask"][i], {name: split[name][i] for name in FIELDS})
        for i in range(len(tensors["lengths"]))
    ]


def _response_mask(prompt: np.ndarray, response: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(len(prompt), dtype=np.int64), np.ones(len(response), dtype=np.int64)])
