"""Samples responses with the live policy, and measures and scores them.

Every rank samples its share and then holds the whole rollout, so minibatches, statistics and checkpoints do not depend
on the number of ranks.

Shape legend: N targets of a micro-batch, R tokens of one response.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from stages.data.tokens.packing import Packed, RowBudget, TokenSequence, prompt_and_response
from stages.models.answers import BATCH_SIZE
from stages.models.forward import target_logprobs, target_values
from stages.models.generation import Draws, Generated, Sampling, generate_with_logprobs
from stages.models.lora import start_of
from stages.rules.ready import Row
from stages.train.engine import Engine
from stages.train.plan import batches, in_step, share
from stages.train.rollout.inference import infer_each
from stages.train.rollout.scorers.texts import Parts
from stages.train.rollout.scoring import Score, Scorer


@dataclass(frozen=True)
class Sampled:
    """One scored response of the policy."""

    prompt: np.ndarray
    response: np.ndarray
    group: int
    """Number of its prompt in the rollout: responses to the same prompt share it."""
    logprobs_R: np.ndarray
    ref_logprobs_R: np.ndarray
    values_R: np.ndarray | None
    """Predictions of the critic; None without one."""
    score: float
    finished: bool
    """True when it ended with the end token."""
    spread: float | None = None
    """How far the members of an ensemble of reward models are apart about it; None without one."""
    sampler_logprobs_R: np.ndarray | None = None
    """As generation computed them; None where it told none."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Scores of the scorers that make up the score; none where it is the reward model's alone."""
    failed: Mapping[str, str] = field(default_factory=dict)
    """Scorers that had no value for it, with the reason."""

    @property
    def kl(self) -> float:
        """Sampled KL to the reference over the whole response, in nats."""
        # An estimate from the one response that was drawn: unbiased, and for a single response possibly negative.
        return float((self.logprobs_R - self.ref_logprobs_R).sum())


@dataclass(frozen=True)
class LivePolicy:
    """Generates with the policy that the engine trains, inside the root's forward, as sharded models need it."""

    engine: Engine

    def respond(self, prompts: Sequence[np.ndarray], sampling: Sampling, draws: Draws) -> list[Generated]:
        return self.engine.infer(self._generate, prompts, sampling, draws)

    def _generate(
        self, parts: nn.ModuleDict, prompts: Sequence[np.ndarray], sampling: Sampling, draws: Draws
    ) -> list[Generated]:
        return generate_with_logprobs(parts["policy"], prompts, sampling, draws, all_done=self.engine.all_done)


