"""Conversations as lists of {role, content}, and the rules that make one trainable; every rule has a name.

Every assistant turn is trained, so every one needs a text and a question before it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, str]

ROLES: Mapping[str, str] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
}
"""The names that OpenAI, ShareGPT, OpenAssistant and Gemma data use, and the role that each means."""
_TOOL_ROLES = frozenset({"tool", "function", "function_call", "observation", "ipython", "tool_call", "tool_response"})


class Unusable(Exception):
    """A row that cannot be trained on; `reason` is what the ledger counts."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Conversation:
    """Messages that begin with an optional system message, alternate, and end with the assistant."""

    messages: tuple[Message, ...]
    changes: tuple[str, ...] = ()
    """Names of what was left out."""


def read_turns(turns: object, *, role: str, text: str) -> list[Message]:
    """Turns with the fields `role` and `text` as messages; raises Unusable for one that is not text of a known role."""
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise Unusable("no_turns")
    return [_message(turn, role, text) for turn in turns]


def _message(turn: object, role_field: str, text_field: str) -> Message:
    if not isinstance(turn, Mapping) or not isinstance(turn.get(role_field), str):
        raise Unusable("malformed_turn")
    name = turn[role_field].strip().lower()
    if name in _TOOL_ROLES:
        raise Unusable("tool_role")
    if name not in ROLES:
        raise Unusable("unknown_role")
    if turn.get("tool_calls") or turn.get("function_call"):
        raise Unusable("tool_call")
    # OpenAI excludes a turn from training like this; here every assistant turn is trained, and no other turn is.
    if ROLES[name] == "assistant" and turn.get("weight") == 0:
        raise Unusable("untrained_turn")
    return {"role": ROLES[name], "content": plain_text(turn.get(text_field))}


def plain_text(content: object) -> str:
    """A text without the white space around it, or OpenAI's list of text parts joined; None is the empty text.

    Raises Unusable for anything else.
    """
    if content is None:
        return ""
    if isinstance(content, Sequence) and not isinstance(content, str):
        found = [part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") == "text"]
        parts = [text for text in found if isinstance(text, str)]
        if len(parts) < len(content):
            raise Unusable("not_text")
        content = "".join(parts)
    if not isinstance(content, str):
        raise Unusable("not_text")
    return content.strip()


def with_system(messages: list[Message], values: Mapping[str, Any]) -> list[Message]:
    """Put a row's own `system` or `system_prompt` in front; where the messages begin with another one, both become
    one."""
    system = plain_text(values.get("system")) or plain_text(values.get("system_prompt"))
    if not system:
        return messages
    if messages and messages[0]["role"] == "system":
        own, *messages = messages
        # The same text twice is one system message, which some data sets write into the row and into the turns.
        system = "\n\n".join(dict.fromkeys(text for text in (system, own["content"]) if text))
    return [{"role": "system", "content": system}, *messages]


def as_conversation(messages: Sequence[Message]) -> Conversation:
    """Messages as a conversation, without a blank system message and without an unanswered last question.

    Raises Unusable with the rule that they break.
    """
    changes: list[str] = []
    turns = list(messages)
    if turns and turns[0]["role"] == "system" and not turns[0]["content"].strip():
        turns = turns[1:]
        changes.append("blank_system_message")
    head = 1 if turns and turns[0]["role"] == "system" else 0
    roles = [turn["role"] for turn in turns[head:]]
    if not roles:
        raise Unusable("no_turns")
    if "system" in roles:
        raise Unusable("system_not_first")
    if "assistant" not in roles:
        raise Unusable("no_assistant_turn")
    if roles[0] == "assistant":
        raise Unusable("starts_with_assistant")
    if any(role != ("user", "assistant")[place % 2] for place, role in enumerate(roles)):
        raise Unusable("wrong_alternation")
    if roles[-1] == "user":
        turns = turns[:-1]
        changes.append("unanswered_last_turn")
    for turn in turns[head:]:
        if not turn["content"].strip():
            raise Unusable("empty_prompt" if turn["role"] == "user" else "empty_response")
    return Conversation(tuple(turns), tuple(changes))


def opening(messages: Sequence[Mapping[str, str]]) -> str:
    """The first question, so that conversations that start alike are held out together."""
    return next((turn["content"] for turn in messages if turn["role"] == "user"), "")
