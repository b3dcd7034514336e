"""Instruction rows of the common formats, detected from their fields, as conversations."""

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any

from stages.config.sources import InstructionFormat
from stages.data.pairs.shapes import is_empty
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
_OTHER_QUESTIONS, _OTHER_ANSWERS = ("query", "problem", "user", "human", "input"), ("solution", "target", "assistant")
"""Names that count where a row fits nothing else: next to others they mean something else."""
_CONTEXTS = ("input", "context")
"""Appended to the question in every single-turn format: fields that the first rows lack may appear in later rows."""
_TURNS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat")
_TEXTS = (*_TURNS, "turns", "data")
_DEFINITIONS = ("instruction", "definition", "Definition")
_FLAT_TREE = frozenset({"message_id", "parent_id", "role", "text"})


def fits(shape: InstructionFormat, values: Mapping[str, Any]) -> bool:
    """Whether a row says what this format needs."""
    return _fits(shape, _filled(values), values.keys())


def _filled(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if not is_empty(value)}


def fitting_formats(values: Mapping[str, Any], *, by_name: bool = True) -> list[InstructionFormat]:
    """Every format that rows with these fields fit; `by_name`, empty fields count where the others fit nothing."""
    filled = _filled(values)
    for found in (filled, values) if by_name and len(filled) < len(values) else (filled,):
        if fits := [shape for shape in InstructionFormat if _fits(shape, found, values.keys())]:
            return fits
        if _question(found) and _first(found, *_ANSWERS, *_OTHER_ANSWERS) is not None:
            return [InstructionFormat.PROMPT]
    return []


def _fits(shape: InstructionFormat, values: Mapping[str, Any], columns: Set[str]) -> bool:
    match shape:
        case InstructionFormat.MESSAGES:
            return any(_turns_have(values.get(name), "role", "content") for name in _TURNS)
        case InstructionFormat.SHAREGPT:
            return any(_turns_have(values.get(name), "from", "value") for name in _TURNS)
        case InstructionFormat.TURNS:
            return any(
                _are_texts(values.get(name)) or _turns_have(values.get(name), "input", "output") for name in _TEXTS
            )
        case InstructionFormat.INSTANCES:
            return any(_turns_have(values.get(name), "output") for name in ("instances", "Instances"))
        case InstructionFormat.OASST:
            return values.keys() | (columns & {"parent_id"}) >= _FLAT_TREE
        case InstructionFormat.OASST_TREE:
            return isinstance(values.get("prompt"), Mapping) and "replies" in values["prompt"]
        case InstructionFormat.ALPACA:
            return values.keys() >= {"instruction", "output"}
        case InstructionFormat.DOLLY:
            return values.keys() >= {"instruction", "response"} and "context" in columns
        case InstructionFormat.INSTRUCTION:
            is_dolly = _fits(InstructionFormat.DOLLY, values, columns)
            return "instruction" in values and bool(values.keys() & {"response", "completion"}) and not is_dolly
        case InstructionFormat.FLAN:
            return values.keys() >= {"inputs", "targets"}
        case InstructionFormat.PROMPT:
            asks = any(isinstance(values.get(name), str) for name in _QUESTIONS)
            return asks and bool(values.keys() & set(_ANSWERS))


def _question(values: Mapping[str, Any]) -> str:
    """The field that holds the question of a row of one exchange; empty when there is none."""
    # Next to an instruction, `input` is what it is about.
    names = [name for name in (*_QUESTIONS, *_OTHER_QUESTIONS) if name != "input" or "instruction" not in values]
    asked = [name for name in names if isinstance(values.get(name), str)]
    return next((name for name in asked if values[name]), asked[0] if asked else "")


def _are_texts(turns: object) -> bool:
    return isinstance(turns, list) and len(turns) > 1 and all(isinstance(turn, str) for turn in turns)


def _turns_have(turns: object, *names: str) -> bool:
    first = turns[0] if isinstance(turns, list) and turns else None
    return isinstance(first, Mapping) and first.keys() >= set(names)


