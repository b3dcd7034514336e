"""Conversations and preference pairs to token shards, with an account by source of every row and every token.

Tokens conserve: in = trained + masked + dropped, each counted where it is seen.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from stages.config.errors import DataError
from stages.config.tokens import TokenizeConfig
from stages.data.pairs.turns import Message, Unusable, split_thinking, trained_turns
from stages.data.sources.records import source_of
from stages.data.tokens.chat import ChatEncoder, EncodedChat
from stages.data.tokens.ragged import RaggedWriter
from stages.data.tokens.reasons import ReasonsWriter

_MASK = np.dtype(np.uint8)
_SIDES = ("chosen", "rejected")


class Account:
    """Rows and tokens of one kind, together and by source."""

    def __init__(self) -> None:
        self._sources: dict[str, Counter[str]] = {}

    def count(self, source: str, **numbers: int) -> None:
        """Add to the figures of a source; `dropped_x=1` is shown as `dropped.x`."""
        mine = self._sources.setdefault(source, Counter())
        for name, number in numbers.items():
            mine[name] += number

    def drop(self, source: str, reason: str, *, tokens: int = 0) -> None:
        self.count(source, **{f"dropped.{reason}": 1, "tokens_in": tokens, f"dropped_tokens.{reason}": tokens})

    def keep(self, source: str, encoded: Iterable[EncodedChat], *, tokens_in: int, rows: int = 1) -> None:
        """Count a row that is written; what `tokens_in` exceeds it by was counted as dropped by the caller."""
        trained = masked = left_out = 0
        for chat in encoded:
            left_out += chat.thinking_left_out
            trained += int((chat.loss_mask == 1).sum())
            masked += int((chat.loss_mask == 0).sum())
        self.count(source, kept=rows, tokens_in=tokens_in, target_tokens=trained, masked_tokens=masked)
        if left_out:
            self.count(source, thinking_left_out=left_out)

    def to_dict(self, what: str) -> dict[str, Any]:
        """The figures; raises DataError when rows or tokens do not conserve."""
        total: Counter[str] = Counter()
        for name, mine in self._sources.items():
            _verify(f"{what} of {name}", mine)
            total.update(mine)
        return {**_shown(total), "sources": {name: _shown(mine) for name, mine in self._sources.items()}}


def _shown(figures: Counter[str]) -> dict[str, int]:
    named = {name: figures[name] for name in ("in", "kept", "cut", "tokens_in", "target_tokens", "masked_tokens")}
    lost = {
        name: count
        for name, count in sorted(figures.items())
        if (name.startswith("dropped") or name == "thinking_left_out") and count
    }
    return {**named, "tokens": figures["target_tokens"] + figures["masked_tokens"], **lost}


def _verify(what: str, figures: Counter[str]) -> None:
    rows = figures["kept"] + sum(count for name, count in figures.items() if name.startswith("dropped."))
    tokens = figures["target_tokens"] + figures["masked_tokens"]
    tokens += sum(count for name, count in figures.items() if name.startswith("dropped_tokens."))
    if (rows, tokens) != (figures["in"], figures["tokens_in"]):
        raise DataError(
            f"the ledger of the {what} does not conserve: {figures['in']} rows and {figures['tokens_in']} tokens came "
            f"in, {rows} and {tokens} are accounted for",
            advice="This is a defect of tokenize, not of the data; please report it with ledger.json.",
        )


class _Origins:
    """Which source each written row is of."""

    def __init__(self) -> None:
        self._names: dict[str, int] = {}
        self._indices: list[int] = []

    def append(self, source: str) -> None:
        self._indices.append(self._names.setdefault(source, len(self._names)))

    def write(self, folder: Path) -> None:
        np.save(folder / "sources.npy", np.asarray(self._indices, dtype=np.int32))
        (folder / "sources.json").write_text(json.dumps(list(self._names), ensure_ascii=False))


@dataclass(frozen=True)
class _Fitted:
    """A conversation as it is trained on, and how many tokens it had before it was cut."""

    messages: list[Message]
    encoded: EncodedChat
    whole: int


@dataclass(frozen=True)
class Chat:
    """The messages behind a written row, as they were encoded."""

    messages: list[Message]
    tools: list[Any]


@dataclass
class Originals:
    """The texts of the rows that were written, in their order: what another tokenizer reads instead of the ids."""

    conversations: list[Chat] = field(default_factory=list)
    prompts: list[Chat] = field(default_factory=list)
    pairs: list[tuple[Chat, Chat]] = field(default_factory=list)
    """Chosen and rejected, the prompt in both."""


def _thought(messages: list[Message], config: TokenizeConfig) -> list[Message]:
    """The messages with or without what the assistant thought."""
    if config.thinking == "keep":
        return messages
    return [
        {**message, "content": split_thinking(message["content"])[1]} if message["role"] == "assistant" else message
        for message in messages
    ]


class ConversationWriter:
    """Writes conversations, and the distinct prompts that PPO answers."""

    def __init__(
        self,
        output: Path,
        split: str,
        chat: ChatEncoder,
        config: TokenizeConfig,
        dtype: np.dtype,
        *,
        originals: Originals | None = None,
    ) -> None:
        """`originals` receives the texts of what is written, for callers that need them."""
        self._originals = originals
        self._folder, self._prompts_folder = output / "conversations" / split, output / "prompts" / split
        self._chat, self._config = chat, config
        self._ids = RaggedWriter(self._folder, "ids", dtype)
        self._mask = RaggedWriter(self._folder, "mask", _MASK)
        self._prompts = RaggedWriter(self._prompts_folder, "ids", dtype)
        self._origins, self._account = _Origins(), Account()
        self._asked: Counter[str] = Counter()
        self._seen: set[bytes] = set()
        self._texts: list[str] = []

    def write(self, rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """Write all rows and return the accounts of `conversations` and `prompts`."""
        for row in rows:
            self._add(source_of(row), row["messages"], row.get("tools") or [])
        for writer in (self._ids, self._mask, self._prompts):
            writer.close()
        self._origins.write(self._folder)
        texts = json.dumps(self._texts, ensure_ascii=False)
        (self._prompts_folder / "texts.json").write_text(texts)
        return {"conversations": self._account.to_dict("conversations"), "prompts": dict(self._asked)}

    def _add(self, source: str, given: list[Message], tools: list[Any]) -> None:
        self._account.count(source, **{"in": 1})
        messages = _thought(given, self._config)
        try:
            fitted = self._fitted(messages, tools)
            prompt = self._chat.encode_prompt(fitted.messages[:-1], tools=tools)
        except Unusable as error:
            self._account.drop(source, error.reason)
            return
        except _TooLong as error:
            self._account.drop(source, "longer_than_context", tokens=error.tokens)
            return
        self._ids.append(fitted.encoded.ids)
        self._mask.append(fitted.encoded.loss_mask)
        self._origins.append(source)
        self._account.keep(source, [fitted.encoded], tokens_in=fitted.whole)
        if fitted.messages is not messages:
            self._account.count(source, cut=1)
            self._account.count(source, **{"dropped_tokens.cut": fitted.whole - len(fitted.encoded.ids)})
        if self._originals is not None:
            self._originals.conversations.append(Chat(fitted.messages, tools))
        self._ask(prompt, Chat(fitted.messages[:-1], tools))

    def _fitted(self, messages: list[Message], tools: list[Any]) -> _Fitted:
        """The conversation, or as many of its first exchanges as fit if the policy is to cut."""
        whole = self._encoded(messages, tools)
        size, limit = len(whole.ids), self._config.sequence_length
        if size <= limit:
            return _Fitted(messages, whole, size)
        for length in range(len(messages) - 1, 1, -1) if self._config.too_long == "truncate" else ():
            if messages[length - 1]["role"] != "assistant":
                continue
            try:
                part = self._encoded(messages[:length], tools)
            except Unusable:  # by its weights, nothing of this part is trained
                continue
            if len(part.ids) <= limit:
                return _Fitted(messages[:length], part, size)
        raise _TooLong(size)

    def _encoded(self, messages: list[Message], tools: list[Any]) -> EncodedChat:
        if any(_says_nothing(message) for message in messages):
            raise Unusable("empty_response")
        turns = trained_turns(messages, self._config.trained_turns)
        return self._chat.encode(messages, tools=tools, turns=turns)

    def _ask(self, prompt: np.ndarray, asked: Chat) -> None:
        self._asked["in"] += 1
        if len(prompt) > self._config.max_prompt_length:
            self._asked["dropped.prompt_too_long"] += 1
        elif (key := prompt.tobytes()) in self._seen:
            self._asked["dropped.repeated"] += 1
        else:
            self._seen.add(key)
            self._prompts.append(prompt)
            self._texts.append(asked.messages[-1]["content"])
            if self._originals is not None:
                self._originals.prompts.append(asked)
            self._asked["kept"] += 1
            self._asked["tokens"] += len(prompt)


def _says_nothing(message: Message) -> bool:
    """Whether nothing is left of an assistant's turn without what it thought."""
    return message["role"] == "assistant" and not message["content"] and not message.get("tool_calls")


