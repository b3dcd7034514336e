"""Preference losses against arithmetic that a reader can redo by hand."""

import math
from typing import get_args

import pytest
import torch
from torch import Tensor

from stages.config.preference_losses import (
    APOZeroLoss,
    EXOLoss,
    HingeLoss,
    IPOLoss,
    LengthNormalizedLoss,
    NCALoss,
    ORPOLoss,
    PairLoss,
    RobustLoss,
    SigmoidLoss,
    SimPOLoss,
)
from stages.losses.preference import PairLogprobs, preference_loss


def pairs_of(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> PairLogprobs:
    lengths = torch.ones_like(chosen)
    return PairLogprobs(chosen, rejected, lengths, lengths, ref_chosen, ref_rejected)


ONE_PAIR = pairs_of(*(torch.tensor([value]) for value in (-1.0, -4.0, -3.0, -2.0)))
"""Implicit rewards of 2 and -2, times beta."""


def test_dpo_with_policy_equal_to_reference_costs_ln_2() -> None:
    logprobs = torch.tensor([-4.0, -7.0])
    terms = preference_loss(SigmoidLoss(), pairs_of(logprobs, logprobs - 1, logprobs, logprobs - 1))
    assert terms.loss_sum.item() == pytest.approx(2 * math.log(2))


def test_dpo_by_hand() -> None:
    # margin = 0.5 * ((-1 - -3) - (-4 - -2)) = 0.5 * (2 + 2) = 2; loss = log(1 + e^-2)
    terms = preference_loss(SigmoidLoss(beta=0.5), ONE_PAIR)
    assert terms.loss_sum.item() == pytest.approx(math.log(1 + math.exp(-2)))
    assert (terms.chosen_rewards_P - terms.rejected_rewards_P).item() == pytest.approx(2.0)


def test_label_smoothing_mixes_both_directions() -> None:
    expected = 0.9 * math.log(1 + math.exp(-2)) + 0.1 * math.log(1 + math.exp(2))
    terms = preference_loss(SigmoidLoss(beta=0.5, label_smoothing=0.1), ONE_PAIR)
    assert terms.loss_sum.item() == pytest.approx(expected)


def test_a_pair_that_is_hopelessly_wrong_still_has_a_finite_loss_and_gradient() -> None:
    chosen = torch.tensor([-3000.0], requires_grad=True)
    zeros = torch.zeros(1)
    terms = preference_loss(SigmoidLoss(beta=1.0), pairs_of(chosen, zeros, zeros, zeros))
    terms.loss_sum.backward()
    assert terms.loss_sum.item() == pytest.approx(3000.0)
    assert chosen.grad is not None
    assert chosen.grad.item() == pytest.approx(-1.0)


LN2 = math.log(2)
LOSSES: list[PairLoss] = [member() for member in get_args(PairLoss)]


def four_and_two_tokens(chosen: float, rejected: float, ref_chosen: float, ref_rejected: float) -> PairLogprobs:
    """One pair with a gradient; the chosen answer has four tokens, the rejected one two."""
    return PairLogprobs(
        torch.tensor([chosen], dtype=torch.float64, requires_grad=True),
        torch.tensor([rejected], dtype=torch.float64, requires_grad=True),
        torch.tensor([4.0]),
        torch.tensor([2.0]),
        torch.tensor([ref_chosen], dtype=torch.float64),
        torch.tensor([ref_rejected], dtype=torch.float64),
    )


def slopes(loss: PairLoss, logprobs: PairLogprobs) -> tuple[float, float]:
    """How the loss changes with the log-probabilities of both answers."""
    chosen, rejected = torch.autograd.grad(
        preference_loss(loss, logprobs).loss_sum, [logprobs.chosen_P, logprobs.rejected_P]
    )
    return chosen.item(), rejected.item()


AT_THE_START = [
    # loss, its value without margins, the slope in the chosen answer's log-probability
    (SigmoidLoss(beta=0.4), LN2, -0.4 / 2),
    (SigmoidLoss(beta=0.4, label_smoothing=0.1), LN2, -0.4 / 2 * 0.8),
    # (0.9 (-1/2) - 0.1 (1/2)) / 0.8
    (RobustLoss(beta=0.4, label_smoothing=0.1), LN2, -0.4 / 2 / 0.8),
    (HingeLoss(beta=0.4), 1.0, -0.4),
    # (0 - 1 / 0.8)^2 = 1.5625, slope 2 (0 - 1 / 0.8); with averages that slope over 4 tokens
    (IPOLoss(beta=0.4), 1.5625, -2.5),
    (IPOLoss(beta=0.4, length_averaged=True), 1.5625, -2.5 / 4),
    (LengthNormalizedLoss(beta=0.4), LN2, -0.4 / 2 / 4),
    # two halves, each with the sigmoid's slope of 1/4
    (APOZeroLoss(beta=0.4), 1.0, -0.4 / 4),
    # -1/2 of the chosen as data, +1/4 of it as noise
    (NCALoss(beta=0.4), 2 * LN2, -0.4 / 4),
    # q = 1/2: 1/2 ln(.5 / .9) + 1/2 ln(.5 / .1) = ln(.5 / .3); slope 1/4 (ln(.5 / .9) - ln(.5 / .1)) = -1/4 ln 9
    (EXOLoss(beta=0.4, label_smoothing=0.1), math.log(0.5 / 0.3), -0.4 / 4 * math.log(9)),
]


@pytest.mark.parametrize(("loss", "value", "slope"), AT_THE_START, ids=lambda it: getattr(it, "kind", ""))
def test_a_policy_that_is_its_reference_starts_as_computed_by_hand(loss: PairLoss, value: float, slope: float) -> None:
    logprobs = four_and_two_tokens(-8.0, -3.0, -8.0, -3.0)
    terms = preference_loss(loss, logprobs)
    assert terms.loss_sum.item() == pytest.approx(value)
    assert loss.start == pytest.approx(value)
    assert terms.chosen_rewards_P.item() == terms.rejected_rewards_P.item() == 0
    chosen, rejected = slopes(loss, logprobs)
    assert chosen == pytest.approx(slope)
    # The rejected answer is pushed down as hard as the chosen one is pushed up; it has half as many tokens.
    per_token = isinstance(loss, LengthNormalizedLoss) or (isinstance(loss, IPOLoss) and loss.length_averaged)
    assert rejected == pytest.approx(-slope * (2 if per_token else 1))


def test_every_loss_with_a_reference_is_in_the_table_of_starts() -> None:
    assert {loss.kind for loss, _, _ in AT_THE_START} == {loss.kind for loss in LOSSES if loss.needs_reference}
    assert {loss.kind for loss in LOSSES if loss.start is None} == {"simpo", "orpo"}


@pytest.mark.parametrize(
    ("loss", "value"),
    [
        # rewards 0.5 * 2 = 1 and 0.5 * -2 = -1, margin 2
        # -log s(2) = ln(1 + e^-2) with weight 3/2, -log s(-2) = ln(1 + e^2) with weight -1/2
        (RobustLoss(beta=0.5, label_smoothing=0.25), 1.5 * math.log1p(math.e**-2) - 0.5 * math.log1p(math.e**2)),
        (HingeLoss(beta=0.5), 0.0),
        (HingeLoss(beta=0.2), 1 - 0.8),
        (IPOLoss(beta=0.5), (4 - 1) ** 2),
        # 2 / 4 tokens - -2 / 2 tokens = 1.5
        (IPOLoss(beta=0.5, length_averaged=True), (1.5 - 1) ** 2),
        (LengthNormalizedLoss(beta=2.0), math.log1p(math.exp(-3))),
        (APOZeroLoss(beta=0.5), 2 / (1 + math.e)),
        # -log s(1) - (log s(-1) + log s(1)) / 2, with s(x) = 1 / (1 + e^-x)
        (NCALoss(beta=0.5), 1.5 * math.log1p(math.exp(-1)) + 0.5 * math.log1p(math.e)),
    ],
    ids=lambda it: getattr(it, "kind", ""),
)  # fmt: skip
def test_losses_with_a_reference_by_hand(loss: PairLoss, value: float) -> None:
    terms = preference_loss(loss, four_and_two_tokens(-1.0, -4.0, -3.0, -2.0))
    assert terms.loss_sum.item() == pytest.approx(value)


def test_exo_by_hand_and_zero_where_the_policy_prefers_as_the_label() -> None:
    # margin ln 3: the policy chooses right with probability 3/4, the label says 9/10
    pair = four_and_two_tokens(math.log(3), 0.0, 0.0, 0.0)
    expected = 0.75 * math.log(0.75 / 0.9) + 0.25 * math.log(0.25 / 0.1)
    assert preference_loss(EXOLoss(beta=1.0, label_smoothing=0.1), pair).loss_sum.item() == pytest.approx(expected)
    loss = EXOLoss(beta=1.0, label_smoothing=0.25)
    assert preference_loss(loss, pair).loss_sum.item() == pytest.approx(0.0, abs=1e-6)
    assert slopes(loss, pair) == pytest.approx((0.0, 0.0), abs=1e-6)


def test_simpo_compares_mean_logprobs_with_a_margin() -> None:
    # 2 * (-4 / 4) = -2 and 2 * (-3 / 2) = -3: margin 1, minus 0.5
    pair = four_and_two_tokens(-4.0, -3.0, 0.0, 0.0)
    loss = SimPOLoss(beta=2.0, gamma=0.5)
    terms = preference_loss(loss, pair)
    assert terms.loss_sum.item() == pytest.approx(math.log1p(math.exp(-0.5)))
    assert (terms.chosen_rewards_P.item(), terms.rejected_rewards_P.item()) == (-2.0, -3.0)
    sigmoid = 1 / (1 + math.exp(0.5))
    assert slopes(loss, pair) == pytest.approx((-sigmoid * 2 / 4, sigmoid * 2 / 2))


def test_orpo_adds_the_odds_ratio_to_the_likelihood_of_the_chosen_answer() -> None:
    # tokens of 1/2 and of 1/4 on average: odds 1 and 1/3, their ratio 3
    pair = four_and_two_tokens(4 * math.log(1 / 2), 2 * math.log(1 / 4), 0.0, 0.0)
    loss = ORPOLoss(odds_coefficient=0.2)
    terms = preference_loss(loss, pair)
    assert terms.loss_sum.item() == pytest.approx(LN2 + 0.2 * math.log(1 + 1 / 3))
    assert terms.chosen_rewards_P.item() == pytest.approx(0.0)
    assert terms.rejected_rewards_P.item() == pytest.approx(-math.log(3))
    # sigmoid(-ln 3) = 1/4; the log odds move by 1 / (1 - p) a log-probability: by 2 and by 4/3
    assert slopes(loss, pair) == pytest.approx((-1 / 4 - 0.2 / 4 * 2 / 4, 0.2 / 4 * (4 / 3) / 2))


def test_orpo_stays_finite_for_an_answer_that_is_certain() -> None:
    chosen, rejected = torch.zeros(1, requires_grad=True), torch.tensor([-800.0], requires_grad=True)
    ones = torch.ones(1)
    loss_sum = preference_loss(ORPOLoss(), PairLogprobs(chosen, rejected, ones, ones)).loss_sum
    gradients = torch.autograd.grad(loss_sum, [chosen, rejected])
    assert math.isfinite(loss_sum.item())
    assert all(bool(gradient.isfinite()) for gradient in gradients)


def test_robust_smoothing_undoes_flips_on_average_and_conservative_smoothing_does_not() -> None:
    pair, flipped = four_and_two_tokens(-1.0, -4.0, -3.0, -2.0), four_and_two_tokens(-4.0, -1.0, -2.0, -3.0)
    clean = preference_loss(SigmoidLoss(beta=0.5), pair).loss_sum.item()

    def on_average(loss: PairLoss) -> float:
        return 0.8 * preference_loss(loss, pair).loss_sum.item() + 0.2 * preference_loss(loss, flipped).loss_sum.item()

    assert on_average(RobustLoss(beta=0.5, label_smoothing=0.2)) == pytest.approx(clean)
    assert on_average(SigmoidLoss(beta=0.5, label_smoothing=0.2)) != pytest.approx(clean)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.kind)
