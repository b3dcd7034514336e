"""What is learned from preference pairs and how: reward models and preference optimisation.

All of it decides results and enters fingerprints: a field that is added is marked `AddedLater` (`stages.config.base`).
"""

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from stages.config.base import AddedLater, Choice
from stages.config.preference_losses import PreferenceLoss, SigmoidLoss
from stages.config.principles import Area
from stages.config.train import OptimizerConfig, SampledConfig


class PairsHalf(Choice):
    """Which training pairs a stage sees. Pairs with one prompt are in one half, whatever other pairs there are."""

    BOTH = "both", "All pairs"
    FIRST = "first", "The half that models learn from when there is a gold scorer"
    SECOND = "second", "The half that only the gold scorer learns from"


def _each_once(areas: tuple[Area, ...]) -> tuple[Area, ...]:
    """In the order of the class, so that the same choice has one fingerprint however it is written."""
    return tuple(area for area in Area if area in areas)


Reasons = Annotated[tuple[Area, ...], AfterValidator(_each_once)]
"""Areas of which a pair must name at least one; none = every pair will do."""


class PairsConfig(SampledConfig):
    """What the objectives share that learn from preference pairs."""

    half: Annotated[PairsHalf, AddedLater(PairsHalf.BOTH)] = PairsHalf.BOTH
    """Training pairs that are used: `both` halves, or only the `first` or the `second`. A prompt decides the half of
    its pairs, so no prompt is in both. A run with a gold scorer trains that on the second half and everything else on
    the first."""
    reasons: Annotated[Reasons, AddedLater(())] = ()
    """Only pairs whose reason names one of these are trained on and held out: `helpful`, `honest`, `harmless`, the tags
    of raters and the areas of a constitution. Empty = all pairs, also those without a reason."""


class RewardConfig(PairsConfig):
    """Bradley-Terry reward model."""

    center_coefficient: float = Field(default=0.01, ge=0)
    """Weight of (r_chosen + r_rejected)^2, which keeps scores around zero."""
    margin: Annotated[float, AddedLater(0.0)] = Field(default=0.0, ge=0)
    """By how much the scores of a pair are to differ for each unit of its margin, which a source with `#margin=` has
    (Llama 2, https://arxiv.org/abs/2307.09288, eq. 2); 0 = margins do not count."""
    label_smoothing: Annotated[float, AddedLater(0.0)] = Field(default=0.0, ge=0, lt=0.5)
    """Assumed share of pairs whose sides are exchanged by mistake."""
    counted: Annotated[Literal["pair", "prompt"], AddedLater("pair")] = "pair"
    """What counts once in the loss: each `pair`, or each `prompt`, whose pairs then share a weight of 1 and are trained
    on in a row. A ranking of K responses has K (K - 1) / 2 pairs of one prompt (InstructGPT,
    https://arxiv.org/abs/2203.02155)."""
    ensemble_size: Annotated[int, AddedLater(1)] = Field(default=1, ge=1, le=16)
    """Reward models that are trained, one after another, and published together. They differ by the seed of their head
    and of the order of the data. Their mean is the score; how far they are apart shows where it is not to be trusted
    (https://arxiv.org/abs/2312.09244)."""
    ensemble_bootstrap: Annotated[bool, AddedLater(False)] = False
    """Whether each member of an ensemble learns from as many pairs drawn with replacement, so that members differ by
    their data too."""

    @model_validator(mode="after")
    def _only_ensembles_differ(self) -> "RewardConfig":
        if self.ensemble_bootstrap and self.ensemble_size == 1:
            raise ValueError("ensemble_bootstrap=true needs ensemble_size above 1, got 1")
        return self


class GoldConfig(RewardConfig):
    """The gold scorer: a reward model of the same objective, from another seed and the other half of the pairs."""

    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-5)
    """Optimizer and schedule."""
    global_batch_size: int = Field(default=32, ge=1)
    """Pairs of one optimizer step over all workers."""
    half: PairsHalf = PairsHalf.SECOND
    """Training pairs that it learns from. `both` shares pairs with the models that it judges, which then look better
    than they are."""


class DPOConfig(PairsConfig):
    """Optimisation of the policy on preference pairs, without a reward model."""

    loss: PreferenceLoss = SigmoidLoss()
    """What is minimised over the pairs; `kind` chooses it, the other fields are its own."""

    moved: ClassVar = {"beta": "loss.beta", "label_smoothing": "loss.label_smoothing"}

    def summary(self) -> str:
        settings = self.loss.model_dump(exclude={"kind"})
        loss = [f"{self.loss.kind} loss", *(f"{name} {value:g}" for name, value in settings.items() if value)]
        return ", ".join([f"{self.num_epochs:g} epochs", *loss])
