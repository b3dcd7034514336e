"""What synthesis starts from: seed tasks, prompts, or passages of texts, each drawn by the seed and used once."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from stages.config.errors import DataError
from stages.config.sources import InstructionFormat, Source
from stages.config.synthesis import SynthesizeConfig
from stages.data.pairs.cells import unpacked
from stages.data.pairs.instructions import fitting_formats, to_conversations
from stages.data.pairs.shapes import is_empty
from stages.data.pairs.turns import Message, Unusable, plain_text
from stages.data.sources.hub import read_hub
from stages.data.sources.readers import data_files
from stages.data.sources.records import BadRecord, Row, stable_hash
from stages.data.sources.rows import read_rows
from stages.data.sources.storage import ROW_SUFFIXES, TEXT_SUFFIXES
from stages.data.sources.streams import MAX_RECORD_BYTES, Damaged, Stored, plain_name, read_whole
from stages.data.synthesis.account import Step
from stages.data.synthesis.asking import Task

_INPUTS, _OUTPUTS = ("input", "context"), ("output", "response", "completion", "answer")
_PROMPTS = ("prompt", "question", "instruction")
_ANSWER = "-"

Drawn = TypeVar("Drawn", "Prompt", "Passage")


@dataclass(frozen=True)
class Prompt:
    """Turns that end with the user's."""

    id: str
    source: str
    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Passage:
    """Part of a text, short enough to be shown."""

    id: str
    source: str
    text: str


def read_seed_tasks(config: SynthesizeConfig, step: Step) -> list[Task]:
    """Return the seed tasks, in the order of their sources; raises DataError when there is none."""
    tasks: dict[str, Task] = {}
    for source in config.parsed_sources:
        for name, row in _rows(source, step):
            try:
                task = seed_task(row.values, name)
            except Unusable as error:
                step.drop(error.reason, str(row.values))
                continue
            if task.prompt in tasks:
                step.drop("duplicate")
            else:
                tasks[task.prompt] = task
                step.keep()
    return _required(list(tasks.values()), config, step, "seed task", "rows with an instruction, and an input if any")


def seed_task(values: Mapping[str, Any], name: str) -> Task:
    """Read a row as a task; raises Unusable for one that is none."""
    told: Mapping[str, Any] = values
    instances = values.get("instances")
    if isinstance(instances, list) and instances and isinstance(instances[0], Mapping):  # as Self-Instruct has them
        told = {**instances[0], "instruction": values.get("instruction")}
    if isinstance(told.get("instruction"), str):
        instruction, given, response = (
            plain_text(next((told[key] for key in keys if not is_empty(told.get(key))), None))
            for keys in (("instruction",), _INPUTS, _OUTPUTS)
        )
        return _clean(Task(name, instruction.strip(), given.strip(), response.strip()))
    messages = _conversation(values)
    asked = [turn["content"] for turn in messages if turn["role"] == "user"]
    said = [turn["content"] for turn in messages if turn["role"] == "assistant"]
    return _clean(Task(name, asked[0].strip(), response=(said[0] if said else "").strip()))


def _clean(task: Task) -> Task:
    if not task.instruction:
        raise Unusable("no_instruction")
    _require_utf8(task.prompt + task.response)
    return task


def read_prompts(config: SynthesizeConfig, step: Step) -> list[Prompt]:
    """Return the prompts to answer, in the order of their draw; raises DataError when there is none."""
    found: dict[str, Prompt] = {}
    for source in config.parsed_sources:
        for name, row in _rows(source, step):
            try:
                messages = prompt_turns(row.values)
            except Unusable as error:
                step.drop(error.reason, str(row.values))
                continue
            key = str(messages)
            if key in found:
                step.drop("duplicate")
            else:
                found[key] = Prompt(name, source.uri, messages)
    return _draw(
        list(found.values()), config.num_rows, config, step, "prompt", "rows with a prompt or a conversation",
        key=lambda prompt: str(prompt.messages),
    )  # fmt: skip


def prompt_turns(values: Mapping[str, Any]) -> tuple[Message, ...]:
    """The turns of a row up to the last one of the user; raises Unusable for a row without."""
    bare = next((values[key] for key in _PROMPTS if isinstance(values.get(key), str)), None)
    if bare is not None and not bare.strip():
        raise Unusable("no_prompt")
    if bare is not None and not fitting_formats(values):
        turns: list[Message] = [{"role": "user", "content": seed_task({**values, "instruction": bare}, "").prompt}]
    else:
        turns = list(_conversation(values))
    while turns and turns[-1]["role"] != "user":
        turns.pop()
    if not turns or not turns[-1]["content"].strip():
        raise Unusable("no_prompt")
    if any(turn.get("tool_calls") or turn["role"] == "tool" for turn in turns):
        raise Unusable("prompt_with_tools")
    messages: tuple[Message, ...] = tuple({"role": turn["role"], "content": turn["content"]} for turn in turns)
    _require_utf8(str([turn["content"] for turn in messages]))
    return messages


