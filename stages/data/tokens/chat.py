"""Conversations to token ids, with a mask over what the assistant said.

The ids are those of `apply_chat_template`, with two promises that it does not make: a special string inside a message
never becomes a special id, and the token that ends an assistant's turn is trained even when it doubles as padding,
because the mask comes from the template and not from comparing ids.

How: the template is rendered around placeholders, once for each sequence of roles. Every control token that the
template wrote is replaced by a stand-in, the messages are put in, and the whole text is encoded by a copy of the
tokenizer that knows the stand-ins and takes control tokens for plain text.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from stages.config.errors import ConfigError, StageError
from stages.data.pairs.turns import Message, Unusable
from stages.data.tokens.bounded import Endless, bounded, computes_powers
from stages.data.tokens.controls import RESERVED, control_tokens, copy_with_stand_ins, encodable

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>{% generation %}{{ message['content'] }}{{ eos_token }}"
    "{% endgeneration %}{% else %}<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""The template of tokenizers that we train: everything around a message's text is a special token."""

_PLACEHOLDER = re.compile("(\u2003?)\ue000(\\d+)\ue001(\u2003?)")
"""A placeholder for a message. The wide spaces around it are missing where the template trims."""
_MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_DATE = "26 Jul 2024"
"""The date in templates that show one, so that tokens are the same on every day. Llama's templates default to it."""


@dataclass(frozen=True)
class EncodedChat:
    """Ids of a conversation; `loss_mask` is 1 on the assistant's tokens, end token included."""

    ids: np.ndarray
    loss_mask: np.ndarray


@dataclass(frozen=True)
class _Piece:
    """Part of a rendered template: text with stand-ins, or the place of a message."""

    text: str
    trained: bool
    message: int | None = None
    is_trimmed: tuple[bool, bool] = (False, False)
    """Whether the template takes white space off the message's begin, and off its end."""

    def filled(self, messages: Sequence[Message]) -> str:
        if self.message is None:
            return self.text
        text = messages[self.message]["content"]
        text = text.lstrip() if self.is_trimmed[0] else text
        return text.rstrip() if self.is_trimmed[1] else text


