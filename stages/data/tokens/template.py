"""Rendering a chat template, which is a program by whoever published the model: bounded, and on a fixed date.

Templates differ in what they take for a message. Which form a template wants is found by trying it, so that the rest of
the code has one kind of message: a role, a text, perhaps thinking, calls and tools.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from itertools import product
from typing import Any

from stages.config.errors import ConfigError, StageError
from stages.data.pairs.turns import Message, Unusable
from stages.data.tokens.bounded import Endless, bounded, computes_powers
from stages.data.tokens.shape import Form, Kind, Shaped, ThinkingForm, placeholders, shaped

ADVICE = "fix the template and give its text as tokenize.chat_template, or set that to 'plain'."
TODAY = datetime(2024, 7, 26)
"""The date in templates that show one, so that tokens are the same on every day. Llama's templates default to it."""
_MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")

PROBE: tuple[Message, ...] = (
    {"role": "user", "content": "first question"},
    {"role": "assistant", "content": "first answer"},
    {"role": "user", "content": "second question"},
    {"role": "assistant", "content": "second answer"},
)
_THINKING_PROBE: tuple[Message, ...] = (
    {"role": "user", "content": "question"},
    {"role": "assistant", "content": "<think>\nreasons\n</think>\n\nanswer"},
)
_ARGUMENTS = {"key": {"inside": True}}
_CALL = {"id": "call12345", "type": "function", "function": {"name": "lookup", "arguments": _ARGUMENTS}}
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "lookup",
            "description": "Look it up",
            "parameters": {"type": "object", "properties": {"key": {"type": "object"}}, "required": ["key"]},
        },
    }
]
_CALL_PROBE: tuple[Message, ...] = (
    {"role": "user", "content": "question"},
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {"role": "tool", "name": "lookup", "tool_call_id": "call12345", "content": "found"},
    {"role": "assistant", "content": "answer"},
)


@dataclass(frozen=True)
class Rendered:
    text: str
    marked: tuple[tuple[int, int], ...]
    """What {% generation %} markers enclose."""


class ChatTemplate:
    """A template's text with the special tokens that it may name; `form` says how it takes messages."""

    def __init__(self, text: str, special_tokens: Mapping[str, str], *, origin: str = "") -> None:
        self.text, self.name = text, f"the chat template of {origin}" if origin else "the chat template"
        self.dated = _dated(text) if "strftime_now" in text else text
        self._names: dict[str, Any] = {**special_tokens, "date_string": TODAY.strftime("%d %b %Y")}
        if computes_powers(text):
            raise ConfigError(f"{self.name} computes powers, which nothing limits", advice=ADVICE)

    @property
    def has_markers(self) -> bool:
        return bool(_MARKERS.search(self.text))

    @property
    def prints_the_date(self) -> bool:
        return "strftime_now" in self.text or "date_string" in self.text

    def render(
        self, conversation: Shaped, *, count: int | None = None, add_generation_prompt: bool = False
    ) -> Rendered:
        """Render the first `count` messages, or all; raises Unusable for what the template refuses."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            answer: Any = bounded(
                lambda: render_jinja_template(
                    conversations=[conversation.messages[:count]],
                    tools=conversation.tools,
                    chat_template=self.dated,
                    return_assistant_tokens_mask=self.has_markers,
                    add_generation_prompt=add_generation_prompt,
                    **self._names,
                )
            )
        except (Endless, RecursionError, MemoryError) as error:
            reason = str(error) or "it needs too much memory"
            raise ConfigError(f"{self.name} does not end: {reason}", advice=ADVICE) from error
        except StageError:  # SIGTERM's
            raise
        except Exception as error:
            raise Unusable("refused_by_template") from error
        (text,), marked = answer
        return Rendered(text, tuple(map(tuple, marked[0])) if marked else ())

    @cached_property
    def form(self) -> Form:
        """How this template takes contents, thinking, calls and their arguments: the first way that loses nothing."""
        plain = [Form(), Form(as_parts=True), Form(wants_tools=True)]
        # Templates of models that also see images may loop over the parts of a content; those of tool users over tools.
        form = next((form for form in plain if self._shows(PROBE, (), form, Kind.CONTENT)), plain[0])
        for thinking in (ThinkingForm.FIELD, ThinkingForm.INLINE):
            if self._shows(_THINKING_PROBE, (), form.with_thinking(thinking), Kind.THINKING):
                form = form.with_thinking(thinking)
                break
        for as_text, empty in product((False, True), ("", None)):
            tried = form.with_calls(arguments_as_text=as_text, empty=empty)
            if self._shows(_CALL_PROBE, _TOOLS, tried, Kind.CALL, Kind.CONTENT, never="{'inside'"):
                return tried
        return form

    def _shows(
        self, messages: Sequence[Message], tools: Sequence[Any], form: Form, *kinds: Kind, never: str = ""
    ) -> bool:
        """Whether all texts of these kinds appear; `never` is how Python writes what should have become JSON."""
        conversation = shaped(messages, tools, form)
        try:
            text = self.render(conversation).text
        except Unusable:
            return False
        found = {place.slot for place in placeholders(text)}
        wanted = {number for number, slot in enumerate(conversation.slots) if slot.kind in kinds}
        return wanted <= found and not (never and never in text)

    def samples(self) -> Iterator[str]:
        """What the template writes in all kinds of conversations that it can hold; the plain ones come first.

        Raises ConfigError for a template that cannot hold a question and an answer twice.
        """
        for messages, prompted in ((PROBE, False), (PROBE[:1], True)):
            try:
                yield self.render(shaped(messages, (), self.form), add_generation_prompt=prompted).text
            except Unusable as error:
                raise self.cannot_hold(error) from error
        # Inline, the marks of thinking are words of the text.
        thinking = [(_THINKING_PROBE, ())] if self.form.thinking is ThinkingForm.FIELD else []
        for messages, tools in (*thinking, (_CALL_PROBE, _TOOLS)):
            try:
                yield self.render(shaped(messages, tools, self.form)).text
            except Unusable:
                continue

    def cannot_hold(self, error: Unusable) -> ConfigError:
        why = f"{error.reason} ({error.__cause__})" if error.__cause__ else error.reason
        return ConfigError(f"{self.name} cannot hold a question and an answer twice: {why}", advice=ADVICE)


_DIRECTIVES = (
    *("%Y", "%y", "%m", "%-m", "%d", "%-d", "%e", "%B", "%b", "%h", "%A", "%a", "%H", "%-H", "%I", "%-I", "%M", "%S"),
    *("%p", "%j", "%F", "%D", "%T", "%R", "%x", "%X", "%c"),
)


def _dated(text: str) -> str:
    """The template with a `strftime_now` of its own, because transformers' knows only today.

    It takes the place of whatever the first line begins with, so spaces that Jinja would strip there are stripped here.
    """
    replaced = "".join(f"|replace({name!r}, {TODAY.strftime(name)!r})" for name in _DIRECTIVES)
    macro = "{% macro strftime_now(format) %}{{ format" + replaced + " }}{% endmacro %}{{ '' }}"
    return macro + re.sub(r"\A[ \t]+(?=\{%(?!\+))", "", text)
