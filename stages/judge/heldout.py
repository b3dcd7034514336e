"""The held-out items of a run, chosen once: their ids, their tokens as the run made them, and their texts.

A model that has the run's tokenizer reads the tokens. Any other reads the texts by its own tokenizer and chat template,
so both are measured on the same items, and what they get is counted by byte of the text. The texts come from the
curated data that the tokens were made from; without it, of documents the decoded tokens are used, and everything that
needs a chat template is skipped for such a model.

Ids are made from the texts, so the same item has the same id in every run and under every tokenizer.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stages.artifacts.manifests import canonical_json
from stages.config.closing import EvaluateConfig
from stages.config.errors import ConfigError, DataError
from stages.config.tokens import TokenizeConfig
from stages.data.pairs.turns import Unusable, trained_turns
from stages.data.tokens.encoding import Chat, Originals
from stages.data.tokens.packing import TokenSequence
from stages.data.tokens.rows import DocumentRows
from stages.data.tokens.tokenizer import LoadedTokenizer
from stages.data.tokens.views import PairView, Split, TokensArtifact, evenly
from stages.judge.suite import Subject

logger = logging.getLogger(__name__)

BYTES_PER_TOKEN = 4
"""Of a document's text so many bytes are measured for each token of a row: about one row in most tokenizers."""
NO_TEXT, TOO_LONG = "no_text_for_another_tokenizer", "longer_than_context"
NO_TEMPLATE, NOT_FINITE, EMPTY = "no_chat_template", "not_finite", "empty_response"
"""Reasons for which an item is skipped."""


class Skipped(Exception):
    """A model cannot be measured on an item; `reason` is what is counted."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Document:
    """The beginning of a held-out document."""

    id: str
    text: str
    num_bytes: int


@dataclass(frozen=True)
class Reply:
    """A conversation whose assistant's turns are the targets."""

    id: str
    cluster: str
    tokens: TokenSequence
    """As the run's tokenizer reads it."""
    num_bytes: int
    """UTF-8 bytes of the targets."""
    chat: Chat | None
    turns: frozenset[int] = frozenset()
    """Which messages are the targets."""


@dataclass(frozen=True)
class PairItem:
    """Two replies to one prompt."""

    id: str
    cluster: str
    chosen: Reply
    rejected: Reply
    reasons: int = 0
    """Areas that the raters' reasons name, as bits."""


@dataclass(frozen=True)
class Prompt:
    """What a model is asked to answer."""

    id: str
    number: int
    """Of its random stream."""
    ids: np.ndarray
    text: str
    """The last question, for people."""
    chat: Chat | None


