"""Rows of prompts without answers: what a policy is asked in reinforcement learning, and what judges its responses."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stages.config.sources import PromptFormat
from stages.data.pairs.shapes import is_empty
from stages.data.pairs.turns import Message, Unusable, as_conversation, plain_text, read_turns, with_system
from stages.rules.schema import problem_of

_MARK = "####"
"""Before the final number of an answer of GSM8K."""
_REFERENCES = ("reference", "references", "answer")


@dataclass(frozen=True)
class PromptRow:
    """A prompt, and whatever its row brings to judge responses by."""

    messages: tuple[Message, ...]
    """They end with the user."""
    reference: tuple[str, ...]
    """Expected answers; one of them is enough."""
    tests: tuple[str, ...]
    schema: str

    def to_dict(self) -> dict[str, Any]:
        """As it is published: what the row does not have is empty."""
        return {
            "messages": [dict(message) for message in self.messages],
            "reference": list(self.reference),
            "tests": list(self.tests),
            "schema": self.schema,
        }


def fits(shape: PromptFormat, values: Mapping[str, Any]) -> bool:
    """Whether a row says what this format needs."""
    match shape:
        case PromptFormat.GSM8K:
            answer = values.get("answer")
            return isinstance(values.get("question"), str) and isinstance(answer, str) and _MARK in answer
        case PromptFormat.ROWS:
            return not all(is_empty(values.get(name)) for name in ("prompt", "messages"))


def fitting_formats(values: Mapping[str, Any], *, by_name: bool = True) -> list[PromptFormat]:
    """Every format that a row fits; empty fields count as fields only `by_name`."""
    found = [shape for shape in PromptFormat if fits(shape, values)]
    named = values.keys() & {"prompt", "messages"} if by_name and not found else ()
    return [PromptFormat.ROWS] if named else found


def to_prompt(shape: PromptFormat, values: Mapping[str, Any]) -> PromptRow:
    """The row as a prompt; raises Unusable with the reason why it cannot be one."""
    match shape:
        case PromptFormat.GSM8K:
            question, answer = plain_text(values.get("question")), plain_text(values.get("answer"))
            number = answer.rpartition(_MARK)[2].strip()
            if not number:
                raise Unusable("empty_reference")
            return PromptRow(_ending_with_user(_asked(question)), (number,), (), "")
        case PromptFormat.ROWS:
            given = values.get("prompt") if is_empty(values.get("messages")) else values["messages"]
            turns = _asked(given) if isinstance(given, str) else read_turns(given, role="role", text="content")
            return PromptRow(
                _ending_with_user(with_system(turns, values)),
                next((texts for name in _REFERENCES if (texts := _texts(values.get(name), "malformed_reference"))), ()),
                _texts(values.get("tests"), "malformed_tests"),
                _schema(values.get("schema")),
            )


def _asked(question: str) -> list[Message]:
    return [{"role": "user", "content": question.strip()}]


def _ending_with_user(messages: list[Message]) -> tuple[Message, ...]:
    """A conversation by the rules of all conversations, up to a question of the user."""
    if not messages or messages[-1]["role"] != "user":
        raise Unusable("ends_without_question")
    return as_conversation([*messages, {"role": "assistant", "content": "?"}]).messages[:-1]


def _texts(given: Any, reason: str) -> tuple[str, ...]:
    """A text or a number, or a list of them; empty for what says nothing."""
    if is_empty(given):
        return ()
    texts = []
    for one in given if isinstance(given, list | tuple) else [given]:
        if isinstance(one, bool) or not isinstance(one, str | int | float):
            raise Unusable(reason)
        texts.append(one if isinstance(one, str) else json.dumps(one))
    return tuple(text for text in texts if text.strip())


def _schema(given: Any) -> str:
    if is_empty(given):
        return ""
    text = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    if problem_of(text):
        raise Unusable("invalid_schema")
    return text