def read_passages(config: SynthesizeConfig, step: Step) -> list[Passage]:
    """Return a passage of each text that is asked about, in the order of their draw; raises DataError for none."""
    found: dict[str, Passage] = {}
    for source in config.parsed_sources:
        for name, text in _texts(source, config, step):
            try:
                _require_utf8(text)
                passage = passage_of(text, name, config)
            except Unusable as error:
                step.drop(error.reason, text)
                continue
            if passage in found:
                step.drop("duplicate")
            else:
                found[passage] = Passage(name, source.uri, passage)
    number = -(-config.num_rows // config.questions_per_text)
    return _draw(
        list(found.values()), number, config, step, "text", "text files, or rows with a text field",
        key=lambda passage: passage.text,
    )  # fmt: skip


def passage_of(text: str, name: str, config: SynthesizeConfig) -> str:
    """Whole paragraphs from one that the seed draws, up to the longest passage; raises Unusable without any."""
    paragraphs = [part.strip() for part in re.split(r"\n\s*\n", text.replace("\r\n", "\n")) if part.strip()]
    fitting = [place for place, part in enumerate(paragraphs) if len(part.split()) <= config.max_text_words]
    if not fitting:
        raise Unusable("no_paragraph_short_enough" if paragraphs else "empty_text")
    start = fitting[stable_hash(config.seed, "passage", name) % len(fitting)]
    kept: list[str] = []
    room = config.max_text_words
    for part in paragraphs[start:]:
        room -= len(part.split())
        if room < 0:
            break
        kept.append(part)
    return "\n\n".join(kept)


def _conversation(values: Mapping[str, Any]) -> tuple[Message, ...]:
    """A row of any format of instructions; a bare prompt gets an answer, without which no format fits."""
    formats = fitting_formats(values)
    if not formats:
        raise Unusable("no_prompt")
    filled = dict(values)
    if formats[0] in (InstructionFormat.MESSAGES, InstructionFormat.SHAREGPT):
        filled = {key: _answered(turns) for key, turns in values.items()}
    made = to_conversations(formats[0], filled)[0]
    if isinstance(made, Unusable):
        raise made
    return made.messages


def _answered(turns: Any) -> Any:
    """Let turns that end with the user's be a conversation; the answer is taken off again."""
    if not isinstance(turns, list) or not turns or not isinstance(turns[-1], Mapping):
        return turns
    last = turns[-1]
    if last.get("role") == "user":
        return [*turns, {"role": "assistant", "content": _ANSWER}]
    return [*turns, {"from": "gpt", "value": _ANSWER}] if last.get("from") in ("human", "user") else turns


def _rows(source: Source, step: Step) -> Iterator[tuple[str, Row]]:
    """The readable rows of a source, each with a name that stays the same."""
    if source.uri.startswith("hf://"):
        tables = [(source.uri, read_hub(source.uri))]
    else:
        tables = [(stored.name, read_rows(stored)) for stored in data_files(source.uri, ROW_SUFFIXES).files]
    for name, rows in tables:
        for row in rows:
            if isinstance(row, BadRecord):
                step.drop(row.reason, row.sample)
            else:
                yield f"{name}:{row.number}", Row(row.number, unpacked(row.values), row.size)


def _texts(source: Source, config: SynthesizeConfig, step: Step) -> Iterator[tuple[str, str]]:
    if source.uri.startswith("hf://"):
        files: Sequence[Stored | None] = [None]
    else:
        files = data_files(source.uri, (*TEXT_SUFFIXES, *ROW_SUFFIXES)).files
    for stored in files:
        if stored is not None and plain_name(stored.name).endswith(TEXT_SUFFIXES):
            try:
                yield stored.name, read_whole(stored, MAX_RECORD_BYTES).decode("utf-8-sig")
            except Damaged as error:
                step.drop(error.reason)
            except UnicodeDecodeError:
                step.drop("invalid_utf8")
            continue
        for row in read_hub(source.uri) if stored is None else read_rows(stored):
            text = None if isinstance(row, BadRecord) else row.values.get(config.text_field)
            if isinstance(row, BadRecord):
                step.drop(row.reason, row.sample)
            elif not isinstance(text, str):
                step.drop("missing_text", str(sorted(row.values)))
            else:
                yield f"{source.uri if stored is None else stored.name}:{row.number}", text


def _draw(
    found: list[Drawn],
    number: int,
    config: SynthesizeConfig,
    step: Step,
    what: str,
    allowed: str,
    *,
    key: Callable[[Drawn], str],
) -> list[Drawn]:
    """By content and seed, so that the order of the files does not matter."""
    drawn = sorted(found, key=lambda one: stable_hash(config.seed, what, key(one)))
    for _ in drawn[:number]:
        step.keep()
    if len(drawn) > number:
        step.drop("over_num_rows", times=len(drawn) - number)
    return _required(drawn[:number], config, step, what, allowed)


Found = TypeVar("Found")


def _required(found: list[Found], config: SynthesizeConfig, step: Step, what: str, allowed: str) -> list[Found]:
    if not found:
        raise DataError(
            f"synthesis_sources={list(config.sources)} hold no {what}; dropped: {dict(step.dropped)}",
            advice=f"Give {allowed}; docs/SYNTHESIS.md lists what is read.",
        )
    return found


def _require_utf8(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON can spell and UTF-8 cannot
        raise Unusable("invalid_utf8") from None
