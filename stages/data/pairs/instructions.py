"""Instruction rows of the common formats, detected from their fields, as conversations."""

from collections.abc import Mapping, Sequence
from typing import Any

from stages.config.sources import InstructionFormat
from stages.data.pairs.trees import nested_conversation
from stages.data.pairs.turns import (
    Conversation,
    Message,
    Unusable,
    as_conversation,
    plain_text,
    read_turns,
    with_system,
)

_QUESTIONS, _ANSWERS = ("prompt", "question"), ("response", "completion", "answer", "output")
_CONTEXTS = ("input", "context")
"""Appended to the question in every single-turn format: fields that the first rows lack may appear in later rows."""
_FLAT_TREE = frozenset({"message_id", "parent_id", "role", "text"})


def fitting_formats(values: Mapping[str, Any]) -> list[InstructionFormat]:
    """Every format that rows with these fields fit."""
    return [shape for shape in InstructionFormat if _fits(shape, values)]


def _fits(shape: InstructionFormat, values: Mapping[str, Any]) -> bool:
    match shape:
        case InstructionFormat.MESSAGES:
            return any(_turns_have(values.get(name), "role", "content") for name in ("messages", "conversations"))
        case InstructionFormat.SHAREGPT:
            return _turns_have(values.get("conversations"), "from", "value")
        case InstructionFormat.OASST:
            return values.keys() >= _FLAT_TREE
        case InstructionFormat.OASST_TREE:
            return isinstance(values.get("prompt"), Mapping) and "replies" in values["prompt"]
        case InstructionFormat.ALPACA:
            return values.keys() >= {"instruction", "output"}
        case InstructionFormat.DOLLY:
            return values.keys() >= {"instruction", "context", "response"}
        case InstructionFormat.INSTRUCTION:
            is_dolly = _fits(InstructionFormat.DOLLY, values)
            return "instruction" in values and bool(values.keys() & {"response", "completion"}) and not is_dolly
        case InstructionFormat.FLAN:
            return values.keys() >= {"inputs", "targets"}
        case InstructionFormat.PROMPT:
            asks = any(isinstance(values.get(name), str) for name in _QUESTIONS)
            return asks and bool(values.keys() & set(_ANSWERS))


def _turns_have(turns: object, *names: str) -> bool:
    first = turns[0] if isinstance(turns, list) and turns else None
    return isinstance(first, Mapping) and first.keys() >= set(names)


def to_conversation(shape: InstructionFormat, values: Mapping[str, Any]) -> Conversation:
    """The row as a conversation; raises Unusable with the reason why it cannot be one."""
    match shape:
        case InstructionFormat.MESSAGES:
            messages = read_turns(_first(values, "messages", "conversations"), role="role", text="content")
        case InstructionFormat.SHAREGPT:
            messages = read_turns(values.get("conversations"), role="from", text="value")
        case InstructionFormat.ALPACA:
            messages = _exchange(values, "instruction", *_CONTEXTS, answers=("output",))
            messages = [*_history(values.get("history")), *messages]
        case InstructionFormat.DOLLY:
            messages = _exchange(values, "instruction", *_CONTEXTS, answers=("response",))
        case InstructionFormat.INSTRUCTION:
            messages = _exchange(values, "instruction", *_CONTEXTS, answers=("response", "completion"))
        case InstructionFormat.FLAN:
            messages = _exchange(values, "inputs", answers=("targets",))
        case InstructionFormat.PROMPT:
            question = next((name for name in _QUESTIONS if values.get(name) is not None), _QUESTIONS[0])
            messages = _exchange(values, question, *_CONTEXTS, answers=_ANSWERS)
        case InstructionFormat.OASST_TREE:
            return nested_conversation(values)
        case InstructionFormat.OASST:
            raise AssertionError("messages of trees are joined by stages.data.pairs.trees.conversations_of")
    return as_conversation(with_system(messages, values))


def _first(values: Mapping[str, Any], *names: str) -> Any:
    """The first of these fields that has a value."""
    return next((values[name] for name in names if values.get(name) is not None), None)


def _exchange(values: Mapping[str, Any], question: str, *context: str, answers: Sequence[str]) -> list[Message]:
    """One question, with its context below it, and one answer."""
    parts = [plain_text(values.get(name)) for name in (question, *context)]
    if not parts[0]:
        raise Unusable("empty_prompt")
    answer = plain_text(_first(values, *answers))
    return [
        {"role": "user", "content": "\n\n".join(part for part in parts if part)},
        {"role": "assistant", "content": answer},
    ]


def _history(pairs: object) -> list[Message]:
    """Earlier turns of an Alpaca row: a list of [question, answer]."""
    messages: list[Message] = []
    if not pairs:
        return messages
    if not isinstance(pairs, Sequence) or isinstance(pairs, str):
        raise Unusable("malformed_turn")
    for pair in pairs:
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise Unusable("malformed_turn")
        turns = zip(("user", "assistant"), pair, strict=True)
        messages += ({"role": role, "content": plain_text(text)} for role, text in turns)
    return messages
