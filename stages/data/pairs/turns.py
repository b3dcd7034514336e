"""Conversations as lists of messages, and the rules that make one trainable; every rule has a name.

A message has `role` and `content`. An assistant's may have `tool_calls`, `[{"type": "function", "function": {"name",
"arguments"}}]` with the arguments as an object, and `weight: 0` where it is not to be trained; a tool's answer may have
`name` and `tool_call_id`. What the assistant thought stands at the begin of its content, `<think>...</think>`, in
whatever field it was given: so everything that looks at texts also sees it.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

Message = dict[str, Any]

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
_TOOL_ANSWERS = frozenset({"tool", "function", "observation", "ipython", "tool_response"})
_TOOL_CALLS = frozenset({"function_call", "tool_call"})
"""Roles of turns whose text is a call, as JSON."""
_THINKING_FIELDS = ("reasoning_content", "reasoning", "thinking")
_THINKING = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)


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
    if name in _TOOL_CALLS:
        return {"role": "assistant", "content": "", "tool_calls": _calls(turn.get(text_field))}
    if name in _TOOL_ANSWERS:
        return _tool_answer(turn, text_field)
    if name not in ROLES:
        raise Unusable("unknown_role")
    message: Message = {"role": ROLES[name], "content": plain_text(turn.get(text_field))}
    if ROLES[name] != "assistant":
        return message
    given = [turn[field] for field in _THINKING_FIELDS if isinstance(turn.get(field), str)]
    thinking = next((text.strip() for text in [*given, _thinking_parts(turn.get(text_field))] if text.strip()), "")
    if thinking and not split_thinking(message["content"])[0]:
        message["content"] = f"<think>\n{thinking}\n</think>\n\n{message['content']}".strip()
    calls = turn.get("tool_calls") or turn.get("function_call")
    if calls:
        message["tool_calls"] = _calls(calls)
    # OpenAI's: whether a turn is to be trained. Only the assistant's turns are, so elsewhere it says nothing.
    if turn.get("weight") == 0:
        message["weight"] = 0
    return message


def _tool_answer(turn: Mapping[str, Any], text_field: str) -> Message:
    content = turn.get(text_field)
    if isinstance(content, Mapping):  # some data sets keep the answer as an object
        content = json.dumps(content, ensure_ascii=False)
    names = {
        field: turn[field] for field in ("name", "tool_call_id") if isinstance(turn.get(field), str) and turn[field]
    }
    return {"role": "tool", "content": plain_text(content), **names}


def _calls(given: object) -> list[dict[str, Any]]:
    """Calls in one shape: of OpenAI's list, one call alone, or its JSON."""
    given = _from_json(given)
    calls = given if isinstance(given, list) else [given]
    if not calls:
        raise Unusable("malformed_tool_call")
    return [_call(call) for call in calls]


def _call(given: object) -> dict[str, Any]:
    given = _from_json(given)
    if not isinstance(given, Mapping):
        raise Unusable("malformed_tool_call")
    function = given["function"] if isinstance(given.get("function"), Mapping) else given
    name, arguments = function.get("name"), _from_json(function.get("arguments", function.get("parameters")) or {})
    if not isinstance(name, str) or not name.strip() or not isinstance(arguments, Mapping):
        raise Unusable("malformed_tool_call")
    number = {"id": given["id"]} if isinstance(given.get("id"), str) and given["id"] else {}
    return {**number, "type": "function", "function": {"name": name.strip(), "arguments": _without_nulls(arguments)}}


def read_tools(given: object) -> list[dict[str, Any]]:
    """The functions that a conversation may call, of a row's `tools`: a list of descriptions, or its JSON.

    Raises Unusable for anything else.
    """
    given = _from_json(given)
    if not given:
        return []
    tools = [_from_json(tool) for tool in given] if isinstance(given, list) else []
    made = [_without_nulls(tool) for tool in tools if isinstance(tool, Mapping)]
    if len(made) < len(tools) or not made or not all(_tool_name(tool) for tool in made):
        raise Unusable("malformed_tools")
    return made


def tools_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """A row's `tools`, under that name, as far as it has some."""
    tools = read_tools(values.get("tools"))
    return {"tools": tools} if tools else {}


def _tool_name(tool: Mapping[str, Any]) -> str:
    inner = tool.get("function", tool)
    name = inner.get("name") if isinstance(inner, Mapping) else None
    return name if isinstance(name, str) else ""


def _from_json(given: object) -> object:
    if not isinstance(given, str):
        return given
    try:
        return json.loads(given)
    except (ValueError, RecursionError):
        return given


