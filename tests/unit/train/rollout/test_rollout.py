"""Rollouts by hand: who answers what, scales of scores, rewards, advantages, and a structure without a critic."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stages.config.estimators import GAE, GRPO, RLOO, Reinforce
from stages.config.graph import Stage
from stages.config.rollouts import PPOConfig
from stages.data.tokens.packing import RowBudget, TokenSequence
from stages.data.tokens.views import Split, TokensArtifact
from stages.models.build import new_causal_lm
from stages.models.generation import Sampling
from stages.train.engine import Engine, Share
from stages.train.engines.choose import make_engine
from stages.train.objective import ObjectiveState
from stages.train.rollout.advantages import estimate
from stages.train.rollout.experience import critic_quality, from_tensors, to_experience, to_tensors
from stages.train.rollout.objective import PPOObjective
from stages.train.rollout.rewards import Payment
from stages.train.rollout.sampling import Sampled, Sampler
from stages.train.rollout.scoring import RewardModel, Score
from stages.train.routing import Balancing
from tests.small_world import CONFIGS, MODEL, make_context, make_tokens

EOS = 1
CONFIG: Any = CONFIGS[Stage.PPO]


def configured(**changes: Any) -> PPOConfig:
    return PPOConfig.model_validate(CONFIG.model_dump() | changes)


def sampled(*, score: float = 0.0, finished: bool = True, kl: float = 0.0, values: bool = True, group: int = 0):
    """Two response tokens; the KL is all in the first one."""
    return Sampled(
        prompt=np.array([5, 6, 7]),
        response=np.array([8, EOS if finished else 9]),
        group=group,
        logprobs_R=np.array([-1.0 + kl, -2.0], dtype=np.float32),
        ref_logprobs_R=np.array([-1.0, -2.0], dtype=np.float32),
        values_R=np.array([0.5, 0.25], dtype=np.float32) if values else None,
        score=score,
        finished=finished,
    )


def test_scores_count_in_spreads_of_the_first_rollout_and_of_no_later_one() -> None:
    scorer = RewardModel(None, pad_id=0, budget=RowBudget(row_length=8, max_rows=1))
    assert scorer.rewards([1.0, 3.0]) == pytest.approx([-1.0, 1.0], abs=1e-6)  # mean 2, spread 1
    assert scorer.rewards([4.0, 6.0]) == pytest.approx([2.0, 4.0], abs=1e-6)
    resumed = RewardModel(None, pad_id=0, budget=RowBudget(row_length=8, max_rows=1))
    resumed.load_state_dict(scorer.state_dict())
    assert resumed.rewards([4.0]) == scorer.rewards([4.0])


def test_the_reward_is_the_score_less_the_kl_and_less_the_penalty_for_no_end() -> None:
    samples = [sampled(kl=0.3), sampled(finished=False)]
    config = configured(missing_eos_penalty=1.5, estimator=GAE(gae_lambda=1.0))
    paid = Payment(config).paid(samples, [2.0, 2.0])
    experience = to_experience(samples, paid, config=config, kl_coefficient=0.1)
    # 2 - 0.1 x 0.3 = 1.97, and 2 - 1.5 = 0.5
    assert experience.mean_reward == pytest.approx((1.97 + 0.5) / 2, abs=1e-6)
    # With gamma = lambda = 1 a return is the reward still to come: 1.97 before the KL of the first token is paid.
    returns = [sequence.fields["returns"].tolist() for sequence in experience.sequences]
    assert returns[0] == pytest.approx([0, 0, 0, 1.97, 2.0], abs=1e-6)
    assert returns[1] == pytest.approx([0, 0, 0, 0.5, 0.5], abs=1e-6)
    assert [sequence.loss_mask.tolist() for sequence in experience.sequences] == [[0, 0, 0, 1, 1]] * 2
    assert experience.sequences[0].fields.keys() == {"old_logprobs", "advantages", "old_values", "returns"}


def test_advantages_are_whitened_over_the_whole_rollout() -> None:
    rewards = [torch.tensor([0.0, 1.0]), torch.tensor([0.0, -3.0])]
    found = estimate(GAE(gamma=1.0, gae_lambda=0.95), [sampled(), sampled()], rewards)
    everything = np.concatenate([one.advantages_R for one in found])
    assert everything.mean() == pytest.approx(0.0, abs=1e-6)
    assert everything.std() == pytest.approx(1.0, abs=1e-5)


def test_a_rollout_comes_back_from_a_checkpoint_with_or_without_a_critic() -> None:
    fields = {"old_logprobs": np.array([0, -1], np.float32), "advantages": np.array([0, 2], np.float32)}
    for more in ({}, {"old_values": np.array([0, 3], np.float32), "returns": np.array([0, 4], np.float32)}):
        before = TokenSequence(np.array([5, 6]), np.array([0, 1]), fields | more)
        (after,) = from_tensors(to_tensors([before]) | {"router_load/policy": torch.ones(2)})
        assert after.ids.tolist() == [5, 6]
        assert {name: values.tolist() for name, values in after.fields.items()} == {
            name: values.tolist() for name, values in before.fields.items()
        }
    assert critic_quality([TokenSequence(np.array([5, 6]), np.array([0, 1]), fields)]) == {}


@dataclass(frozen=True)
class Lengths:
    """A rule: the longer the response, the better."""

    def scores(self, engine: Engine, sequences: Sequence[TokenSequence]) -> list[Score]:
        return [Score(float(sequence.loss_mask.sum())) for sequence in sequences]

    def rewards(self, scores: Sequence[float]) -> list[float]:
        return list(scores)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory):
    home = tmp_path_factory.mktemp("world")
    tokens = make_tokens(home)
    artifact = TokensArtifact(Path(tokens.uri.removeprefix("file://")))
    policy = new_causal_lm(MODEL, artifact, seed=3)
    context = make_context(home, Stage.PPO, CONFIG)
    engine = make_engine({"policy": policy}, CONFIG, context.execution)
    sampler = Sampler(
        Sampling(4, eos_id=artifact.eos_id, pad_id=artifact.pad_id),
        seed=0,
        scorer=Lengths(),
        reference=engine.freeze(new_causal_lm(MODEL, artifact, seed=3)),
        budget=RowBudget(row_length=64, max_rows=2),
    )
    return engine, sampler, home, tokens, artifact


def test_several_responses_to_a_prompt_differ_and_know_their_prompt(world) -> None:
    engine, sampler, *_ = world
    prompts = [np.array([40, 41, 42]), np.array([50, 51])]
    samples = sampler.sample(engine, prompts, stream=0, responses_per_prompt=3)
    assert [sample.group for sample in samples] == [0, 0, 0, 1, 1, 1]
    assert all(sample.prompt.tolist() == prompts[sample.group].tolist() for sample in samples)
    assert len({tuple(sample.response.tolist()) for sample in samples[:3]}) > 1
    assert [sample.score for sample in samples] == [len(sample.response) for sample in samples]


def test_without_a_critic_nothing_has_values_and_a_policy_equal_to_its_reference_has_no_kl(world) -> None:
    engine, sampler, *_ = world
    samples = sampler.sample(engine, [np.array([40, 41, 42])] * 2, stream=0)
    assert all(sample.values_R is None for sample in samples)
    assert [sample.kl for sample in samples] == pytest.approx([0.0, 0.0], abs=1e-5)


@pytest.mark.parametrize("estimator", [RLOO(responses_per_prompt=2), Reinforce()], ids=lambda one: one.kind)
def test_an_update_without_a_critic_is_the_policy_loss_alone(world, estimator: Any) -> None:
    """Whatever has one value term less still rolls out and steps, and each prompt has its number of responses."""
    engine, sampler, _, _, artifact = world
    config = CONFIG.model_copy(update={"estimator": estimator})
    prompts = artifact.prompts(Split.TRAIN)
    objective = PPOObjective(config, sampler, prompts=prompts, heldout=prompts, balancing=Balancing())
    step = next(objective.steps(engine))
    assert "ppo/explained_variance" not in step.metrics
    outputs = engine.backward(objective.loss, [Share(batch, 1.0) for batch in step.micro_batches])
    assert all("ppo/value_loss" not in output.metrics for output in outputs)
    assert all(math.isfinite(float(output.loss_sum)) for output in outputs)
    assert sum(float(output.metrics["ppo/policy_loss"][0]) for output in outputs) == pytest.approx(
        sum(float(output.loss_sum) for output in outputs)
    )
    asked = [bytes(sequence.ids[sequence.loss_mask == 0]) for sequence in objective._experience]
    assert len(asked) == config.rollout_size
    assert len(set(asked)) <= config.rollout_size // estimator.responses_per_prompt


def estimated(estimator: Any, rewards: Sequence[Sequence[float]], **known: Any) -> list[list[float]]:
    """Advantages of the tokens of four responses to two prompts."""
    samples = [sampled(values=False, group=number // 2) for number in range(len(rewards))]
    found = estimate(estimator, samples, [torch.tensor(one) for one in rewards], **known)
    assert all(one.returns_R is None for one in found)
    return [one.advantages_R.tolist() for one in found]


REWARDS = [[-0.5, 1.5], [0.0, 3.0], [0.0, -2.0], [1.0, 3.0]]
"""Of two prompts with two responses each, which earn 1 and 3, -2 and 4 in all."""


def test_without_a_critic_responses_are_compared_with_others_to_the_same_prompt() -> None:
    # Leave-one-out: 1 - 3 and 3 - 1, -2 - 4 and 4 + 2, on every token.
    assert estimated(RLOO(responses_per_prompt=2), REWARDS) == [[-2, -2], [2, 2], [-6, -6], [6, 6]]
    # Minus the mean of the group, 2 and 1; in spreads of the group, 1 and 3.
    plain = GRPO(responses_per_prompt=2, divide_by_std=False)
    assert estimated(plain, REWARDS) == [[-1, -1], [1, 1], [-3, -3], [3, 3]]
    scaled = np.array(estimated(GRPO(responses_per_prompt=2), REWARDS))
    assert scaled == pytest.approx(np.array([[-1, -1], [1, 1], [-1, -1], [1, 1]]), abs=1e-5)


def test_reinforce_takes_the_rewards_still_to_come_over_one_baseline() -> None:
    # Rewards to go are (1, 1.5), (3, 3), (-2, -2), (4, 3); the mean response earns 1.5, earlier ones earned 0.5.
    batch = Reinforce(whiten=False)
    assert estimated(batch, REWARDS) == [[-0.5, 0], [1.5, 1.5], [-3.5, -3.5], [2.5, 1.5]]
    assert estimated(batch, REWARDS, baseline=0.5) == estimated(batch, REWARDS)
    running = Reinforce(whiten=False, baseline="running")
    assert estimated(running, REWARDS) == estimated(batch, REWARDS), "there are no earlier rollouts"
    assert estimated(running, REWARDS, baseline=0.5) == [[0.5, 1], [2.5, 2.5], [-2.5, -2.5], [3.5, 2.5]]
    whitened = np.array(estimated(Reinforce(), REWARDS))
    assert (whitened.mean(), whitened.std()) == pytest.approx((0.0, 1.0), abs=1e-5)


def test_a_running_baseline_is_in_the_checkpoint_and_moves_by_rollouts(world) -> None:
    engine, sampler, _, _, artifact = world
    estimator = Reinforce(baseline="running", baseline_decay=0.75, whiten=False)
    config = CONFIG.model_copy(update={"estimator": estimator, "kl_coefficient": 0.0, "missing_eos_penalty": 0.0})
    prompts = artifact.prompts(Split.TRAIN)
    objective = PPOObjective(config, sampler, prompts=prompts, heldout=prompts, balancing=Balancing())
    steps, earned, kept = objective.steps(engine), [], []
    for _ in range(2 * config.num_epochs * config.rollout_size // config.global_batch_size):
        step = next(steps)
        if objective._inner == 1:
            earned.append(step.metrics["ppo/reward"])
            kept.append(objective.state_dict().numbers["baseline"])
    assert kept == pytest.approx([earned[0], 0.75 * earned[0] + 0.25 * earned[1]])
    resumed = PPOObjective(config, sampler, prompts=prompts, heldout=prompts, balancing=Balancing())
    resumed.load_state_dict(objective.state_dict())
    assert resumed.state_dict().numbers["baseline"] == kept[1]


def test_a_checkpoint_of_before_is_loaded(world) -> None:
    """Names of numbers and tensors in the objective's state are those of running stores."""
    _, sampler, _, _, artifact = world
    prompts = artifact.prompts(Split.TRAIN)
    judged = replace(sampler, scorer=RewardModel(None, pad_id=0, budget=sampler.budget))
    objective = PPOObjective(CONFIG, judged, prompts=prompts, heldout=prompts, balancing=Balancing())
    names = ("old_logprobs", "old_values", "advantages", "returns")
    tensors = {name: torch.tensor([0.0, 1.0]) for name in names}
    tensors |= {"lengths": torch.tensor([2]), "ids": torch.tensor([5, 6]), "loss_mask": torch.tensor([0, 1])}
    numbers = {"rollout": 1, "inner": 2, "kl_coefficient": 0.3, "scale": [1.5, 2.0], "rollout_metrics": {"ppo/kl": 0.1}}
    objective.load_state_dict(ObjectiveState(numbers, tensors))
    state = objective.state_dict()
    assert state.numbers == numbers
    assert {name: values.tolist() for name, values in state.tensors.items()} == {
        name: values.tolist() for name, values in tensors.items()
    }