def to_conversations(shape: InstructionFormat, values: Mapping[str, Any]) -> list[Conversation | Unusable]:
    """The conversations of a row, and a reason for each that cannot be one. Only `instances` give more than one.

    Raises Unusable when the row as a whole cannot be read.
    """
    if shape is InstructionFormat.INSTANCES:
        return list(_instances(values))
    return [to_conversation(shape, values)]


def to_conversation(shape: InstructionFormat, values: Mapping[str, Any]) -> Conversation:
    """The row as a conversation; raises Unusable with the reason why it cannot be one."""
    match shape:
        case InstructionFormat.MESSAGES:
            messages = read_turns(_turns_of(values, "role", "content"), role="role", text="content")
        case InstructionFormat.SHAREGPT:
            messages = read_turns(_turns_of(values, "from", "value"), role="from", text="value")
        case InstructionFormat.TURNS:
            messages = _in_turn(next((values[name] for name in _TEXTS if isinstance(values.get(name), list)), None))
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
            question = _question(values) or _QUESTIONS[0]
            contexts = [name for name in _CONTEXTS if name != question]
            messages = _exchange(values, question, *contexts, answers=(*_ANSWERS, *_OTHER_ANSWERS))
        case InstructionFormat.OASST_TREE:
            return nested_conversation(values)
        case InstructionFormat.OASST | InstructionFormat.INSTANCES:
            raise AssertionError(f"{shape} rows are not one conversation each")
    return as_conversation(with_system(messages, values))


def _instances(values: Mapping[str, Any]) -> Iterator[Conversation | Unusable]:
    """One conversation of each instance of a task, as in Self-Instruct and Super-NaturalInstructions."""
    instances = _first(values, "instances", "Instances")
    if not isinstance(instances, list) or not instances:
        raise Unusable("no_instances")
    task = _first_of(_first(values, *_DEFINITIONS))
    for instance in instances:
        try:
            yield _instance(task, instance, values)
        except Unusable as error:
            yield error


def _instance(task: object, instance: object, values: Mapping[str, Any]) -> Conversation:
    if not isinstance(instance, Mapping):
        raise Unusable("malformed_instance")
    output = instance.get("output")
    whole = instance.get("instruction_with_input")  # Unnatural Instructions has the question in one piece
    row = {"instruction": whole or task, "input": None if whole else instance.get("input"), "output": _first_of(output)}
    made = as_conversation(with_system(_exchange(row, "instruction", "input", answers=("output",)), values))
    if isinstance(output, list) and len(output) > 1:
        return replace(made, changes=(*made.changes, "other_answers_left_out"))
    return made


def _first_of(value: object) -> object:
    """The first of several wordings that mean the same."""
    return value[0] if isinstance(value, list) and value and isinstance(value[0], str) else value


def _in_turn(turns: object) -> list[Message]:
    """Texts of the user and the assistant in turn, as in UltraChat, or a list of {input, output}, as in Capybara."""
    if not isinstance(turns, list):
        raise Unusable("no_turns")
    messages: list[Message] = []
    for place, turn in enumerate(turns):
        if isinstance(turn, Mapping):
            messages.append({"role": "user", "content": plain_text(turn.get("input"))})
            messages.append({"role": "assistant", "content": plain_text(turn.get("output"))})
        else:
            messages.append({"role": ("user", "assistant")[place % 2], "content": plain_text(turn)})
    return messages


def _turns_of(values: Mapping[str, Any], *names: str) -> Any:
    """The first list of turns with these fields, or the first field that may hold turns."""
    found = (values[name] for name in _TURNS if _turns_have(values.get(name), *names))
    return next(found, _first(values, *_TURNS))


def _first(values: Mapping[str, Any], *names: str) -> Any:
    """The first of these fields that says something."""
    return next((values[name] for name in names if not is_empty(values.get(name))), None)


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
