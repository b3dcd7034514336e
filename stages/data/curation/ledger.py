"""The account of curation: what entered each step, what left it and why. The sums must conserve or the stage fails.

Every figure is counted where it happens (in where a step reads, kept where it hands on, dropped where it drops), so a
lost document shows as a difference and cannot hide in a subtraction.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from stages.config.errors import DataError
from stages.data.curation.pii import scrub
from stages.data.sources.records import utf8_size

SAMPLE_CHARACTERS = 200


@dataclass
class Amount:
    """A number of documents and their UTF-8 bytes."""

    documents: int = 0
    bytes: int = 0

    def add(self, size: int) -> None:
        self.documents += 1
        self.bytes += size

    def merge(self, other: "Amount") -> None:
        self.documents += other.documents
        self.bytes += other.bytes

    def to_dict(self) -> dict[str, int]:
        return {"documents": self.documents, "bytes": self.bytes}


@dataclass
class Step:
    """One step of the account. `rewritten` is how many bytes the step took out of texts that it kept."""

    name: str
    entered: Amount = field(default_factory=Amount)
    kept: Amount = field(default_factory=Amount)
    rewritten: int = 0
    dropped: dict[str, Amount] = field(default_factory=dict)
    samples: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    lost: int = 0
    """Bytes of files, or of the rest of files, that could not be read; part of what entered."""

    def drop(self, reason: str, identity: str, text: str, size: int | None = None, *, samples: int) -> None:
        """Count a dropped document and keep it as a sample while there is room; personal data never gets in."""
        self.dropped.setdefault(reason, Amount()).add(utf8_size(text) if size is None else size)
        kept = self.samples.setdefault(reason, [])
        if len(kept) < samples:
            kept.append({"id": identity, "text": scrub(text[:SAMPLE_CHARACTERS]).text})

    def merge(self, other: "Step", *, samples: int) -> None:
        """Add another shard's figures; call in shard order, because the first samples are the ones that stay."""
        self.entered.merge(other.entered)
        self.kept.merge(other.kept)
        self.rewritten += other.rewritten
        self.lost += other.lost
        for reason, amount in other.dropped.items():
            self.dropped.setdefault(reason, Amount()).merge(amount)
        for reason, rows in other.samples.items():
            kept = self.samples.setdefault(reason, [])
            kept.extend(rows[: samples - len(kept)])

    def verify(self) -> None:
        """Raise DataError unless in = kept + dropped (+ rewritten, for bytes)."""
        documents = self.kept.documents + sum(amount.documents for amount in self.dropped.values())
        size = self.kept.bytes + self.rewritten + sum(amount.bytes for amount in self.dropped.values())
        if (documents, size) != (self.entered.documents, self.entered.bytes):
            raise DataError(
                f"the ledger of step {self.name!r} does not conserve: {self.entered.documents} documents and "
                f"{self.entered.bytes} bytes entered, {documents} and {size} are accounted for",
                advice="This is a defect of curation, not of the data; please report it with ledger.json.",
            )

    def to_dict(self) -> dict[str, Any]:
        return {
            "step": self.name,
            "in": self.entered.to_dict(),
            "kept": self.kept.to_dict(),
            "rewritten_bytes": self.rewritten,
            "dropped": {reason: self.dropped[reason].to_dict() for reason in sorted(self.dropped)},
            "samples": {reason: self.samples[reason] for reason in sorted(self.samples)},
        }


def verify_chain(steps: Iterable[Step]) -> None:
    """Raise DataError unless every step conserves and each one starts with what the one before it kept."""
    before: Step | None = None
    for step in steps:
        step.verify()
        if before is not None and before.kept != step.entered:
            raise DataError(
                f"the ledger breaks between {before.name!r} and {step.name!r}: {before.kept.documents} documents "
                f"({before.kept.bytes} bytes) left the one, {step.entered.documents} ({step.entered.bytes}) entered",
                advice="This is a defect of curation, not of the data; please report it with ledger.json.",
            )
        before = step


def dropped_by_reason(steps: Iterable[Step]) -> dict[str, dict[str, int]]:
    """All losses of a chain of steps, as `step/reason`."""
    return {
        f"{step.name}/{reason}": amount.to_dict() for step in steps for reason, amount in sorted(step.dropped.items())
    }


@dataclass(frozen=True)
class PairsAccount:
    """The accounts of instruction and preference pairs, and how many were published."""

    instructions: list[Step]
    preferences: list[Step]
    published: dict[str, int]
    """Rows of each published file, as `preferences/heldout`."""
    kinds: dict[str, int]
    pii: dict[str, int]
    carried: dict[str, int]
    """Rows taken over from the previous data, part of `published`."""
    sources: dict[str, dict[str, Any]]
    """For `instructions`, `preferences` and, if there are any, `prompts` and `unpaired`: the account of each given
    source."""
    prompts: list[Step] = field(default_factory=list)
    """Empty where no prompt sets are given."""
    unpaired: list[Step] = field(default_factory=list)
    """Of single labelled responses; empty where no source has them."""
