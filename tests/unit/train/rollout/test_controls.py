"""Controls of reinforcement learning by hand: what a response is paid, what its tokens weigh, who learns when, and
whether the sampler agrees with the trainer."""

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stages.config.errors import ConfigError
from stages.config.estimators import GAE, RLOO
from stages.config.rollouts import PPOConfig, SamplerConfig
from stages.data.tokens.packing import lay_out
from stages.data.tokens.ragged import Ragged, RaggedWriter
from stages.data.tokens.rows import DocumentRows
from stages.models.forward import TokenLogprobs
from stages.train.rollout.agreement import agreement, check
from stages.train.rollout.documents import FIELD, PretrainingMix, responses_of, with_field
from stages.train.rollout.experience import from_tensors, to_experience, to_tensors
from stages.train.rollout.rewards import Payment
from stages.train.rollout.update import _policy_terms, update_units
from tests.unit.train.rollout.test_rollout import configured, sampled


def of_length(length: int, **more: Any):
    one = sampled(values=False, **more)
    arrays = {name: np.linspace(-2, -1, length).astype(np.float32) for name in ("logprobs_R", "ref_logprobs_R")}
    return replace(one, response=np.arange(8, 8 + length), **arrays)


def test_running_scale_divides_by_the_spread_of_all_scores_so_far_and_comes_back_from_a_checkpoint() -> None:
    config = configured(reward_scaling="running", missing_eos_penalty=0.0)
    payment = Payment(config)
    # mean 2, squared distances 1 and 1: spread 1
    assert payment.paid([sampled()] * 2, [1.0, 3.0]) == pytest.approx([1.0, 3.0])
    resumed = Payment(config)
    resumed.load_state_dict(payment.state_dict())
    # 1, 3, 5, 7: mean 4, squared distances 9, 1, 1, 9: spread sqrt(5)
    for one in (payment, resumed):
        assert one.paid([sampled()] * 2, [5.0, 7.0]) == pytest.approx([5 / math.sqrt(5), 7 / math.sqrt(5)])
    assert Payment(configured()).state_dict() == {}


def test_scores_are_clipped_before_penalties() -> None:
    config = configured(reward_clip=2.0, missing_eos_penalty=1.0)
    assert Payment(config).paid([sampled(finished=False), sampled()], [-5.0, 1.5]) == [-3.0, 1.5]


def test_the_penalty_for_length_grows_over_the_last_tokens() -> None:
    config = configured(overlong_tokens=2, overlong_penalty=3.0)  # of at most 6 tokens
    samples = [of_length(length) for length in (1, 4, 5, 6)]
    assert Payment(config).paid(samples, [0.0] * 4) == [0.0, 0.0, -1.5, -3.0]


@pytest.mark.parametrize(
    ("loss_over", "weights", "units"),
    [("tokens", None, 6), ("sequences", {2: 1 / 2, 4: 1 / 4}, 2), ("fixed_length", {2: 1 / 6, 4: 1 / 6}, 2)],
)
def test_tokens_weigh_what_the_loss_is_averaged_over(loss_over: str, weights: Any, units: int) -> None:
    config = configured(loss_over=loss_over, estimator=RLOO(responses_per_prompt=2))
    sequences = to_experience([of_length(2), of_length(4)], [1.0, 0.0], config=config, kl_coefficient=0.0).sequences
    for length, sequence in zip((2, 4), sequences, strict=True):
        found = sequence.fields.get("loss_weights")
        if weights is None:
            assert found is None
        else:
            assert found is not None
            assert found[sequence.loss_mask == 1].tolist() == pytest.approx([weights[length]] * length)
    assert update_units(config, lay_out(sequences)) == units


def test_the_penalty_in_the_loss_brings_the_reference_and_the_coefficient_of_its_rollout() -> None:
    config = configured(kl_place="loss", kl_estimator="k2", estimator=RLOO(responses_per_prompt=2))
    samples = [sampled(kl=0.3), sampled()]
    experience = to_experience(samples, [2.0, 1.0], config=config, kl_coefficient=0.25)
    assert experience.mean_reward == 1.5, "nothing is paid for the divergence in the reward"
    first = experience.sequences[0].fields
    assert first["ref_logprobs"].tolist() == [0, 0, 0, -1, -2]
    assert first["kl_coefficients"].tolist() == [0, 0, 0, 0.25, 0.25]
    again = from_tensors(to_tensors(experience.sequences))
    assert {name: values.tolist() for name, values in again[0].fields.items()} == {
        name: values.tolist() for name, values in first.items()
    }


def terms(config: PPOConfig, *, logprobs: list[float], **recorded: list[float]):
    """The policy's part of the loss of two tokens with entropies 1 and 3, and advantages 0."""
    given = torch.tensor(logprobs)
    known = {"old_logprobs": given, "advantages": torch.zeros(2)}
    known |= {name: torch.tensor(values) for name, values in recorded.items()}
    return _policy_terms(config, TokenLogprobs(given, torch.tensor([1.0, 3.0])), known)


@pytest.mark.parametrize(
    ("estimator", "each"), [("k2", (0.02, 0.08)), ("k3", (math.exp(-0.2) - 0.8, math.exp(0.4) - 1.4))]
)
def test_divergence_and_entropy_enter_the_loss_with_their_coefficients(estimator: str, each: Any) -> None:
    config = configured(kl_place="loss", kl_estimator=estimator, entropy_coefficient=0.5)
    reference = {"ref_logprobs": [-1.2, -1.6], "kl_coefficients": [0.1, 0.1]}  # log ratios 0.2 and -0.4
    found = terms(config, logprobs=[-1.0, -2.0], **reference)
    assert found.losses["ppo/kl_loss"].item() == pytest.approx(sum(each), abs=1e-6)
    assert found.loss_sum.item() == pytest.approx(0.1 * sum(each) - 0.5 * (1 + 3), abs=1e-6)
    assert found.counts["ppo/entropy"].item() == 4
    weighted = terms(config, logprobs=[-1.0, -2.0], loss_weights=[0.5, 0.25], policy_weights=[1.0, 2.0], **reference)
    expected = 0.1 * (0.5 * each[0] + 0.5 * each[1]) - 0.5 * (0.5 * 1 + 0.5 * 3)
    assert weighted.loss_sum.item() == pytest.approx(expected, abs=1e-6)
    assert weighted.counts["ppo/entropy"].item() == 4, "metrics are not weighted"


