"""Examples of data that models have made, drawn for people to read: what was accepted, with what it was made from.

The draw depends on the content of the artifact alone, so review and report can show the same examples again.
"""

import random
from dataclasses import dataclass
from typing import Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from stages.artifacts.manifests import read_file, read_manifest
from stages.config.base import Config
from stages.config.errors import DataError
from stages.config.graph import Stage
from stages.config.records import first_error
from stages.config.request import ArtifactRef

_LARGEST = 256 << 20
"""Bytes of a file that is read whole into memory."""
_ACCEPTED = "accepted"
_PREFERRED = ("first", "second")


class _Shape(Config):
    """Fields that are not named are left alone."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=True)


class _Turn(_Shape):
    role: str
    content: str


class _Round(_Shape):
    principle: str
    area: str
    critique: str
    revision: str
    outcome: str


class _Comparison(_Shape):
    principle: str
    area: str
    second: str
    outcome: str


class _Prompted(_Shape):
    """A line of `transcript.jsonl` of `constitution`."""

    messages: tuple[_Turn, ...] = Field(min_length=1)
    response: str
    rounds: tuple[_Round, ...] = ()
    comparison: _Comparison | None = None


class _Provenance(_Shape):
    score: float | None = None


class _Row(_Shape):
    """A line of `instructions.jsonl` of `synthesize`."""

    messages: tuple[_Turn, ...] = Field(min_length=2)
    provenance: _Provenance = _Provenance()


@dataclass(frozen=True)
class MadeSample:
    """One example: names and texts, in the order of reading."""

    texts: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Drawn:
    """Examples out of all accepted ones."""

    samples: tuple[MadeSample, ...]
    total: int
    left_out: str = ""
    """Why there are none, where there are none."""


def draw_samples(ref: ArtifactRef, stage: Stage, *, number: int) -> Drawn:
    """Draw accepted examples, in the order of the file. Raises DataError for a file that is not as the stage writes
    it."""
    match stage:
        case Stage.CONSTITUTION:
            name, shape, told = "transcript.jsonl", TypeAdapter[Any](_Prompted), _prompted
        case Stage.SYNTHESIZE:
            name, shape, told = "instructions.jsonl", TypeAdapter[Any](_Row), _written
        case _:
            raise AssertionError(f"{stage} makes no data")
    size = next((entry.size for entry in read_manifest(ref).files if entry.path == name), None)
    if size is None:
        return Drawn((), 0, f"there is no {name}")
    if size > _LARGEST:
        return Drawn((), 0, f"{name} has more than {_LARGEST >> 20} MiB")
    found = [told(_parsed(line, shape, f"{ref.uri}/{name}")) for line in read_file(ref, name).splitlines()]
    accepted = [one for one in found if one is not None]
    places = sorted(random.Random(ref.digest).sample(range(len(accepted)), min(number, len(accepted))))
    return Drawn(tuple(accepted[place] for place in places), len(accepted))


def _parsed(line: bytes, shape: TypeAdapter[Any], where: str) -> Any:
    try:
        return shape.validate_json(line)
    except ValidationError as error:
        raise DataError(
            f"{where} is not as its stage writes it: {first_error(error)}",
            advice="Remove the artifact and clear the task of its stage to build it again.",
        ) from None


def _prompted(one: _Prompted) -> MadeSample | None:
    """Critiques and revisions that were accepted, and a comparison with a result; None where there is neither."""
    rounds = [each for each in one.rounds if each.outcome == _ACCEPTED]
    compared = one.comparison if one.comparison and one.comparison.outcome in _PREFERRED else None
    if not rounds and not compared:
        return None
    texts = [*_turns(one.messages), ("Response", one.response)]
    for each in rounds:
        texts += [(f"Critique by {each.principle} ({each.area})", each.critique), ("Revision", each.revision)]
    if compared:
        better = "better" if compared.outcome == "second" else "worse"
        principle = f"{compared.principle} ({compared.area})"
        texts.append((f"Second response, {better} than the first by {principle}", compared.second))
    return MadeSample(tuple(texts))


def _written(one: _Row) -> MadeSample:
    *prompt, response = one.messages
    score = one.provenance.score
    name = "Response" if score is None else f"Response, score {score:.3g}"
    return MadeSample((*_turns(prompt, last="Instruction"), (name, response.content)))


def _turns(messages: Any, last: str = "Prompt") -> list[tuple[str, str]]:
    names = [*(turn.role.capitalize() for turn in messages[:-1]), last]
    return [(name, turn.content) for name, turn in zip(names, messages, strict=True)]
