"""A conversation as templates are given it: every text that people or models wrote is a numbered placeholder.

So a template sees the structure of a conversation and none of its texts: they cannot steer it, one rendering serves
all conversations of the same structure, and in the rendered text every message's place is known. Arguments of calls and
descriptions of tools are the exception: templates take them apart, so they are given as they are.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from functools import cached_property
from typing import Any

from stages.data.pairs.turns import Message, split_thinking
from stages.data.tokens.controls import RESERVED

_PLACEHOLDER = re.compile(f'(\u2003?){RESERVED}(\\d+)(\\\\?)"\ue001(\u2003?)')
"""The wide spaces are missing where the template trims; the quotation mark is escaped where it writes JSON."""


class Kind(Enum):
    """What a placeholder stands for."""

    CONTENT = auto()
    THINKING = auto()
    CALL = auto()
    """The name of a function that the assistant calls."""
    TOOL = auto()
    """The name of a function that the assistant may call."""


class ThinkingForm(Enum):
    """How a template takes what the assistant thought before it answered."""

    FIELD = auto()
    """In the field `reasoning_content`."""
    INLINE = auto()
    """At the begin of the content, between <think> and </think>."""
    NONE = auto()
    """Not at all."""


@dataclass(frozen=True)
class Form:
    """How a template takes messages."""

    as_parts: bool = False
    """Contents are lists of parts, never plain texts."""
    thinking: ThinkingForm = ThinkingForm.NONE
    arguments_as_text: bool = False
    """Arguments of calls are JSON text, as in OpenAI's interface, and not an object."""
    empty: str | None = ""
    """The content of a message that only calls."""
    wants_tools: bool = False
    """Where there are no tools, the template takes an empty list only."""

    def with_thinking(self, form: ThinkingForm) -> "Form":
        return replace(self, thinking=form)

    def with_calls(self, *, arguments_as_text: bool, empty: str | None) -> "Form":
        return replace(self, arguments_as_text=arguments_as_text, empty=empty)


@dataclass(frozen=True)
class Slot:
    """A text that is put in the place of its placeholder; `message` is the index of its message, -1 for a tool."""

    text: str
    kind: Kind
    message: int


@dataclass(frozen=True)
class Shaped:
    """Messages and tools with placeholders, and the texts that belong there."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    slots: tuple[Slot, ...]
    untold: int
    """How many turns have thinking that the template has no place for."""

    @cached_property
    def key(self) -> str:
        """Decides the rendering: conversations with the same key differ in their texts only."""
        return json.dumps([self.messages, self.tools], ensure_ascii=False)


@dataclass(frozen=True)
class Placeholder:
    """Where a placeholder is in a rendered text, and what the template does to what it stands for."""

    slot: int
    start: int
    stop: int
    is_trimmed: tuple[bool, bool]
    """At the text's begin, and at its end."""
    is_json: bool
    """Whether the template writes it inside a JSON string."""

    def filled(self, text: str) -> str:
        text = text.lstrip() if self.is_trimmed[0] else text
        text = text.rstrip() if self.is_trimmed[1] else text
        return json.dumps(text, ensure_ascii=False)[1:-1] if self.is_json else text


def placeholders(rendered: str) -> Iterator[Placeholder]:
    for match in _PLACEHOLDER.finditer(rendered):
        yield Placeholder(int(match[2]), match.start(), match.end(), (not match[1], not match[4]), bool(match[3]))


def after_last_placeholder(rendered: str) -> str:
    return rendered[rendered.rfind("\ue001") + 1 :].removeprefix("\u2003")


def shaped(messages: Sequence[Message], tools: Sequence[Any], form: Form) -> Shaped:
    """The conversation in the form that a template takes."""
    slots: list[Slot] = []
    untold = 0

    def place(text: str, kind: Kind, message: int) -> str:
        slots.append(Slot(text, kind, message))
        return f'\u2003{RESERVED}{len(slots) - 1}"\ue001\u2003'

    def content(text: str, message: int, before: str = "") -> Any:
        if not text and not before:
            return form.empty
        whole = before + (place(text, Kind.CONTENT, message) if text else "")
        return [{"type": "text", "text": whole}] if form.as_parts else whole

    described = [_renamed(tool, lambda name: place(name, Kind.TOOL, -1)) for tool in tools]
    given: list[dict[str, Any]] = []
    for number, message in enumerate(messages):
        shape: dict[str, Any] = {"role": message["role"]}
        thinking, text = (
            split_thinking(message["content"]) if message["role"] == "assistant" else ("", message["content"])
        )
        before = ""
        match form.thinking if thinking else None:
            case ThinkingForm.FIELD:
                shape["reasoning_content"] = place(thinking, Kind.THINKING, number)
            case ThinkingForm.INLINE:
                before = f"<think>\n{place(thinking, Kind.THINKING, number)}\n</think>\n\n"
            case ThinkingForm.NONE:
                untold += 1
            case None:
                pass
        shape["content"] = content(text, number, before)
        if calls := message.get("tool_calls"):
            shape["tool_calls"] = [
                _call(call, place(call["function"]["name"], Kind.CALL, number), form) for call in calls
            ]
        shape |= {name: message[name] for name in ("name", "tool_call_id") if name in message}
        given.append(shape)
    return Shaped(given, described or ([] if form.wants_tools else None), tuple(slots), untold)


def _renamed(tool: Any, rename: Any) -> Any:
    """A tool with another name: OpenAI's form has it inside `function`, others at the top."""
    if isinstance(tool.get("function"), Mapping):
        return {**tool, "function": _renamed(tool["function"], rename)}
    return {**tool, "name": rename(tool["name"])} if isinstance(tool.get("name"), str) else dict(tool)


def _call(call: Mapping[str, Any], name: str, form: Form) -> dict[str, Any]:
    arguments = call["function"]["arguments"]
    if form.arguments_as_text:
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {"name": name, "arguments": arguments}}


def given_as_it_is(messages: Sequence[Message], tools: Sequence[Any]) -> str:
    """Every text of a conversation that a template is given as it is, as JSON; empty where there is none."""
    parts: list[Any] = [*tools]
    for message in messages:
        parts += [
            {**call, "function": {"arguments": call["function"]["arguments"]}} for call in message.get("tool_calls", ())
        ]
        parts += [message[name] for name in ("name", "tool_call_id") if name in message]
    return json.dumps(parts, ensure_ascii=False) if parts else ""
