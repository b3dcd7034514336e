"""Every equation against arithmetic that a reader can redo by hand."""

import math

import numpy as np
import pytest
import torch

from stages import losses


def test_equal_scores_cost_ln_2_a_pair() -> None:
    scores = torch.tensor([1.5, -3.0])
    assert losses.bradley_terry_loss(scores, scores).item() == pytest.approx(2 * math.log(2))


def test_bradley_terry_by_hand() -> None:
    # -log(1 / (1 + e^-2)) = log(1 + e^-2)
    loss = losses.bradley_terry_loss(torch.tensor([3.0]), torch.tensor([1.0]))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-2)))


def test_swapping_the_sides_gives_one_minus_accuracy_and_ties_count_half() -> None:
    chosen, rejected = torch.tensor([2.0, 1.0, 0.0, 5.0]), torch.tensor([1.0, 3.0, 0.0, 4.0])
    assert losses.pair_accuracy(chosen, rejected).item() == 2.5
    assert losses.pair_accuracy(rejected, chosen).item() == 4 - 2.5


def test_calibration_error_by_hand() -> None:
    # odds of 3 to 1 (confidence 0.75, the bin from 0.75 to 0.8): right in 3 of 4 pairs would be calibrated, half are
    # not: |0.75 - 0.5| on these 4. A margin of 40 is certain and right: no gap on that 1.
    three_to_one = math.log(3) + 1e-3
    margins = torch.tensor([three_to_one, three_to_one, -three_to_one, -three_to_one, 40.0])
    assert losses.calibration_error(margins) == pytest.approx(4 / 5 * 0.25, abs=1e-3)


def test_a_pair_without_preference_counts_as_wrong_with_even_odds() -> None:
    assert losses.calibration_error(torch.zeros(3)) == pytest.approx(0.5)


def test_scores_are_measured_in_spreads_from_the_mean() -> None:
    assert losses.normalised_score(3.0, mean=1.0, std=4.0) == pytest.approx(0.5)
    assert losses.normalised_score(1.0, mean=1.0, std=0.0) == 0.0


def test_dpo_with_policy_equal_to_reference_costs_ln_2() -> None:
    logprobs = torch.tensor([-4.0, -7.0])
    terms = losses.dpo_loss(
        chosen_logprobs_P=logprobs,
        rejected_logprobs_P=logprobs - 1,
        ref_chosen_logprobs_P=logprobs,
        ref_rejected_logprobs_P=logprobs - 1,
        beta=0.1,
    )
    assert terms.loss_sum.item() == pytest.approx(2 * math.log(2))


def test_dpo_by_hand() -> None:
    # margin = 0.5 * ((-1 - -3) - (-4 - -2)) = 0.5 * (2 + 2) = 2; loss = log(1 + e^-2)
    terms = losses.dpo_loss(
        chosen_logprobs_P=torch.tensor([-1.0]),
        rejected_logprobs_P=torch.tensor([-4.0]),
        ref_chosen_logprobs_P=torch.tensor([-3.0]),
        ref_rejected_logprobs_P=torch.tensor([-2.0]),
        beta=0.5,
    )
    assert terms.loss_sum.item() == pytest.approx(math.log(1 + math.exp(-2)))
    assert (terms.chosen_rewards_P - terms.rejected_rewards_P).item() == pytest.approx(2.0)


def test_label_smoothing_mixes_both_directions() -> None:
    kwargs = {
        "chosen_logprobs_P": torch.tensor([-1.0]),
        "rejected_logprobs_P": torch.tensor([-4.0]),
        "ref_chosen_logprobs_P": torch.tensor([-3.0]),
        "ref_rejected_logprobs_P": torch.tensor([-2.0]),
        "beta": 0.5,
    }
    expected = 0.9 * math.log(1 + math.exp(-2)) + 0.1 * math.log(1 + math.exp(2))
    assert losses.dpo_loss(**kwargs, label_smoothing=0.1).loss_sum.item() == pytest.approx(expected)


def test_ppo_at_the_old_policy_has_no_kl_and_clips_nothing() -> None:
    logprobs = torch.tensor([-1.0, -2.0, -0.5])
    terms = losses.ppo_policy_loss(
        logprobs_N=logprobs, old_logprobs_N=logprobs, advantages_N=torch.tensor([1.0, -2.0, 0.5]), clip_range=0.2
    )
    assert terms.loss_sum.item() == pytest.approx(-(1.0 - 2.0 + 0.5))
    assert terms.clipped_sum.item() == 0
    assert terms.approx_kl_sum.item() == 0


def test_ppo_clips_by_hand() -> None:
    # A=+1: min(1.5, 1.2) = 1.2 (clipped); A=+1: min(0.5, 0.8) = 0.5; A=-1: max(0.5, 0.8) = 0.8 (clipped)
    ratios = torch.tensor([1.5, 0.5, 0.5])
    terms = losses.ppo_policy_loss(
        logprobs_N=ratios.log(),
        old_logprobs_N=torch.zeros(3),
        advantages_N=torch.tensor([1.0, 1.0, -1.0]),
        clip_range=0.2,
    )
    assert terms.loss_sum.item() == pytest.approx(-1.2 - 0.5 + 0.8)
    assert terms.clipped_sum.item() == 2