@dataclass(frozen=True)
class Sampler:
    """Samples and scores with fixed settings."""

    sampling: Sampling
    seed: int
    scorer: Scorer | None
    """The reward model; None where no model gives scores."""
    reference: nn.Module | None
    """Frozen start of the policy; None is the policy without its adapter."""
    budget: RowBudget
    parts: Parts | None = None
    """What makes up the scores; None where they are the reward model's alone."""

    def sample(
        self,
        engine: Engine,
        prompts: Sequence[np.ndarray],
        *,
        stream: int,
        responses_per_prompt: int = 1,
        rows: Sequence[Row] = (),
    ) -> list[Sampled]:
        """Return the scored responses, those to one prompt next to each other, in order and on every rank. `rows` are
        those of the prompts, which scorers of texts need.

        Response number i draws from (seed, stream, i), whatever rank it is on.
        """
        policy = LivePolicy(engine)
        everything = np.arange(len(prompts) * responses_per_prompt)
        # Dealt out in turn, so that ranks differ by one response at most. A rank without any, or with a batch less
        # than others, keeps them company with response 0, which is not counted.
        mine = batches(share(everything, rank=engine.rank, world_size=engine.world_size), BATCH_SIZE)
        numbered: list[tuple[int, Sampled]] = []
        for part, counted in in_step(engine, mine, spare=everything[:1]):
            numbers = part.tolist()
            groups = [number // responses_per_prompt for number in numbers]
            chosen = [prompts[group] for group in groups]
            generated = policy.respond(chosen, self.sampling, Draws(self.seed, stream, numbers))
            samples = self._measure(engine, chosen, generated, groups)
            numbered += zip(numbers, samples, strict=True) if counted else ()
        # Ranks hand over their shares one after another; sorting restores the order of the prompts.
        samples = [sample for _, sample in sorted(engine.gather(numbered), key=lambda pair: pair[0])]
        return samples if self.parts is None else self._scored_by_parts(engine, self.parts, samples, rows)

    def _scored_by_parts(
        self, engine: Engine, parts: Parts, samples: Sequence[Sampled], rows: Sequence[Row]
    ) -> list[Sampled]:
        scored = parts.scored(
            engine,
            [sample.response for sample in samples],
            [rows[sample.group] for sample in samples],
            by_model=[sample.score for sample in samples],
        )
        return [
            replace(sample, score=found.score, parts=found.parts, failed=found.failed)
            for sample, found in zip(samples, scored, strict=True)
        ]

    def rewards(self, samples: Sequence[Sampled]) -> list[float]:
        """Return the scores of a rollout in the unit of rewards."""
        if self.parts is not None:
            return self.parts.rewards([sample.parts for sample in samples], self._rewards_of_model)
        return self._rewards_of_model([sample.score for sample in samples])

    def _rewards_of_model(self, scores: Sequence[float]) -> list[float]:
        assert self.scorer is not None, "a score without parts is the reward model's"
        return self.scorer.rewards(scores)

    def state_dict(self) -> dict[str, Any]:
        """What scorers keep from rollout to rollout."""
        return {} if self.scorer is None else self.scorer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.scorer is not None:
            self.scorer.load_state_dict(state)

    def _measure(
        self, engine: Engine, prompts: list[np.ndarray], generated: list[Generated], groups: list[int]
    ) -> list[Sampled]:
        responses = [one.tokens_R for one in generated]
        # Responses of one batch are packed for measuring, in their order; nothing is padded.
        sequences = [prompt_and_response(*both) for both in zip(prompts, responses, strict=True)]
        per_token: list[dict[str, np.ndarray]] = []
        for part, measured in infer_each(engine, self._per_token, sequences, self.budget):
            per_token += _by_sequence(part, measured)
        scores = [Score(0.0)] * len(sequences) if self.scorer is None else self.scorer.scores(engine, sequences)
        return [
            Sampled(
                prompt=prompts[i],
                response=responses[i],
                group=groups[i],
                logprobs_R=per_token[i]["logprobs"],
                ref_logprobs_R=per_token[i]["ref_logprobs"],
                values_R=per_token[i].get("values"),
                score=scores[i].value,
                spread=scores[i].spread,
                finished=bool(responses[i][-1] == self.sampling.eos_id),
                sampler_logprobs_R=generated[i].logprobs_R,
            )
            for i in range(len(sequences))
        ]

    def _per_token(self, parts: nn.ModuleDict, batch: Packed) -> dict[str, Tensor]:
        """Return what the update needs of each response token, shape (N,).

        The log-probabilities are computed again rather than kept from the generation, whose cached and padded passes
        round differently: the update computes them from packed sequences too, so its first ratio is 1.
        """
        # Divided by the temperature as in sampling: the policy that is improved is the one that was sampled from.
        temperature = self.sampling.temperature
        with start_of(parts["policy"], self.reference) as reference:
            ref_logprobs_N = target_logprobs(reference, batch, temperature=temperature).logprobs_N
        found = {
            "logprobs": target_logprobs(parts["policy"], batch, temperature=temperature).logprobs_N,
            "ref_logprobs": ref_logprobs_N,
        }
        return found | ({"values": target_values(parts["critic"], batch)} if "critic" in parts else {})


def _by_sequence(part: list[TokenSequence], measured: dict[str, Tensor]) -> list[dict[str, np.ndarray]]:
    """Cut values of a micro-batch's targets, which lie end to end, into one array a sequence."""
    # The first token of a sequence is no target, but it is a prompt's, whose mask is 0 anyway.
    cuts = np.cumsum([int(sequence.loss_mask.sum()) for sequence in part])[:-1]
    pieces = {name: np.split(values_N.float().cpu().numpy(), cuts) for name, values_N in measured.items()}
    return [{name: arrays[i] for name, arrays in pieces.items()} for i in range(len(part))]