def test_while_the_critic_warms_up_tokens_weigh_nothing_for_the_policy() -> None:
    config = configured(estimator=GAE(critic_warmup_rollouts=1))
    for learns in (False, True):
        experience = to_experience([sampled()], [1.0], config=config, kl_coefficient=0.0, policy_learns=learns)
        assert experience.sequences[0].fields["policy_weights"].tolist() == [0, 0, 0, *[float(learns)] * 2]


def agreeing(sampler: list[float], **more: Any):
    return replace(sampled(**more), sampler_logprobs_R=np.array(sampler, dtype=np.float32))


def test_sampler_and_trainer_are_compared_token_by_token() -> None:
    """The trainer has -1 and -2; the sampler -1.5 and -2."""
    found = agreement([agreeing([-1.5, -2.0])])
    # ratios e^0.5 and 1; KL(sampler||trainer) of a token by K3: e^0.5 - 1 - 0.5, and 0
    assert found["ppo/sampler_ratio"] == pytest.approx((math.exp(0.5) + 1) / 2)
    assert found["ppo/sampler_kl"] == pytest.approx((math.exp(0.5) - 1.5) / 2)
    exact = agreement([agreeing([-1.0, -2.0])])
    assert (exact["ppo/sampler_ratio"], exact["ppo/sampler_kl"]) == (1.0, 0.0)
    assert agreement([sampled()]) == {}, "a sampler that tells nothing is not compared"


def test_above_a_limit_a_rollout_warns_or_ends_the_stage(caplog: pytest.LogCaptureFixture) -> None:
    found = {"ppo/sampler_ratio": 1.2, "ppo/sampler_kl": 0.01}
    check(found, SamplerConfig(max_ratio_error=0.3), is_main=True)
    check({}, SamplerConfig(above="fail"), is_main=True)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        check(found, SamplerConfig(max_ratio_error=0.1), is_main=True)
        check(found, SamplerConfig(max_ratio_error=0.1), is_main=False)
    (record,) = caplog.records
    assert "mean ratio 1.2 (limit 1 +- 0.1), divergence 0.01 nats" in record.getMessage()
    for worse in (found, {**found, "ppo/sampler_ratio": 1.0, "ppo/sampler_kl": math.nan}):
        with pytest.raises(ConfigError, match="sampler and trainer disagree") as raised:
            check(worse, SamplerConfig(max_ratio_error=0.1, above="fail"), is_main=True)
        assert "ppo.sampler.truncation=2" in raised.value.advice


def test_truncated_weights_correct_for_the_sampler_and_need_its_word() -> None:
    config = configured(sampler={"truncation": 1.5})
    one = agreeing([-1.3, -3.0])  # ratios e^0.3 = 1.35 and e = 2.72, which is cut
    experience = to_experience([one], [1.0], config=config, kl_coefficient=0.0)
    weights = experience.sequences[0].fields["policy_weights"].tolist()
    assert weights == pytest.approx([0, 0, 0, math.exp(0.3), 1.5])
    with pytest.raises(ConfigError, match=r"truncation=1.5 needs the sampler's log-probabilities"):
        to_experience([sampled()], [1.0], config=config, kl_coefficient=0.0)


@pytest.fixture
def documents(tmp_path: Path) -> DocumentRows:
    """Three rows of four tokens: 10 11 12 13, 14 15 | 16 17, and 18 19 20 21."""
    writer = RaggedWriter(tmp_path, "documents", np.dtype(np.int64))
    for document in (np.arange(10, 16), np.arange(16, 22)):
        writer.append(document)
    writer.close()
    return DocumentRows(Ragged(tmp_path, "documents"), 4)


def test_documents_are_gone_through_in_turn_and_weigh_as_much_as_one_mean_loss(documents: DocumentRows) -> None:
    mix = PretrainingMix(documents, rows_per_step=2, seed=0)
    order = [row for step in range(3) for row in mix.of_step(step)]
    assert sorted(order[:3]) == sorted(order[3:]) == [0, 1, 2]
    assert [mix.of_step(step) for step in (2, 1, 0)] == [order[4:], order[2:4], order[:2]], "a function of the step"
    # Rows 0 and 1 have pieces of 4, 2 and 2 tokens, so 3 + 1 + 1 targets.
    assert mix.weight([0, 1], units=20.0) == 4.0


def test_a_micro_batch_tells_responses_from_documents(documents: DocumentRows) -> None:
    config = configured(loss_over="sequences", estimator=RLOO(responses_per_prompt=2))
    responses = to_experience([of_length(2), of_length(4)], [1.0, 0.0], config=config, kl_coefficient=0.0).sequences
    mix = PretrainingMix(documents, rows_per_step=1, seed=0)
    pieces = mix.sequences([1], weight=0.5, like=responses[0].fields)
    batch = lay_out([*pieces, *map(with_field, responses)])
    assert batch.num_targets == 2 + 6
    assert responses_of(batch).num_targets == 6
    assert update_units(config, batch) == 2
    assert batch.fields[FIELD].sum().item() == 0.5 * 4
    assert responses_of(lay_out(responses)).num_targets == 6
