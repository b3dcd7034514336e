"""The losses of preference optimisation and their settings: a discriminated union, one class a loss.

`needs_reference` says whether a loss compares with the frozen start, whose log-probabilities are then computed once.
`start` is the loss a pair while the policy still is its reference, in nats; a gate compares the first step with it.
The equations stand in `stages.losses.preference`.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, TypeAdapter

from stages.config.base import AddedLater, Config


class WithSupervision(Config):
    """What all losses share but ORPO, which has such a term of its own."""

    sft_coefficient: Annotated[float, AddedLater(0.0)] = Field(default=0.0, ge=0)
    """Weight of a supervised term: the negative log-likelihood of the chosen response, a token. It keeps that response
    likely while the margin grows (RPO, https://arxiv.org/abs/2405.16436); 0 = none."""


class SigmoidLoss(WithSupervision):
    """The original loss of DPO: -log sigmoid of the difference of the implicit rewards."""

    kind: Annotated[Literal["sigmoid"], AddedLater("sigmoid")] = "sigmoid"
    """Which preference loss."""
    beta: float = Field(default=0.1, gt=0)
    """Strength of the pull towards the reference."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Assumed share of flipped labels (conservative DPO)."""

    needs_reference: ClassVar[bool] = True

    @property
    def start(self) -> float | None:
        return math.log(2)


class RobustLoss(WithSupervision):
    """DPO for labels of which a known share is flipped: on average it is the loss without flips."""

    kind: Literal["robust"] = "robust"
    """Which preference loss."""
    beta: float = Field(default=0.1, gt=0)
    """Strength of the pull towards the reference."""
    label_smoothing: float = Field(default=0.1, gt=0, lt=0.5)
    """Share of flipped labels, which the loss undoes."""

    needs_reference: ClassVar[bool] = True

    @property
    def start(self) -> float | None:
        return math.log(2)


class HingeLoss(WithSupervision):
    """SLiC: pairs whose margin has reached 1 no longer count."""

    kind: Literal["hinge"] = "hinge"
    """Which preference loss."""
    beta: float = Field(default=0.1, gt=0)
    """Strength of the pull towards the reference: a margin of 1 is a log-ratio of 1 / beta."""

    needs_reference: ClassVar[bool] = True

    @property
    def start(self) -> float | None:
        return 1.0


class IPOLoss(WithSupervision):
    """IPO: regresses the difference of log-ratios on 1 / (2 beta), so that certain labels do not drive it further."""

    kind: Literal["ipo"] = "ipo"
    """Which preference loss."""
    beta: float = Field(default=0.1, gt=0)
    """Strength of the pull towards the reference, the paper's tau."""
    length_averaged: bool = False
    """Divide the log-ratio of each response by its tokens. The paper sums over tokens; TRL averages, because squares
    of sums grow with the length. Averages want a larger beta."""

    needs_reference: ClassVar[bool] = True

    @property
    def start(self) -> float | None:
        return (1 / (2 * self.beta)) ** 2


class LengthNormalizedLoss(WithSupervision):
    """Length-normalised DPO: log-ratios a token, so that a longer response has no larger reward for being longer."""

    kind: Literal["sigmoid_norm"] = "sigmoid_norm"
    """Which preference loss."""
    beta: float = Field(default=5.0, gt=0)
    """Strength of the pull towards the reference, a token; Tulu 3 uses 5."""

    needs_reference: ClassVar[bool] = True

    @property
    def start(self) -> float | None:
        return math.log(2)


class SimPOLoss(WithSupervision):
    """SimPO: the reward is the mean log-probability of a response's tokens, and the margin must exceed gamma."""

    kind: Literal["simpo"] = "simpo"
    """Which preference loss."""
    beta: float = Field(default=2.0, gt=0)
    """Scale of the rewards; the paper uses 2 to 2.5."""
    gamma: float = Field(default=1.0, ge=0)
    """Margin that the chosen response's reward must have; the paper finds 0.5 to 1.5 good."""

    needs_reference: ClassVar[bool] = False

    @property
    def start(self) -> float | None:
        return None


class ORPOLoss(Config):
    """ORPO: supervised training on the chosen response, and a penalty where its odds are not above the rejected one's.
    It may follow pretraining directly."""

    kind: Literal["orpo"] = "orpo"
    """Which preference loss."""
    odds_coefficient: float = Field(default=0.1, gt=0)
    """Weight of the odds ratio next to the likelihood of the chosen response, the paper's lambda."""

    needs_reference: ClassVar[bool] = False
    sft_coefficient: ClassVar[float] = 0.0

    @property
    def start(self) -> float | None:
        return None


class APOZeroLoss(WithSupervision):
    """APO-zero: raises the chosen response and lowers the rejected one, each for itself; for chosen responses that are
    better than the model's own."""

    kind: Literal["apo_zero"] = "apo_zero"
    """Which preference loss."""
    beta: float = Field(default=0.1, gt=0)
    """Strength of the pull towards the reference."""

    needs_reference: ClassVar[bool] = True

    @property
    def start(self) -> float | None:
        return 1.0


class NCALoss(WithSupervision):
    """NCA: noise-contrastive, with absolute likelihoods, so that the chosen response does not get less likely."""

    kind: Literal["nca"] = "nca"
    """Which preference loss."""
    beta: float = Field(default=0.01, gt=0)
    """Strength of the pull towards the reference; the paper uses 0.01, and 0.1 for reasoning."""

    needs_reference: ClassVar[bool] = True

    @property
    def start(self) -> float | None:
        return 2 * math.log(2)


class EXOLoss(WithSupervision):
    """EXO: the reverse KL divergence from the smoothed label, so the policy seeks the mode as reinforcement learning
    does."""

    kind: Literal["exo"] = "exo"
    """Which preference loss."""
    beta: float = Field(default=0.1, gt=0)
    """Strength of the pull towards the reference."""
    label_smoothing: float = Field(default=1e-3, gt=0, lt=0.5)
    """Probability of the rejected response in the target. Without it the divergence is infinite."""

    needs_reference: ClassVar[bool] = True

    @property
    def start(self) -> float | None:
        return -math.log(2) - 0.5 * math.log(self.label_smoothing * (1 - self.label_smoothing))


class KTOLoss(WithSupervision):
    """KTO: single responses that are desirable or undesirable, each compared with what the policy does on average.
    Steps, batch sizes and epochs count examples: both sides of a pair, and responses of `#format=unpaired` sources."""

    kind: Literal["kto"] = "kto"
    """Which preference loss."""
    beta: float = Field(default=0.1, gt=0)
    """Strength of the pull towards the reference: how much of a log-ratio saturates the loss."""
    desirable_weight: float = Field(default=1.0, gt=0)
    """Weight of desirable examples. Where they are few, give them as much more that both kinds weigh about equally;
    the paper's range for desirable over undesirable is 1 to 1.5."""
    undesirable_weight: float = Field(default=1.0, gt=0)
    """Weight of undesirable examples."""

    needs_reference: ClassVar[bool] = True

    @property
    def start(self) -> float | None:
        """For as many desirable as undesirable examples."""
        return self.start_with(0.5)

    def start_with(self, desirable_share: float) -> float:
        """Half of the mean weight: at the reference every sigmoid is at its middle."""
        return 0.5 * (desirable_share * self.desirable_weight + (1 - desirable_share) * self.undesirable_weight)


PairLoss = (
    SigmoidLoss
    | RobustLoss
    | HingeLoss
    | IPOLoss
    | LengthNormalizedLoss
    | SimPOLoss
    | ORPOLoss
    | APOZeroLoss
    | NCALoss
    | EXOLoss
)
"""Losses that compare the two responses of a pair."""

# One more preference loss is a class like those above, with defaults for all its fields, a member of PairLoss, and a
# case in `stages.losses.preference`.
PreferenceLoss = Annotated[PairLoss | KTOLoss, Field(discriminator="kind")]


def read_loss(stored: Mapping[str, Any]) -> PreferenceLoss:
    """Return the loss of a stored configuration; one without a kind is of the time when there was one loss.

    Raises pydantic's ValidationError for a loss that this version does not know.
    """
    return TypeAdapter(PreferenceLoss).validate_python({"kind": "sigmoid", **stored})
