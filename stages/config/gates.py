"""Settings of the gates: which numbers a run must reach to go on, and which failed gates a person lets pass.

A bound is one line, `reward: accept/accuracy_low > 0.5`, as people read and write it in recipes and overrides. What a
gate checks besides bounds, the invariants, has no settings: an artifact that breaks one is broken.
"""

import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from pydantic import Field, field_validator, model_validator

from stages.config.base import Config
from stages.config.graph import Stage, gated_stages

GATE_VERSION = 3
"""Raise it when what a gate's job measures changes: outcomes that are kept then no longer count."""
ALL = "all"
MEASURED_BY_JOB = "accept/"
"""How metrics begin that only the job of a gate measures."""
ACCURACY_LOW, BALANCED_LOW = "accept/accuracy_low", "accept/balanced_low"
"""What a reward model is accepted by: lower ends of 95 % intervals, see `stages/judge/gates/acceptance.py`."""
EARLIER = "accept/earlier_accuracy"
"""Of the earlier reward model, on the same pairs."""
GAIN, GAIN_LOW, GAIN_HIGH = "accept/gain", "accept/gain_low", "accept/gain_high"
"""Accuracy of the new reward model minus that of the earlier one, with its 95 % interval."""
OVER_LENGTH_LOW, CHANCE = "accept/over_length_low", 0.5

_BOUND = re.compile(r"(?P<stage>[a-z_]+)\s*:\s*(?P<metric>[^\s<>=]+)\s*(?P<sign>>=|<=|>|<)\s*(?P<number>\S+)")
_SIGNS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}


def gate_name(stage: Stage | str) -> str:
    """Name of a stage's gate: of its task, and of its folder under the run's."""
    return f"gate_{stage}"


@dataclass(frozen=True)
class Bound:
    """What a metric of a stage must be."""

    stage: Stage
    metric: str
    sign: str
    number: float

    def allows(self, value: float) -> bool:
        return _SIGNS[self.sign](value, self.number)

    def __str__(self) -> str:
        return f"{self.metric} {self.sign} {self.number:g}"


def parse_bound(line: str) -> Bound:
    """Read `<stage>: <metric> <sign> <number>`; raises ValueError that says what is allowed."""
    found = _BOUND.fullmatch(line.strip())
    try:
        number = float(found["number"]) if found else math.nan
    except ValueError:
        number = math.nan
    if found is None or not math.isfinite(number):
        raise ValueError(
            f"{line!r} is no bound; write `<stage>: <metric> <sign> <number>` with >=, <=, > or <, such as "
            "'curate: curate/documents_kept >= 100'"
        )
    known = {stage.value: stage for stage in gated_stages()}
    if found["stage"] not in known:
        raise ValueError(f"{line!r}: {found['stage']} has no gate; allowed: {', '.join(known)}")
    return Bound(known[found["stage"]], found["metric"], found["sign"], number)


def parse_bounds(lines: Iterable[str]) -> tuple[Bound, ...]:
    return tuple(parse_bound(line) for line in lines)


class GatesConfig(Config):
    """What a run must show to go on after a stage."""

    bounds: tuple[str, ...] = (
        f"reward: {ACCURACY_LOW} > 0.5",
        f"reward: {BALANCED_LOW} > 0.5",
        f"gold: {ACCURACY_LOW} > 0.5",
    )
    """Bounds on metrics, one a line: `<stage>: <metric> <sign> <number>`, such as `curate: curate/documents_kept >=
    100`. Metrics are those of the stage's manifest, and of a reward model also those of its acceptance
    (docs/GATES.md). The list as a whole replaces the recipe's."""
    recompute: bool = True
    """Load each published model again and compare: in plain transformers, with what training measured, and for a
    reward model its acceptance. By the process that trained it, or in a short Ray job. Off, which takes the form's
    override_reason: only what manifests and histories tell."""
    max_pairs: int = Field(default=512, ge=2)
    """Held-out pairs that a reward model is accepted by."""
    earlier_margin: float = Field(default=0.02, ge=0, le=1)
    """Accuracy that a reward model may lose against the one that the run's start was trained with, on the same
    held-out pairs. Its gate is red where it lost more and the interval of the difference is below 0."""
    override: tuple[str, ...] = ()
    """Gates that a person lets pass though they fail: names of stages, or `all`; filled from the form."""
    reason: str = ""
    """Why, and why without `recompute`; filled from the form."""

    @field_validator("bounds")
    @classmethod
    def _are_bounds(cls, lines: tuple[str, ...]) -> tuple[str, ...]:
        parse_bounds(lines)
        return lines

    @model_validator(mode="after")
    def _overridden_for_a_reason(self) -> "GatesConfig":
        check_override(self.override, self.reason, recompute=self.recompute)
        return self

    def bounds_of(self, stage: Stage) -> tuple[str, ...]:
        return tuple(line for line in self.bounds if parse_bound(line).stage is stage)

    def overrides(self, stage: Stage) -> bool:
        return bool({ALL, stage.value} & set(self.override))


def check_override(gates: Iterable[str], reason: str, *, recompute: bool = True) -> None:
    """Raise ValueError for a gate that there is not, and for an override, or gates without their jobs, that nobody
    gives a reason for."""
    names, allowed = list(gates), [stage.value for stage in gated_stages()]
    if wrong := [name for name in names if name not in (ALL, *allowed)]:
        raise ValueError(f"override_gates={wrong[0]!r} is no gate; allowed: {', '.join(allowed)}, or {ALL}")
    if names and not reason.strip():
        raise ValueError(
            f"override_gates={names} needs override_reason, which is empty; say why these gates may be passed, it is "
            "kept with the run"
        )
    if not recompute and not reason.strip():
        raise ValueError(
            "gates.recompute=false leaves out reload, probes and the acceptance of reward models, and needs "
            "override_reason, which is empty; say why, it is kept with the run, or use gates.recompute=true"
        )
    if reason.strip() and not names and recompute:
        raise ValueError(
            f"override_reason={reason!r} without override_gates or gates.recompute=false; name the gates that it is "
            "about, or leave it empty"
        )


def closest(name: str, known: Mapping[str, float]) -> str:
    """What a misspelled metric may have meant, for an advice."""
    import difflib

    found = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"Did you mean {found[0]!r}?" if found else f"It has: {', '.join(sorted(known)) or 'none'}."