def _without_nulls(value: Any) -> Any:
    """Tables give every object the keys of all, empty where they do not belong."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list | tuple) else value


def split_thinking(content: str) -> tuple[str, str]:
    """What the assistant thought, as far as its text begins with <think>...</think>, and the rest of the text."""
    found = _THINKING.match(content)
    if not found or not found[1].strip():
        return "", content[found.end() :] if found else content
    return found[1].strip(), content[found.end() :]


def _thinking_parts(content: object) -> str:
    """The parts of a content that are thinking, as some interfaces give it."""
    parts = content if isinstance(content, Sequence) and not isinstance(content, str) else ()
    texts = [part.get(part["type"]) for part in parts if isinstance(part, Mapping) and _is_thinking(part)]
    return "\n\n".join(text for text in texts if isinstance(text, str))


def _is_thinking(part: Mapping[str, Any]) -> bool:
    return part.get("type") in ("thinking", "reasoning")


def plain_text(content: object) -> str:
    """A text without the white space around it, or OpenAI's list of text parts joined; None is the empty text.

    Raises Unusable for anything else.
    """
    if content is None:
        return ""
    if isinstance(content, Sequence) and not isinstance(content, str):
        told = [part for part in content if not (isinstance(part, Mapping) and _is_thinking(part))]
        found = [part.get("text") for part in told if isinstance(part, Mapping) and part.get("type") == "text"]
        parts = [text for text in found if isinstance(text, str)]
        if len(parts) < len(told):
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
    """Messages as a conversation, without a blank system message and without what no assistant answered at the end.

    Raises Unusable with the rule that they break.
    """
    changes: list[str] = []
    turns = list(messages)
    if turns and turns[0]["role"] == "system" and not turns[0]["content"].strip():
        turns = turns[1:]
        changes.append("blank_system_message")
    head = 1 if turns and turns[0]["role"] == "system" else 0
    _require_order(turns[head:])
    while turns[-1]["role"] != "assistant":
        turns.pop()
        if "unanswered_last_turn" not in changes:
            changes.append("unanswered_last_turn")
    for turn in turns[head:]:
        if not turn["content"].strip() and not turn.get("tool_calls") and turn["role"] != "tool":
            raise Unusable("empty_prompt" if turn["role"] == "user" else "empty_response")
    return Conversation(tuple(turns), tuple(changes))


_FOLLOWS: Mapping[str, frozenset[str]] = {
    "user": frozenset({"assistant", "call"}),
    "assistant": frozenset({"user"}),
    "call": frozenset({"tool"}),
    "tool": frozenset({"tool", "assistant", "call"}),
}
"""Which turns may come after which; a `call` is an assistant's turn with calls."""


def _require_order(turns: Sequence[Message]) -> None:
    """User and assistant alternate; what tools answered stands between a call and the assistant's next turn."""
    roles = [turn["role"] for turn in turns]
    if not roles:
        raise Unusable("no_turns")
    if "system" in roles:
        raise Unusable("system_not_first")
    if "assistant" not in roles:
        raise Unusable("no_assistant_turn")
    kinds = ["call" if turn.get("tool_calls") else turn["role"] for turn in turns]
    if roles[0] == "assistant":
        raise Unusable("starts_with_assistant")
    if "tool" in kinds and kinds.index("tool") < (kinds.index("call") if "call" in kinds else len(kinds)):
        raise Unusable("tool_answer_without_call")
    for before, after in pairwise(kinds):
        if after not in _FOLLOWS[before]:
            raise Unusable("call_without_answer" if before == "call" else "wrong_alternation")
    if roles[0] != "user":
        raise Unusable("wrong_alternation")


def opening(messages: Sequence[Mapping[str, Any]]) -> str:
    """The first question, so that conversations that start alike are held out together."""
    return next((turn["content"] for turn in messages if turn["role"] == "user"), "")


def text_fields(message: Message) -> Iterator[tuple[Any, Any]]:
    """Every text of a message as (holder, key), so that it can be replaced: its content and the texts in its calls'
    arguments."""
    yield message, "content"
    for call in message.get("tool_calls", ()):
        yield from _text_leaves(call["function"]["arguments"])


def _text_leaves(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        if isinstance(item, str):
            yield value, key
        else:
            yield from _text_leaves(item)


def trained_turns(messages: Sequence[Message], rule: str) -> set[int]:
    """The assistant's messages that are trained, by the rule `all`, `last` or `weight`.

    Raises Unusable where the row's own weights leave nothing, or forbid what the rule would train.
    """
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    wanted = {number for number in answers if messages[number].get("weight") != 0}
    chosen = set(answers[-1:] if rule == "last" else answers)
    if rule == "weight":
        chosen = wanted
    if not chosen or not chosen <= wanted:
        raise Unusable("untrained_turn")
    return chosen
