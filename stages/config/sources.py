"""A source as it is written in the form: where the data is and, after `#`, how to read it and how much it counts.

`s3://bucket/dolly.jsonl#format=dolly&weight=0.3`. Only a tail that begins with `#name=` is read as options, so that
other `#` in names of files and keys stay what they are.
"""

import difflib
import math
import re
from collections.abc import Collection, Iterable
from enum import StrEnum
from typing import Any

from pydantic import Field

from stages.config.base import Config
from stages.config.principles import Area

_OPTIONS = re.compile(r"#((?:\w+=[^#&]*)(?:&\w+=[^#&]*)*)$")
_KNOWN = ("format", "weight", "first", "second", "area", "margin")
DERIVED = "derived"
"""The source of pairs that are made from the documents."""
RATINGS = "ratings"
"""The `margin` of a source whose rows rate both responses, in whatever fields their format has for it."""


class InstructionFormat(StrEnum):
    """Formats of instruction rows; docs/DATA.md says by which fields each is detected."""

    MESSAGES = "messages"
    SHAREGPT = "sharegpt"
    OASST = "oasst"
    OASST_TREE = "oasst_tree"
    ALPACA = "alpaca"
    DOLLY = "dolly"
    INSTRUCTION = "instruction"
    FLAN = "flan"
    PROMPT = "prompt"
    INSTANCES = "instances"
    TURNS = "turns"


class PreferenceFormat(StrEnum):
    """Formats of preference rows; docs/DATA.md says by which fields each is detected."""

    PAIR = "pair"
    TRANSCRIPTS = "transcripts"
    DIALOGUES = "dialogues"
    RANKED = "ranked"
    PAIRWISE = "pairwise"
    LABELLED = "labelled"
    UNPAIRED = "unpaired"
    """The same rows as `labelled`, kept as single responses; never detected, only named."""


class PromptFormat(StrEnum):
    """Formats of prompt rows; docs/DATA.md says by which fields each is detected."""

    GSM8K = "gsm8k"
    ROWS = "rows"


class Source(Config):
    """One line of `instructions`, `preferences` or `prompts`, parsed."""

    uri: str
    """Where the data is, without options; this names the source in every account."""
    format: str = ""
    """Format of the rows; empty = detected from the fields."""
    weight: float | None = None
    """Share of training, relative to the other weights; None = by size."""
    first: str = ""
    """What a label of two responses says when the first is better; empty = understood from the labels."""
    second: str = ""
    """The same for the second response."""
    area: str = ""
    """Joined by `+`. Of prompts: the areas of the principles by which they are treated; empty = all. Of preferences:
    what the better response is better in, as if the rater of every row had said so."""
    margin: str = ""
    """Where a pair's margin is: `ratings` = how much better the chosen response is rated; else a field of the row that
    says how much better it is. Empty = pairs have none."""

    @property
    def is_unpaired(self) -> bool:
        """Whether its rows are single labelled responses, which only the loss `kto` trains on."""
        return self.format == PreferenceFormat.UNPAIRED

    def __str__(self) -> str:
        """As it is written, without the weight."""
        options = {name: getattr(self, name) for name in ("format", "first", "second", "area", "margin")}
        tail = "&".join(f"{name}={value}" for name, value in options.items() if value)
        return f"{self.uri}#{tail}" if tail else self.uri


class SourceWeight(Config):
    """How much of training one source gets."""

    source: str
    """The source, as under instructions or preferences, without its options."""
    weight: float = Field(gt=0)
    """Its share: of 1, or relative to the others when every source has one."""


def parse_source(text: str) -> Source:
    """Parse one line; raises ValueError for an unknown option or an invalid weight."""
    found = _OPTIONS.search(text)
    if not found:
        return Source(uri=text)
    options = dict(part.split("=", 1) for part in found[1].split("&"))
    for name in options:
        if name not in _KNOWN:
            close = difflib.get_close_matches(name, _KNOWN, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(_KNOWN)}"
            raise ValueError(f"source {text!r} has an unknown option {name!r}; {hint}")
    first, second = options.get("first", ""), options.get("second", "")
    if ("first" in options or "second" in options) and (not first or not second or first == second):
        raise ValueError(
            f"source {text!r} needs both first= and second=, two different labels, such as first=1&second=0"
        )
    if "margin" in options and not options["margin"]:
        raise ValueError(
            f"source {text!r} has an empty margin=; use margin={RATINGS}, or the field that says how much better the "
            "chosen response is"
        )
    return Source(
        uri=text[: found.start()],
        format=options.get("format", ""),
        first=first,
        second=second,
        area=options.get("area", ""),
        margin=options.get("margin", ""),
        weight=_weight(text, options["weight"]) if "weight" in options else None,
    )


