"""Who looks at a training on the way: after every rollout and every evaluation, in this one place, each watch sees the
samples and their metrics, may add metrics of its own, and may end the training.

A watch draws no random numbers and changes no weights, so a training is the same bit for bit with it and without it, up
to where one ends it. What it decides follows from what it has seen, which is in its state: a resume decides alike.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from stages.train.engine import Engine
from stages.train.rollout.sampling import Sampled


class Watch(Protocol):
    """Sees what training sampled; all ranks see the same and call it alike."""

    def after_rollout(
        self, engine: Engine, samples: Sequence[Sampled], metrics: Mapping[str, float]
    ) -> dict[str, float]:
        """Look at a rollout before its first update; return metrics that every step over it logs."""
        ...

    def after_evaluation(
        self, engine: Engine, samples: Sequence[Sampled], metrics: Mapping[str, float]
    ) -> dict[str, float]:
        """Look at held-out prompts' responses; return further metrics of the evaluation."""
        ...

    @property
    def ends(self) -> bool:
        """Whether training should end before its next step."""
        ...

    def reason(self) -> str:
        """Say why training ends, with the numbers; the manifest's ledger keeps it."""
        ...

    @property
    def ledger(self) -> dict[str, Any]:
        """What else the manifest's ledger keeps; nothing for most."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """JSON values, by names that no other part of the objective uses."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
