"""What the memory of a training is made of, as manifests record it and pages show it."""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import ConfigDict, NonNegativeInt, ValidationError

from stages.config.base import Config

RECORDED_AS = "memory"
"""Its key in a manifest's `execution`."""


class TrainingMemory(Config):
    """Bytes of the main worker's process; what its models need on a GPU lies there, on a CPU in the process itself."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="ignore")

    device: str
    """`cpu` or `cuda`: where the peak was measured."""
    parameters: NonNegativeInt
    """Of the trained models, adapters and the weights under them included; this worker's share of them."""
    gradients: NonNegativeInt
    """After the first backward pass."""
    optimizer: NonNegativeInt
    """Moments, and moving averages of weights where there are any."""
    frozen: NonNegativeInt
    """Models that are only read: reference, reward model, gold scorer."""
    libraries: NonNegativeInt = 0
    """On a CPU: what the process held before it loaded a model."""
    peak: NonNegativeInt
    """On a GPU the most that tensors took at one time while training, on a CPU the most that the process ever held."""
    rest: NonNegativeInt | None = None
    """What is left of the peak: activations, rollouts and copies. None where the process had held more before this
    training began, as when several stages share one."""

    @property
    def components(self) -> dict[str, int]:
        """Bytes by name, in the order in which tables show them."""
        found = {
            "parameters": self.parameters,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "frozen models": self.frozen,
        }
        return found if self.rest is None else {**found, "activations and the rest": self.rest}

    @property
    def of_models(self) -> int:
        """What follows from the models and the optimizer alone."""
        return self.parameters + self.gradients + self.optimizer + self.frozen


def recorded_memory(execution: Mapping[str, Any]) -> TrainingMemory | None:
    """Read it from a manifest's `execution`; None for what no training recorded, as earlier versions."""
    try:
        return TrainingMemory.model_validate(execution.get(RECORDED_AS))
    except ValidationError:
        return None