def test_a_loss_is_a_sum_over_pairs(loss: PairLoss) -> None:
    values = torch.tensor([[-8.0, -3.0, -7.5, -3.5], [-2.0, -6.0, -4.0, -4.5], [-9.0, -1.0, -9.0, -2.0]])
    lengths = torch.tensor([[4.0, 2.0], [3.0, 5.0], [6.0, 1.0]])

    def of(rows: slice) -> float:
        chosen, rejected, ref_chosen, ref_rejected = values[rows].T
        pairs = PairLogprobs(chosen, rejected, lengths[rows, 0], lengths[rows, 1], ref_chosen, ref_rejected)
        return preference_loss(loss, pairs).loss_sum.item()

    assert of(slice(0, 3)) == pytest.approx(of(slice(0, 1)) + of(slice(1, 3)), rel=1e-6)


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss.kind != "orpo"], ids=lambda loss: loss.kind)
def test_the_supervised_term_is_the_nll_of_a_chosen_token(loss: PairLoss) -> None:
    pair = four_and_two_tokens(-8.0, -3.0, -8.0, -3.0)
    bare = preference_loss(loss, pair).loss_sum.item()
    with_term = loss.model_copy(update={"sft_coefficient": 0.5})
    assert preference_loss(with_term, pair).loss_sum.item() == pytest.approx(bare + 0.5 * 8 / 4)
    assert slopes(with_term, pair) == pytest.approx((slopes(loss, pair)[0] - 0.5 / 4, slopes(loss, pair)[1]))


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.kind)
def test_hopeless_and_perfect_pairs_have_finite_losses_and_gradients(loss: PairLoss) -> None:
    for chosen, rejected in ((-3000.0, -1.0), (-1.0, -3000.0)):
        logprobs = PairLogprobs(
            torch.tensor([chosen], requires_grad=True),
            torch.tensor([rejected], requires_grad=True),
            *torch.tensor([[5.0], [5.0]]),
            *torch.tensor([[-900.0], [-900.0]]),
        )
        assert math.isfinite(preference_loss(loss, logprobs).loss_sum.item())
        assert all(map(math.isfinite, slopes(loss, logprobs)))