class Heldout:
    """The held-out split of a `tokens` artifact, and the items that are chosen from it."""

    def __init__(
        self,
        config: EvaluateConfig,
        tokens: TokensArtifact,
        tokenizer: LoadedTokenizer,
        *,
        settings: TokenizeConfig,
        originals: Originals | None = None,
        texts: Callable[[Sequence[int]], list[str]] | None = None,
    ) -> None:
        """`texts` gives held-out documents by their number; without it they are decoded. `settings` are those that the
        tokens were made with."""
        self.tokens, self.tokenizer = tokens, tokenizer
        self._rule = settings.trained_turns
        num_rows = max(1, config.max_documents_tokens // tokens.sequence_length)
        self.rows = DocumentRows(tokens.documents(Split.HELDOUT), tokens.sequence_length)
        self.row_numbers = evenly(len(self.rows), at_most=num_rows)
        self.documents = self._documents(config.max_documents, texts)
        self.conversations = self._conversations(config.max_instructions, originals)
        self.pair_numbers = evenly(len(tokens.pairs(Split.HELDOUT)), at_most=config.max_preferences)
        self.pairs = self._pairs(tokens.pairs(Split.HELDOUT), originals)
        self.prompts = self._prompts(config.max_prompts, originals)

    def left_out(self, *, has_benchmarks: bool = False) -> dict[str, str]:
        """Return what cannot be measured, by what is missing, and why; raises DataError when nothing can be, and there
        are no benchmarks either."""
        documents = self.tokens.documents(Split.HELDOUT).num_items
        too_short = f"the held-out documents have {documents} tokens together, a row has {self.tokens.sequence_length}"
        missing = {
            "documents": "" if len(self.row_numbers) else too_short if documents else "there are no held-out documents",
            "responses": "" if self.conversations else "there are no held-out conversations",
            "preferences": "" if self.pairs else "there are no held-out preference pairs",
            "prompts": "" if self.prompts else "there are no held-out prompts",
        }
        left_out = {what: reason for what, reason in missing.items() if reason}
        if left_out == missing and not has_benchmarks:
            raise DataError(
                f"there is nothing to evaluate on: {'; '.join(missing.values())}",
                advice="Bring more data, hold out a larger share of it (curate.heldout_fraction), or give benchmarks.",
            )
        return left_out

    def reads_tokens(self, subject: Subject) -> bool:
        """Whether a model has the run's tokenizer and chat template, and so its ids."""
        return subject.tokenizer.digest == self.tokenizer.digest

    def sequence(self, reply: Reply, subject: Subject) -> TokenSequence:
        """Return a conversation as a model reads it; raises Skipped where it cannot."""
        if self.reads_tokens(subject):
            return _fitting(reply.tokens, subject)
        if reply.chat is None:
            raise Skipped(NO_TEXT)
        with_template = _with_template(
            lambda chat: subject.tokenizer.chat().encode(chat.messages, tools=chat.tools, turns=reply.turns), reply.chat
        )
        if not with_template.loss_mask.any():
            raise Skipped(EMPTY)
        return _fitting(TokenSequence(with_template.ids, with_template.loss_mask), subject)

    def prompt_ids(self, prompt: Prompt, subject: Subject, *, max_response_length: int) -> np.ndarray:
        """Return a prompt as a model reads it; raises Skipped where it cannot, or has no room for an answer."""
        if self.reads_tokens(subject):
            ids = prompt.ids
        elif prompt.chat is None:
            raise Skipped(NO_TEXT)
        else:
            ids = _with_template(
                lambda chat: subject.tokenizer.chat().encode_prompt(chat.messages, tools=chat.tools), prompt.chat
            )
        # A model with learned positions has none for what goes beyond, and one with rotary ones writes nonsense there.
        if len(ids) + max_response_length > subject.context_length:
            raise Skipped(TOO_LONG)
        return ids

    def as_answered(self, prompt: Prompt, text: str, *, ended: bool) -> TokenSequence:
        """Return a prompt with an answer in the run's tokens, whatever tokenizer it was written with: what the run's
        reward models read. An answer that did not end gets no end token."""
        if prompt.chat is None:
            raise Skipped(NO_TEXT)
        messages = [*prompt.chat.messages, {"role": "assistant", "content": text}]
        tools, last = prompt.chat.tools, len(messages) - 1
        encoded = _with_template(
            lambda chat: self.tokenizer.chat().encode(chat.messages, tools=chat.tools, turns={last}),
            Chat(messages, tools),
        )
        answer = encoded.ids[encoded.loss_mask == 1]
        ends = np.flatnonzero(answer == self.tokens.eos_id)
        answer = answer[: ends[0] + int(ended)] if len(ends) else answer
        if not len(answer):
            raise Skipped(EMPTY)
        counted = np.concatenate([np.zeros(len(prompt.ids), np.int64), np.ones(len(answer), np.int64)])
        return TokenSequence(np.concatenate([prompt.ids, answer]), counted)

    def _documents(self, at_most: int, texts: Callable[[Sequence[int]], list[str]] | None) -> list[Document]:
        chosen = [int(number) for number in evenly(len(self.tokens.documents(Split.HELDOUT)), at_most=at_most)]
        limit = BYTES_PER_TOKEN * self.tokens.sequence_length
        beginnings = [_beginning(text, limit) for text in self._texts(chosen, texts)]
        kept = [text for text in beginnings if text]
        return [Document(name, text, len(text.encode())) for name, text in zip(_named(kept), kept, strict=True)]

    def _texts(self, numbers: Sequence[int], texts: Callable[[Sequence[int]], list[str]] | None) -> list[str]:
        try:
            if texts is not None:
                return texts(numbers)
        except DataError as error:
            logger.warning("held-out documents are decoded instead: %s", error.message)
        documents, backend = self.tokens.documents(Split.HELDOUT), self.tokenizer.backend
        return [backend.decode(documents[number].tolist(), skip_special_tokens=True) for number in numbers]

    def _conversations(self, at_most: int, originals: Originals | None) -> list[Reply]:
        found = self.tokens.conversations(Split.HELDOUT)
        numbers = [int(number) for number in evenly(len(found), at_most=at_most)]
        sequences = [found[number] for number in numbers]
        chats = [originals.conversations[number] if originals else None for number in numbers]
        names = _named([self._spelled(chat, one.ids) for chat, one in zip(chats, sequences, strict=True)])
        return [
            self._reply(name, _digest(_prompt_of(chat) if chat else name), sequence, chat)
            for name, sequence, chat in zip(names, sequences, chats, strict=True)
        ]

    def _pairs(self, found: PairView, originals: Originals | None) -> list[PairItem]:
        sides = [(found[int(number)], int(number)) for number in self.pair_numbers]
        chats = [originals.pairs[number] if originals else (None, None) for _, number in sides]
        spelled = [
            [self._spelled(chosen, pair.chosen.ids), self._spelled(rejected, pair.rejected.ids)]
            for (pair, _), (chosen, rejected) in zip(sides, chats, strict=True)
        ]
        pairs, reasons = [], self.tokens.pair_reasons(Split.HELDOUT)
        for name, (pair, number), (chosen, rejected) in zip(_named(spelled), sides, chats, strict=True):
            start = int(np.argmax(pair.chosen.loss_mask))
            cluster = _digest(_prompt_of(chosen) if chosen else pair.chosen.ids[:start].tolist())
            pairs.append(
                PairItem(
                    name,
                    cluster,
                    self._reply(f"{name}-chosen", cluster, pair.chosen, chosen, last_only=True),
                    self._reply(f"{name}-rejected", cluster, pair.rejected, rejected, last_only=True),
                    reasons=int(reasons[number]),
                )
            )
        return pairs

    def _prompts(self, at_most: int, originals: Originals | None) -> list[Prompt]:
        found = self.tokens.prompts(Split.HELDOUT)
        texts = json.loads((self.tokens.folder / "prompts" / Split.HELDOUT / "texts.json").read_text())
        numbers = [int(number) for number in evenly(len(found), at_most=at_most)]
        chats = [originals.prompts[number] if originals else None for number in numbers]
        names = _named([self._spelled(chat, found[number]) for number, chat in zip(numbers, chats, strict=True)])
        return [
            Prompt(name, place, found[number], texts[number], chat)
            for place, (name, number, chat) in enumerate(zip(names, numbers, chats, strict=True))
        ]

    def _reply(
        self, name: str, cluster: str, sequence: TokenSequence, chat: Chat | None, *, last_only: bool = False
    ) -> Reply:
        targets = sequence.ids[sequence.loss_mask == 1].tolist()
        text = self.tokenizer.backend.decode(targets, skip_special_tokens=True)
        turns: Iterable[int] = ()
        if chat is not None:
            turns = [len(chat.messages) - 1] if last_only else trained_turns(chat.messages, self._rule)
        return Reply(name, cluster, sequence, len(text.encode()), chat, frozenset(turns))

    def _spelled(self, chat: Chat | None, ids: np.ndarray) -> Any:
        """What an item's id is made from."""
        return [chat.messages, chat.tools] if chat else self.tokenizer.backend.decode(ids.tolist())


def measurable(items: Sequence[Any], read: Callable[[Any], Any], skipped: Counter[str]) -> list[tuple[Any, Any]]:
    """Return the items with what `read` makes of each; count those that raise Skipped."""
    kept = []
    for item in items:
        try:
            kept.append((item, read(item)))
        except Skipped as error:
            skipped[error.reason] += 1
    return kept


def _fitting(sequence: TokenSequence, subject: Subject) -> TokenSequence:
    if len(sequence.ids) > subject.context_length:
        raise Skipped(TOO_LONG)
    return sequence


def _with_template(encode: Callable[[Chat], Any], chat: Chat) -> Any:
    try:
        return encode(chat)
    except Unusable as error:
        raise Skipped(error.reason) from error
    except ConfigError as error:  # the model's template cannot be used at all
        raise Skipped(NO_TEMPLATE) from error


def _prompt_of(chat: Chat) -> Any:
    return [chat.messages[:-1], chat.tools]


def _digest(value: Any) -> str:
    return hashlib.sha256(canonical_json(value)).hexdigest()[:16]


def _named(values: Sequence[Any]) -> list[str]:
    """An id for each item, from what it says; repeated items are numbered."""
    seen: Counter[str] = Counter()
    names = []
    for value in values:
        name = _digest(value)
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return names


def _beginning(text: str, limit: int) -> str:
    """The first bytes of a text, cut between characters."""
    return text.encode()[:limit].decode(errors="ignore")