class _TooLong(Exception):
    def __init__(self, tokens: int) -> None:
        super().__init__(tokens)
        self.tokens = tokens


class PairWriter:
    """Writes preference pairs; the loss masks cover the answers that differ, not the assistant's earlier turns."""

    def __init__(
        self,
        output: Path,
        split: str,
        chat: ChatEncoder,
        config: TokenizeConfig,
        dtype: np.dtype,
        *,
        originals: Originals | None = None,
    ) -> None:
        self._originals = originals
        self._folder, self._chat, self._config = output / "preferences" / split, chat, config
        self._writers = {
            f"{side}-{part}": RaggedWriter(self._folder, f"{side}-{part}", dtype if part == "ids" else _MASK)
            for side in _SIDES
            for part in ("ids", "mask")
        }
        self._origins, self._account, self._kinds = _Origins(), Account(), []
        self._margins: list[float | None] = []
        self._reasons = ReasonsWriter()

    def write(self, rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """Write all rows and return their account."""
        for row in rows:
            self._add(source_of(row), row)
        for writer in self._writers.values():
            writer.close()
        self._origins.write(self._folder)
        (self._folder / "kinds.json").write_text(json.dumps(self._kinds))
        if any(margin is not None for margin in self._margins):
            margins = [0.0 if margin is None else margin for margin in self._margins]
            np.save(self._folder / "margins.npy", np.asarray(margins, dtype=np.float32))
        return {**self._account.to_dict("preferences"), **self._reasons.write(self._folder)}

    def _add(self, source: str, row: Mapping[str, Any]) -> None:
        self._account.count(source, **{"in": 1})
        try:
            tools = row.get("tools") or []
            sides = {side: self._side(row["prompt"], row[side], tools) for side in _SIDES}
        except Unusable as error:
            self._account.drop(source, error.reason)
            return
        tokens = sum(len(side.ids) for side in sides.values())
        if max(len(side.ids) for side in sides.values()) > self._config.sequence_length:
            self._account.drop(source, "longer_than_context", tokens=tokens)
        # Texts that differ only in what the template trims are equal as tokens, and teach nothing.
        elif np.array_equal(sides["chosen"].ids, sides["rejected"].ids):
            self._account.drop(source, "equal_sides", tokens=tokens)
        else:
            for name, side in sides.items():
                self._writers[f"{name}-ids"].append(side.ids)
                self._writers[f"{name}-mask"].append(side.loss_mask)
            if self._originals is not None:
                chosen, rejected = (Chat(self._messages(row["prompt"], row[side]), tools) for side in _SIDES)
                self._originals.pairs.append((chosen, rejected))
            self._kinds.append(row.get("kind", "given"))
            self._margins.append(row.get("margin"))
            self._reasons.append(row)
            self._origins.append(source)
            self._account.keep(source, sides.values(), tokens_in=tokens)

    def _side(self, prompt: list[Message], answer: str, tools: list[Any]) -> EncodedChat:
        return _encoded_answer(self._chat, self._messages(prompt, answer), tools)

    def _messages(self, prompt: list[Message], answer: str) -> list[Message]:
        return _thought([*prompt, {"role": "assistant", "content": answer}], self._config)


def _encoded_answer(chat: ChatEncoder, messages: list[Message], tools: list[Any]) -> EncodedChat:
    """Encode with a loss on the last turn alone, which is what a preference is about."""
    if not messages[-1]["content"]:
        raise Unusable("empty_response")
    return chat.encode(messages, tools=tools, turns={len(messages) - 1})


class UnpairedWriter:
    """Writes single labelled answers; the loss masks cover the answers."""

    def __init__(self, output: Path, split: str, chat: ChatEncoder, config: TokenizeConfig, dtype: np.dtype) -> None:
        self._folder, self._chat, self._config = output / "unpaired" / split, chat, config
        self._ids = RaggedWriter(self._folder, "ids", dtype)
        self._mask = RaggedWriter(self._folder, "mask", _MASK)
        self._origins, self._account = _Origins(), Account()
        self._labels: list[bool] = []
        self._reasons = ReasonsWriter()

    def write(self, rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """Write all rows and return their account, with the number of desirable ones."""
        for row in rows:
            self._add(source_of(row), row)
        self._ids.close()
        self._mask.close()
        self._origins.write(self._folder)
        np.save(self._folder / "labels.npy", np.asarray(self._labels, dtype=np.uint8))
        account = {**self._account.to_dict("unpaired responses"), "desirable": sum(self._labels)}
        return {**account, **self._reasons.write(self._folder)}

    def _add(self, source: str, row: Mapping[str, Any]) -> None:
        self._account.count(source, **{"in": 1})
        messages = _thought([*row["prompt"], {"role": "assistant", "content": row["response"]}], self._config)
        try:
            encoded = _encoded_answer(self._chat, messages, row.get("tools") or [])
        except Unusable as error:
            self._account.drop(source, error.reason)
            return
        if (tokens := len(encoded.ids)) > self._config.sequence_length:
            self._account.drop(source, "longer_than_context", tokens=tokens)
            return
        self._ids.append(encoded.ids)
        self._mask.append(encoded.loss_mask)
        self._labels.append(bool(row["label"]))
        self._reasons.append(row)
        self._origins.append(source)
        self._account.keep(source, [encoded], tokens_in=tokens)