class ChatEncoder:
    """Encodes conversations by a chat template; `check` says whether it can be trained with."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat_template: str,
        special_tokens: Mapping[str, str],
        *,
        infer_spans: bool = False,
        origin: str = "",
    ) -> None:
        """With `infer_spans`, an assistant's turn reaches from the generation prompt to the control token after its
        text; otherwise the template's {% generation %} markers delimit it. `origin` says in errors where the template
        comes from."""
        self._template, self._special_tokens, self._infer = chat_template, dict(special_tokens), infer_spans
        self._name = f"the chat template of {origin}" if origin else "the chat template"
        if computes_powers(chat_template):
            raise ConfigError(f"{self._name} computes powers, which nothing limits", advice=_ADVICE)
        self._skeletons: dict[tuple[tuple[str, ...], bool], tuple[_Piece, ...]] = {}
        named = set(self._special_tokens.values())
        self._controls = control_tokens(tokenizer, self._written(), named)
        self._copy, self._stand_ins, self._real_ids = copy_with_stand_ins(tokenizer, self._controls)
        # Longest first, so that a token is never matched as the beginning of a longer one.
        names = sorted((token.content for token in self._controls.values()), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, names)) or r"(?!)")

    def encode(self, messages: Sequence[Message]) -> EncodedChat:
        """Encode a whole conversation; raises Unusable for one that the template cannot hold."""
        if not self._infer and not _MARKERS.search(self._template):
            raise ConfigError(
                f"{self._name} has no {{% generation %}} markers, so nothing says which tokens the assistant wrote",
                advice="Set tokenize.chat_template='infer' to take each assistant turn up to the token that ends it, "
                "or give a template with {% generation %} ... {% endgeneration %} around the assistant's text.",
            )
        return self._encode(messages, add_generation_prompt=False)

    def encode_prompt(self, messages: Sequence[Message]) -> np.ndarray:
        """Encode what precedes the assistant's next turn, generation prompt included."""
        return self._encode(messages, add_generation_prompt=True).ids

    def check(self) -> int:
        """Return the id that ends an assistant's turn; raises ConfigError for a template that would train wrongly."""
        if "strftime_now" in self._template and "date_string" not in self._template:
            raise ConfigError(f"{self._name} prints today's date: tokens would differ from day to day", advice=_ADVICE)
        turns = [{"role": role, "content": text} for role, text in zip(_PROBE_ROLES, _PROBE_TEXTS, strict=True)]
        try:
            whole = self.encode(turns)
            prompts = [self.encode_prompt(turns[:length]) for length in (1, 3)]
        except Unusable as error:
            raise ConfigError(
                f"{self._name} cannot hold a question and an answer twice: {_why(error)}", advice=_ADVICE
            ) from error
        ends = [int(whole.ids[stop - 1]) for _, stop in _runs(whole.loss_mask)]
        if len(ends) != 2 or ends[0] != ends[1] or ends[0] not in self._controls:
            shown = self._copy.decode(whole.ids[whole.loss_mask == 1].tolist(), skip_special_tokens=False)
            raise ConfigError(
                f"{self._name} does not train each assistant turn with the token that ends it: of two turns it "
                f"trains {len(ends)}, together {shown!r}",
                advice=_ADVICE,
            )
        for prompt, (start, _) in zip(prompts, _runs(whole.loss_mask), strict=True):
            if len(prompt) != start or not np.array_equal(whole.ids[:start], prompt):
                raise ConfigError(
                    f"{self._name}: its generation prompt differs from what precedes the assistant's turn in a "
                    f"conversation: {self._copy.decode(prompt.tolist(), skip_special_tokens=False)!r}",
                    advice="A model would be prompted in another way than it was trained; " + _ADVICE,
                )
        self._require_one_bos(whole.ids, ends[0])
        return ends[0]

    def _require_one_bos(self, ids: np.ndarray, end: int) -> None:
        bos = self._copy.token_to_id(self._special_tokens.get("bos_token") or "")
        count = int((ids == bos).sum()) if bos is not None and bos != end else 0
        if count > 1 or (count == 1 and ids[0] != bos):
            raise ConfigError(f"{self._name} writes the begin token {count} times", advice=_ADVICE)

    def begins_with(self, token: str) -> bool:
        """Whether the template writes this token first."""
        return self._written().startswith(token)

    @property
    def control_ids(self) -> Collection[int]:
        """Ids of the tokens that control the model; text that spells one out is ordinary text."""
        return self._controls.keys()

    def _written(self) -> str:
        """All that the template writes around two questions and answers, and around the next answer."""
        texts = []
        for roles, prompted in ((_PROBE_ROLES, False), (_PROBE_ROLES[:1], True)):
            try:
                texts.append(self._render(roles, add_generation_prompt=prompted)[0])
            except Unusable as error:
                raise ConfigError(
                    f"{self._name} cannot hold a question and an answer twice: {_why(error)}", advice=_ADVICE
                ) from error
        return "".join(texts)

    def _encode(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> EncodedChat:
        roles = tuple(message["role"] for message in messages)
        pieces = self._pieces(roles, add_generation_prompt=add_generation_prompt)
        texts: list[str] = []
        trained: list[np.ndarray] = []
        for piece in pieces:
            text = piece.filled(messages)
            # A stand-in inside a message would become a control token, which is what this class rules out.
            if piece.message is not None and RESERVED in text:
                raise Unusable("reserved_character")
            texts.append(text)
            trained.append(np.full(len(text), piece.trained))
        with encodable():
            encoding = self._copy.encode("".join(texts), add_special_tokens=False)
        ids = self._real_ids[np.asarray(encoding.ids, dtype=np.int64)]
        # before[i] counts the trained characters before character i, so a token is trained when its range of
        # characters holds at least one of them: that decides for tokens which cross the border of a piece.
        before = np.concatenate([[0], np.cumsum(np.concatenate(trained))])
        starts, stops = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2).T
        return EncodedChat(ids, (before[stops] > before[starts]).astype(np.int64))

    def _pieces(self, roles: tuple[str, ...], *, add_generation_prompt: bool) -> tuple[_Piece, ...]:
        """The rendered template, cut at messages and where trained text begins and ends."""
        key = (roles, add_generation_prompt)
        if key not in self._skeletons:
            text, spans = self._render(roles, add_generation_prompt=add_generation_prompt)
            if self._infer and not add_generation_prompt:
                spans = list(self._inferred(text, roles))
            self._skeletons[key] = tuple(self._cut(text, spans))
        return self._skeletons[key]

    def _render(self, roles: Sequence[str], *, add_generation_prompt: bool) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        marked = [{"role": role, "content": f"\u2003\ue000{i}\ue001\u2003"} for i, role in enumerate(roles)]
        names: dict[str, Any] = {**self._special_tokens, "date_string": _DATE}
        try:
            answer: Any = bounded(
                lambda: render_jinja_template(
                    conversations=[marked],
                    chat_template=self._template,
                    return_assistant_tokens_mask=bool(_MARKERS.search(self._template)),
                    add_generation_prompt=add_generation_prompt,
                    **names,
                )
            )
        except (Endless, RecursionError, MemoryError) as error:
            reason = str(error) or "it needs too much memory"
            raise ConfigError(f"{self._name} does not end: {reason}", advice=_ADVICE) from error
        except StageError:  # SIGTERM's
            raise
        except Exception as error:
            raise Unusable("refused_by_template") from error
        (text,), marked_spans = answer
        spans = marked_spans[0] if marked_spans else []
        # Every message exactly once and in order, or masks would be laid over the wrong text.
        if [int(match[2]) for match in _PLACEHOLDER.finditer(text)] != list(range(len(roles))):
            raise Unusable("left_out_by_template")
        return text, spans

    def _inferred(self, text: str, roles: Sequence[str]) -> Iterator[tuple[int, int]]:
        """From the end of the generation prompt, which precedes each assistant turn, to the end of the control token
        after the turn's text."""
        places = list(_PLACEHOLDER.finditer(text))
        for index, place in enumerate(places):
            if roles[index] == "assistant":
                asked, _ = self._render(roles[:index], add_generation_prompt=True)
                limit = places[index + 1].start() if index + 1 < len(places) else len(text)
                end = self._control.search(text, place.end(), limit)
                # Where a template renders the prompt otherwise at the end, take the text alone.
                start = len(asked) if text.startswith(asked) else place.start()
                yield start, end.end() if end else place.end()

    def _cut(self, text: str, spans: Sequence[tuple[int, int]]) -> Iterator[_Piece]:
        position = 0
        edges = sorted({edge for span in spans for edge in span})
        for match in (*_PLACEHOLDER.finditer(text), None):
            stop = match.start() if match else len(text)
            for start, end in _between(position, stop, edges):
                part = self._control.sub(lambda control: self._stand_ins[control[0]], text[start:end])
                yield _Piece(part, _inside(start, spans))
            if match:
                trims = (not match[1], not match[3])
                yield _Piece("", _inside(match.start(), spans), message=int(match[2]), is_trimmed=trims)
                position = match.end()


def _why(error: Unusable) -> str:
    """The ledger's reason, with what the template itself said."""
    return f"{error.reason} ({error.__cause__})" if error.__cause__ else error.reason


_PROBE_ROLES = ("user", "assistant", "user", "assistant")
_PROBE_TEXTS = ("first question", "first answer", "second question", "second answer")
_ADVICE = "fix the template and give its text as tokenize.chat_template, or set that to 'plain'."


def _runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """Start and stop of each stretch of ones."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]])))
    return [(int(start), int(stop)) for start, stop in zip(edges[::2], edges[1::2], strict=True)]


def _between(start: int, stop: int, edges: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Split [start, stop) at the edges."""
    cuts = [start, *(edge for edge in edges if start < edge < stop), stop]
    return ((left, right) for left, right in pairwise(cuts) if left < right)


def _inside(position: int, spans: Sequence[tuple[int, int]]) -> bool:
    return any(start <= position < stop for start, stop in spans)
