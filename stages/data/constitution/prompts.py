"""The prompts that a constitution is applied to: what stands before the last response of a row, or all of a bare one.

Each prompt is used once, whatever source and row it comes from. What is left out is counted with its reason.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from stages.config.constitution import ConstitutionConfig
from stages.config.errors import DataError
from stages.config.principles import Area
from stages.config.sources import Source
from stages.data.pairs.build import fair_shares
from stages.data.pairs.cells import unpacked
from stages.data.pairs.shapes import is_empty
from stages.data.pairs.sides import Side, asked_of, side_of, transcript_of
from stages.data.pairs.turns import Message, Unusable, as_conversation, read_turns, with_system
from stages.data.sources.hub import read_hub
from stages.data.sources.readers import data_files
from stages.data.sources.records import BadRecord, Row, stable_hash
from stages.data.sources.rows import read_rows
from stages.data.sources.storage import ROW_SUFFIXES

_TURNS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat")
_SIDES = ("chosen", "rejected")
_FIELDS = (("role", "content"), ("from", "value"))


@dataclass(frozen=True)
class Prompt:
    """Turns that end with the user's, and the areas whose principles apply."""

    id: str
    messages: tuple[Message, ...]
    areas: frozenset[Area]
    source: str

    @property
    def text(self) -> str:
        """The last turn, to which the model responds."""
        return self.messages[-1]["content"]

    @property
    def may_be_refused(self) -> bool:
        """Whether harmlessness is at stake: of a prompt for any principle, that is not known."""
        return Area.HARMLESS in self.areas

    @property
    def is_labelled(self) -> bool:
        return self.areas != frozenset(Area)


@dataclass
class PromptsAccount:
    """in = kept + dropped by reason."""

    entered: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def to_dict(self, kept: int) -> dict[str, Any]:
        if self.entered != kept + self.dropped.total():
            raise AssertionError(f"the ledger of prompts does not conserve: {self}, kept {kept}")
        return {"in": self.entered, "kept": kept, "dropped": dict(sorted(self.dropped.items()))}


def read_prompts(config: ConstitutionConfig, account: PromptsAccount) -> list[Prompt]:
    """Return the prompts to use, in the order of their draw; raises DataError when there is none."""
    found: dict[str, Prompt] = {}
    for source in config.prompt_sources:
        for row in _rows(source):
            account.entered += 1
            if isinstance(row, BadRecord):
                account.dropped[row.reason] += 1
                continue
            try:
                prompt = _prompt(row, source, config.areas_of(source))
            except Unusable as error:
                account.dropped[error.reason] += 1
                continue
            if prompt.id in found:
                account.dropped["duplicate"] += 1
            else:
                found[prompt.id] = prompt
    if not found:
        raise DataError(
            f"constitution_prompts={list(config.prompts)} hold no prompt; dropped: {dict(account.dropped)}",
            advice="Give rows with a prompt, messages or a pair; docs/CONSTITUTION.md lists what is read.",
        )
    drawn = sorted(found.values(), key=lambda prompt: stable_hash(config.seed, "prompt", prompt.id))
    left = fair_shares(Counter(prompt.source for prompt in drawn), config.num_prompts)
    kept: list[Prompt] = []
    for prompt in drawn:
        left[prompt.source] -= 1
        if left[prompt.source] >= 0:
            kept.append(prompt)
    account.dropped["over_num_prompts"] += len(drawn) - len(kept)
    account.dropped = +account.dropped
    return kept


def prompt_of(values: Mapping[str, Any]) -> tuple[Message, ...]:
    """The turns of a row up to the last one of the user; raises Unusable for a row without."""
    turns = _turns_of(values)
    while turns and turns[-1]["role"] != "user":
        turns.pop()
    if not turns or not turns[-1]["content"].strip():
        raise Unusable("no_prompt")
    # With some response, it must be a conversation: turns that alternate, and nothing that cannot be trained on.
    return as_conversation([*turns, {"role": "assistant", "content": "-"}]).messages[:-1]


def _turns_of(values: Mapping[str, Any]) -> list[Message]:
    for name in _TURNS:
        turns = values.get(name)
        first = turns[0] if isinstance(turns, list) and turns else None
        if isinstance(first, Mapping):
            for role, text in _FIELDS:
                if first.keys() >= {role, text}:
                    return with_system(read_turns(turns, role=role, text=text), values)
    if asked := asked_of(values):
        return with_system(asked, values)
    side = next((values[name] for name in _SIDES if not is_empty(values.get(name))), None)
    if side is None:
        raise Unusable("no_prompt")
    found: Side = transcript_of(side) if isinstance(side, str) else side_of(side)
    return with_system(list(found.before), values)


def _prompt(row: Row, source: Source, areas: frozenset[Area]) -> Prompt:
    messages = prompt_of(row.values)
    told = json.dumps(messages, sort_keys=True, ensure_ascii=False)
    try:
        told.encode()
    except UnicodeEncodeError:
        raise Unusable("invalid_utf8") from None
    if any(message.get("tool_calls") or message["role"] == "tool" for message in messages):
        raise Unusable("prompt_with_tools")
    return Prompt(f"{stable_hash('prompt', told):016x}", messages, areas, source.uri)


def _rows(source: Source) -> Iterator[Row | BadRecord]:
    if source.uri.startswith("hf://"):
        rows = read_hub(source.uri)
    else:
        rows = (row for stored in data_files(source.uri, ROW_SUFFIXES).files for row in read_rows(stored))
    for row in rows:
        yield row if isinstance(row, BadRecord) else Row(row.number, unpacked(row.values), row.size)
