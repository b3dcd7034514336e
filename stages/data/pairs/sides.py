"""One response with the turns before it, from texts, messages, dialogues or transcripts; and two of them as a pair."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stages.data.pairs.shapes import is_empty
from stages.data.pairs.turns import Message, Unusable, as_conversation, plain_text, read_turns, with_system

PROMPTS = ("prompt", "instruction", "question")
OTHER_PROMPTS = ("query", "history", "context", "post", "input")
"""Names of a prompt where there is none of the others, next to which they are what the question is about."""
_CONTEXTS = ("input", "context")
_TURNS = (("\n\nHuman:", "user"), ("\n\nAssistant:", "assistant"))


@dataclass(frozen=True)
class Preference:
    """Two responses to one prompt; people or a rule preferred the first."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    reason: str = ""
    """Why, in the words of those who preferred it."""
    changes: tuple[str, ...] = ()
    """What was decided on the way, such as that annotators disagreed."""
    gap: float | None = field(default=None, compare=False)
    """By how much the first is rated higher, where both are rated."""


@dataclass(frozen=True)
class Side:
    """A response, and the turns before it as far as this side has them."""

    before: tuple[Message, ...]
    answer: str


def side_of(side: object) -> Side:
    """A text, a message, or a dialogue that ends with the response."""
    if isinstance(side, Mapping):
        side = [side]
    if not isinstance(side, list):
        return Side((), plain_text(side))
    if not side:
        raise Unusable("side_missing")
    turns = read_turns(side, role="role", text="content")
    if turns[-1]["role"] != "assistant":
        raise Unusable("no_response")
    return last_turn(turns)


def transcript_of(text: object) -> Side:
    if not isinstance(text, str) or not text.strip():
        raise Unusable("side_missing")
    turns = split_transcript(text)
    head = 1 if turns and turns[0]["role"] == "system" else 0
    if len(turns) < head + 2 or turns[head]["role"] != "user":
        raise Unusable("no_prompt")
    if turns[-1]["role"] != "assistant":
        raise Unusable("no_response")
    return Side(tuple(turns[:-1]), turns[-1]["content"])


def split_transcript(text: str) -> list[Message]:
    """Turns of an hh-rlhf transcript of `Human:` and `Assistant:`; empty when it is not a transcript.

    Text before the first of them is what the assistant was told, so it is the system message.
    """
    body = "\n\n" + text.lstrip("\n")
    places = sorted((start, role, mark) for mark, role in _TURNS for start in _starts(body, mark))
    starts = [start for start, _, _ in places]
    preamble = body[: starts[0]].strip() if places else ""
    return [
        *([{"role": "system", "content": preamble}] if preamble else []),
        *(
            {"role": role, "content": body[start + len(mark) : end].strip()}
            for (start, role, mark), end in zip(places, [*starts[1:], len(body)], strict=False)
        ),
    ]


def _starts(text: str, mark: str) -> Iterator[int]:
    start = text.find(mark)
    while start >= 0:
        yield start
        start = text.find(mark, start + 1)


def common_prompt(sides: Sequence[Side], values: Mapping[str, Any]) -> list[Message]:
    """The turns before both responses: those of the dialogues, which must be the same, or the row's own prompt.
    The row's own system message comes first in either case."""
    before = list(sides[0].before)
    if list(sides[1].before) != before:
        raise Unusable("prompts_differ")
    if not before:
        return with_system(asked_of(values), values)
    asked = _read_prompt(first_named(values, PROMPTS))
    if asked and asked[-1]["content"] != before[-1]["content"]:
        raise Unusable("prompts_differ")
    return with_system(before, values)


def asked_of(values: Mapping[str, Any]) -> list[Message]:
    """The row's own prompt, with what it is about below it."""
    prompt = first_named(values, PROMPTS)
    if prompt is None:
        return _read_prompt(first_named(values, OTHER_PROMPTS))
    messages = _read_prompt(prompt)
    contexts = [plain_text(values[name]) for name in _CONTEXTS if isinstance(values.get(name), str)]
    if len(messages) == 1 and isinstance(prompt, str):
        return [{"role": "user", "content": "\n\n".join(part for part in (messages[0]["content"], *contexts) if part)}]
    return messages


def _read_prompt(prompt: object) -> list[Message]:
    """A text, a transcript without its last answer, or messages, as messages."""
    if isinstance(prompt, Mapping):  # WebGPT's question
        prompt = first_named(prompt, ("full_text", "text", "content"))
    if prompt is None:
        return []
    if isinstance(prompt, list):
        return read_turns(prompt, role="role", text="content")
    text = plain_text(prompt)
    # With text in front, only the place left for the answer tells a transcript from a question that quotes one.
    is_transcript = text.startswith("Human:") or ("\n\nHuman:" in text and text.endswith("\n\nAssistant:"))
    messages = split_transcript(text) if is_transcript else []
    if messages and messages[-1] == {"role": "assistant", "content": ""}:
        messages = messages[:-1]
    return messages or ([{"role": "user", "content": text}] if text else [])


def paired(
    prompt: Sequence[Message],
    chosen: str,
    rejected: str,
    reason: str = "",
    changes: tuple[str, ...] = (),
    *,
    gap: float | None = None,
) -> Preference | str:
    if not chosen or not rejected:
        return "side_missing"
    try:
        asked = answered(prompt, chosen)
    except Unusable as error:
        return error.reason
    return "equal_sides" if chosen == rejected else Preference(asked, chosen, rejected, reason, changes, gap)


def answered(prompt: Sequence[Message], answer: str) -> tuple[Message, ...]:
    """The prompt as it is trained on; raises Unusable when this answer cannot follow it."""
    if not prompt or prompt[-1]["role"] != "user" or not prompt[-1]["content"]:
        raise Unusable("no_prompt")
    return as_conversation([*prompt, {"role": "assistant", "content": answer}]).messages[:-1]


def last_turn(turns: Sequence[Message]) -> Side:
    return Side(tuple(turns[:-1]), turns[-1]["content"])


def interleaved(asked: Sequence[str], answers: object) -> list[Message]:
    if not isinstance(answers, list) or len(answers) != len(asked) or not asked:
        raise Unusable("malformed_turn")
    turns: list[Message] = []
    for question, answer in zip(asked, answers, strict=True):
        turns.append({"role": "user", "content": plain_text(question)})
        turns.append({"role": "assistant", "content": plain_text(answer)})
    return turns


def first_named(entry: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((entry[name] for name in names if not is_empty(entry.get(name))), None)
