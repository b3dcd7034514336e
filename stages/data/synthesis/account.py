"""What came of everything that was asked: each step counts in = kept + dropped by reason, and keeps some samples."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

SAMPLES_PER_REASON = 5
_SHOWN = 600


@dataclass
class Step:
    """One step of a method."""

    entered: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    samples: dict[str, list[str]] = field(default_factory=dict)
    """The first texts that each reason dropped."""

    def keep(self) -> None:
        self.entered += 1
        self.kept += 1

    def drop(self, reason: str, sample: str = "", *, times: int = 1) -> None:
        self.entered += times
        self.dropped[reason] += times
        shown = self.samples.setdefault(reason, [])
        if sample and len(shown) < SAMPLES_PER_REASON:
            shown.append(sample[:_SHOWN])

    def count(self, reason: str, sample: str = "") -> None:
        """Drop for a reason, keep without."""
        if reason:
            self.drop(reason, sample)
        else:
            self.keep()

    def to_dict(self) -> dict[str, Any]:
        if self.entered != self.kept + self.dropped.total():
            raise AssertionError(f"the ledger does not conserve: {self}")
        return {"in": self.entered, "kept": self.kept, "dropped": dict(sorted(self.dropped.items()))}


@dataclass
class Account:
    """The steps of a run of the stage, in order: each is there although a method may not have it."""

    sources: Step = field(default_factory=Step)
    """Rows of the sources: seed tasks, prompts or texts."""
    instructions: Step = field(default_factory=Step)
    """New tasks or questions that the generator wrote; an answer that holds none counts as one."""
    inputs: Step = field(default_factory=Step)
    """Accepted tasks, by what came of their input."""
    responses: Step = field(default_factory=Step)
    """Sampled responses."""
    rows: Step = field(default_factory=Step)
    """Prompts, by what came of the best of their responses."""

    def steps(self) -> dict[str, Step]:
        return {"sources": self.sources, "instructions": self.instructions, "inputs": self.inputs,
                "responses": self.responses, "rows": self.rows}  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        return {name: step.to_dict() for name, step in self.steps().items() if step.entered}