def _weight(text: str, value: str) -> float:
    try:
        weight = float(value)
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight > 0):
        raise ValueError(f"source {text!r} has weight={value!r}; it must be a number above 0, such as weight=0.3")
    return weight


def parse_sources(field: str, lines: Iterable[str], formats: type[StrEnum] | None) -> tuple[Source, ...]:
    """Parse all lines of a field; raises ValueError also for an unknown format and for a repeated source. Prompts, of
    whatever form, have no `formats`."""
    sources = tuple(parse_source(line) for line in lines)
    for source in sources:
        if formats is None:
            _refuse_options_of_answers(field, source)
            continue
        if source.area and (formats is not PreferenceFormat or source.uri == DERIVED):
            raise ValueError(
                f"{field}: area={source.area!r} of {source.uri!r} is for given preferences and the prompts of a "
                "constitution"
            )
        check_areas(field, source, [area.value for area in Area])
        if source.format and source.format not in list(formats):
            allowed = ", ".join(formats)
            raise ValueError(f"{field}: format={source.format!r} of {source.uri!r} is not one of {allowed}")
        if source.first and formats is not PreferenceFormat:
            raise ValueError(f"{field}: first= and second= of {source.uri!r} say which response a label prefers")
        if source.margin and formats is not PreferenceFormat:
            raise ValueError(f"{field}: margin= of {source.uri!r} says how much better a chosen response is")
        if source.first and source.is_unpaired:
            raise ValueError(
                f"{field}: {source.uri!r} has format=unpaired, where a label is of one response; drop first= and "
                "second="
            )
    uris = [source.uri for source in sources]
    if repeated := sorted({uri for uri in uris if uris.count(uri) > 1}):
        raise ValueError(
            f"{field}: {repeated} appear twice; give each source once, its weight says how often it counts"
        )
    return sources


def _refuse_options_of_answers(field: str, source: Source) -> None:
    if source.format or source.first or source.weight is not None:
        raise ValueError(
            f"{field}: {source.uri!r} has an option that prompts do not have; allowed is #area=, such as "
            f"{source.uri}#area=harmless"
        )


def check_areas(field: str, source: Source, allowed: Collection[str]) -> None:
    """Raise ValueError for an area that there is not, or that is named twice."""
    named = source.area.split("+") if source.area else []
    if wrong := [name for name in named if name not in allowed]:
        raise ValueError(
            f"{field}: area={wrong[0]!r} of {source.uri!r} is not one of {', '.join(allowed)}; several are joined by "
            "'+', as in #area=helpful+honest"
        )
    if len(set(named)) < len(named):
        raise ValueError(f"{field}: area={source.area!r} of {source.uri!r} names an area twice")


def take_weights(field: str, lines: Any) -> tuple[list[Any], list[SourceWeight]]:
    """Split the lines of a field into lines without weights and the weights.

    Curation does not depend on weights, so it is not done again when they change; training reads them.
    """
    if not isinstance(lines, list | tuple):
        raise ValueError(f"{field}={lines!r} is not a list of sources")
    bare: list[Any] = []
    weights: list[SourceWeight] = []
    for line in lines:
        source = parse_source(line) if isinstance(line, str) else None
        bare.append(line if source is None else str(source))
        if source is not None and source.weight is not None:
            weights.append(SourceWeight(source=source.uri, weight=source.weight))
    if weights and len(weights) < len(bare) and sum(entry.weight for entry in weights) >= 1:
        shown = ", ".join(f"{entry.source}={entry.weight:g}" for entry in weights)
        raise ValueError(
            f"{field}: {shown} leave nothing for the sources without a weight; give each a weight, or weights below 1"
        )
    return bare, weights
