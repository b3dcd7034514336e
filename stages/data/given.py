"""Instruction and preference rows that users bring, in the shapes that are common; what does not fit is counted."""

from collections.abc import Iterator
from typing import Any

from stages.config.curate import CurateConfig
from stages.data.readers import data_files
from stages.data.records import BadRecord, is_drawn
from stages.data.rows import ROW_SUFFIXES, Row, read_hub, read_rows

_TURNS = (("\n\nHuman:", "user"), ("\n\nAssistant:", "assistant"))
_ROLES = frozenset({"system", "user", "assistant"})


def read_given(source: str, number: int) -> Iterator[tuple[str, Row | BadRecord]]:
    """All rows of one source with their ids."""
    if source.startswith("hf://"):
        for row in read_hub(source):
            yield (row.id if isinstance(row, BadRecord) else f"{number}/:{row.number}"), row
        return
    for stored in data_files(source, ROW_SUFFIXES):
        for row in read_rows(stored.uri, stored.name):
            yield f"{number}/{row.id if isinstance(row, BadRecord) else f'{stored.name}:{row.number}'}", row


def instruction_row(key: str, values: dict[str, Any], source: str, config: CurateConfig) -> dict[str, Any] | str:
    """The row in our shape, or the reason why it cannot be one."""
    messages = values.get("messages", values.get("conversations"))
    if messages is None:
        answer = next((values[name] for name in ("response", "output", "completion") if name in values), None)
        question = values.get("instruction", values.get("prompt", values.get("question")))
        if not isinstance(question, str) or not question.strip():
            return "no_instruction"
        if not isinstance(answer, str) or not answer.strip():
            return "no_response"
        extra = values.get("input")
        if isinstance(extra, str) and extra.strip():
            question = f"{question.strip()}\n\n{extra.strip()}"
        messages = [{"role": "user", "content": question.strip()}, {"role": "assistant", "content": answer.strip()}]
    reason = _unusable(messages)
    if reason:
        return reason
    messages = [{"role": turn["role"], "content": turn["content"]} for turn in messages]
    prompt = "\n".join(turn["content"] for turn in messages[:-1])
    heldout = is_drawn(config.heldout_fraction, config.seed, "heldout", prompt)
    return {"id": key, "messages": messages, "group": source, "origin": "given", "heldout": heldout}


def _unusable(messages: object) -> str:
    """Why a conversation cannot train a response; empty if it can."""
    if not isinstance(messages, list) or not messages:
        return "no_messages"
    for turn in messages:
        if not isinstance(turn, dict) or turn.get("role") not in _ROLES or not isinstance(turn.get("content"), str):
            return "malformed_message"
    if messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
        return "no_response"
    if not any(turn["role"] == "user" and turn["content"].strip() for turn in messages):
        return "no_instruction"
    return ""


def preference_row(key: str, values: dict[str, Any], source: str, config: CurateConfig) -> dict[str, Any] | str:
    """The row in our shape, or the reason why it cannot be one. hh-rlhf transcripts are split at their last answer."""
    chosen, rejected = values.get("chosen"), values.get("rejected")
    if not isinstance(chosen, str) or not isinstance(rejected, str) or not chosen.strip() or not rejected.strip():
        return "side_missing"
    prompt: object = values.get("prompt", values.get("instruction", values.get("question")))
    if prompt is None:
        first, second = split_transcript(chosen), split_transcript(rejected)
        if first is None or second is None:
            return "no_prompt"
        if first[0] != second[0]:
            return "prompts_differ"
        prompt, chosen, rejected = first[0], first[1], second[1]
    turns = [{"role": "user", "content": prompt.strip()}] if isinstance(prompt, str) else prompt
    if not isinstance(turns, list) or not turns or _unusable([*turns, {"role": "assistant", "content": "-"}]):
        return "no_prompt"
    chosen, rejected = chosen.strip(), rejected.strip()
    if not chosen or not rejected:
        return "side_missing"
    if chosen == rejected:
        return "equal_sides"
    heldout = is_drawn(config.heldout_fraction, config.seed, "heldout", "\n".join(turn["content"] for turn in turns))
    return {
        "id": key,
        "prompt": [{"role": turn["role"], "content": turn["content"]} for turn in turns],
        "chosen": chosen,
        "rejected": rejected,
        "kind": "given",
        "group": source,
        "origin": "given",
        "heldout": heldout,
    }


def split_transcript(text: str) -> tuple[list[dict[str, str]], str] | None:
    """Turns before the last answer, and that answer; None when the text is no Human/Assistant transcript."""
    places = sorted((start, role, mark) for mark, role in _TURNS for start in _starts("\n\n" + text.lstrip("\n"), mark))
    body = "\n\n" + text.lstrip("\n")
    turns: list[dict[str, str]] = []
    for position, (start, role, mark) in enumerate(places):
        end = places[position + 1][0] if position + 1 < len(places) else len(body)
        turns.append({"role": role, "content": body[start + len(mark) : end].strip()})
    if len(turns) < 2 or turns[0]["role"] != "user" or turns[-1]["role"] != "assistant":
        return None
    return turns[:-1], turns[-1]["content"]


def _starts(text: str, mark: str) -> Iterator[int]:
    start = text.find(mark)
    while start >= 0:
        yield start
        start = text.find(mark, start + 1)