def test_value_loss_takes_the_worse_of_clipped_and_free() -> None:
    # free error (2 - 0)^2 = 4, clipped prediction 1 + 0.2 = 1.2, error 1.44: the larger counts, halved
    loss = losses.ppo_value_loss(
        values_N=torch.tensor([2.0]), old_values_N=torch.tensor([1.0]), returns_N=torch.tensor([0.0]), clip_range=0.2
    )
    assert loss.item() == pytest.approx(2.0)


def test_k3_is_never_negative_and_zero_only_at_equality() -> None:
    log_ratio = torch.linspace(-5, 5, 101)
    assert (losses.k3(log_ratio) >= 0).all()
    assert losses.k3(torch.tensor(0.0)).item() == 0
    assert losses.k3(torch.tensor(1.0)).item() == pytest.approx(math.exp(-1) - 1 + 1)


def test_gae_equals_brute_force() -> None:
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=7), rng.normal(size=7)
    gamma, lam = 0.9, 0.7
    deltas = [rewards[t] + gamma * (values[t + 1] if t < 6 else 0.0) - values[t] for t in range(7)]
    expected = [sum((gamma * lam) ** k * deltas[t + k] for k in range(7 - t)) for t in range(7)]
    result = losses.gae(rewards_R=torch.tensor(rewards), values_R=torch.tensor(values), gamma=gamma, gae_lambda=lam)
    assert result.advantages_R.tolist() == pytest.approx(expected)
    assert result.returns_R.tolist() == pytest.approx([a + v for a, v in zip(expected, values, strict=True)])


def test_gae_of_one_token_by_hand() -> None:
    result = losses.gae(rewards_R=torch.tensor([2.0]), values_R=torch.tensor([0.5]), gamma=1.0, gae_lambda=0.95)
    assert result.advantages_R.item() == 1.5
    assert result.returns_R.item() == 2.0


def test_whitening_one_element_stays_finite() -> None:
    assert losses.whiten(torch.tensor([3.0]), mean=3.0, std=0.0).item() == 0.0


def test_the_score_is_paid_on_the_last_token_and_kl_on_every_one() -> None:
    rewards = losses.shaped_rewards(
        logprobs_R=torch.tensor([-1.0, -1.0]), ref_logprobs_R=torch.tensor([-2.0, -1.5]), score=3.0, kl_coefficient=0.1
    )
    assert rewards.tolist() == pytest.approx([-0.1, 3.0 - 0.05])


def test_kl_controller_reacts_to_both_sides_and_is_bounded() -> None:
    def adapt(kl: float) -> float:
        return losses.adapted_kl_coefficient(0.1, kl=kl, target=6.0, horizon=100, num_responses=10)

    assert adapt(6.0) == pytest.approx(0.1)
    assert adapt(100.0) == pytest.approx(0.1 * (1 + 0.2 * 0.1))
    assert adapt(0.0) == pytest.approx(0.1 * (1 - 0.2 * 0.1))


def test_perplexity_and_bits() -> None:
    assert losses.perplexity(math.log(50)) == pytest.approx(50)
    assert losses.bits_per_byte(math.log(2) * 24, num_bytes=8) == pytest.approx(3.0)


def test_entropy_of_a_uniform_row_is_ln_v() -> None:
    assert losses.entropy(torch.zeros(1, 8)).item() == pytest.approx(math.log(8))


@pytest.mark.parametrize("method", ["dpo", "ppo"])
def test_both_alignments_reach_the_known_optimum(method: str) -> None:
    """Rewards (1, 0, -1), reference (.2, .5, .3), beta .5: p* is proportional to p_ref exp(r / beta)."""
    rewards, reference, beta = torch.tensor([1.0, 0.0, -1.0]), torch.tensor([0.2, 0.5, 0.3]), 0.5
    logits = reference.log().clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.02)
    pairs = [(0, 1), (0, 2), (1, 2)]
    for _ in range(4000):
        logprobs = logits.log_softmax(0)
        if method == "ppo":
            # exact expectation of the penalised reward over three actions: score minus KL, as shaped_rewards pays it
            advantage = (rewards - beta * losses.k1(logprobs - reference.log())).detach()
            baseline = (logprobs.exp().detach() * advantage).sum()
            terms = losses.ppo_policy_loss(
                logprobs_N=logprobs, old_logprobs_N=logprobs.detach(), advantages_N=advantage - baseline, clip_range=0.2
            )
            assert terms.clipped_sum.item() == 0
            loss = -(logprobs.exp() * (advantage - baseline)).sum()
        else:
            loss = torch.zeros(())
            for a, b in pairs:
                preferred = torch.sigmoid(rewards[a] - rewards[b])
                for first, second, share in ((a, b, preferred), (b, a, 1 - preferred)):
                    terms = losses.dpo_loss(
                        chosen_logprobs_P=logprobs[first : first + 1],
                        rejected_logprobs_P=logprobs[second : second + 1],
                        ref_chosen_logprobs_P=reference.log()[first : first + 1],
                        ref_rejected_logprobs_P=reference.log()[second : second + 1],
                        beta=beta,
                    )
                    loss = loss + share * terms.loss_sum
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert logits.softmax(0).tolist() == pytest.approx([0.732165, 0.247720, 0.020115], abs=2e-3)
