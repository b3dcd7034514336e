"""Conversations to token ids, with a mask over what the assistant said.

Two promises that plain `apply_chat_template` plus tokenisation does not make: a special string inside a message never
becomes a special id, and the assistant's end token is trained even when it doubles as padding, because the mask comes
from the template's generation markers and not from comparing ids.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from stages.config.errors import ConfigError

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>{% generation %}{{ message['content'] }}{{ eos_token }}"
    "{% endgeneration %}{% else %}<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Template of tokenizers that we train. Every piece around a message's text is a special token."""

_PLACEHOLDER = re.compile("\ue000(\\d+)\ue001")


@dataclass(frozen=True)
class EncodedChat:
    """Ids of a conversation; `loss_mask` is 1 on the assistant's tokens, end token included."""

    ids: np.ndarray
    loss_mask: np.ndarray


class ChatEncoder:
    """Renders the template around placeholders and encodes template and contents apart."""

    def __init__(self, tokenizer: Tokenizer, chat_template: str, special_tokens: dict[str, str]) -> None:
        if not re.search(r"\{%-?\s*generation\s*-?%\}", chat_template):
            raise ConfigError(
                "the chat template has no {% generation %} markers, so nothing says which tokens the assistant wrote",
                advice="Mark the assistant's text in the template with {% generation %} ... {% endgeneration %}.",
            )
        self._tokenizer = tokenizer
        self._template = chat_template
        self._special_tokens = special_tokens

    def encode(self, messages: Sequence[dict[str, str]]) -> EncodedChat:
        """Encode a whole conversation."""
        ids, mask = self._encode(messages, add_generation_prompt=False)
        return EncodedChat(np.asarray(ids, dtype=np.int64), np.asarray(mask, dtype=np.int64))

    def encode_prompt(self, messages: Sequence[dict[str, str]]) -> np.ndarray:
        """Encode what precedes the assistant's next turn, generation prompt included."""
        return np.asarray(self._encode(messages, add_generation_prompt=True)[0], dtype=np.int64)

    def _encode(
        self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool
    ) -> tuple[list[int], list[int]]:
        text, spans = self._render(messages, add_generation_prompt=add_generation_prompt)
        ids: list[int] = []
        mask: list[int] = []
        position = 0
        for match in (*_PLACEHOLDER.finditer(text), None):
            end = match.start() if match else len(text)
            for piece_start, piece_end in _cut(position, end, spans):
                self._append(ids, mask, text[piece_start:piece_end], inside=_inside(piece_start, spans), special=True)
            if match:
                content = messages[int(match[1])]["content"]
                self._append(ids, mask, content, inside=_inside(match.start(), spans), special=False)
                position = match.end()
        return ids, mask

    def _render(self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool) -> tuple[str, list[Any]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        marked = [{"role": m["role"], "content": f"\ue000{i}\ue001"} for i, m in enumerate(messages)]
        names: dict[str, Any] = dict(self._special_tokens)
        answer: Any = render_jinja_template(
            conversations=[marked],
            chat_template=self._template,
            return_assistant_tokens_mask=True,
            add_generation_prompt=add_generation_prompt,
            **names,
        )
        (text,), (spans,) = answer
        return text, spans

    def _append(self, ids: list[int], mask: list[int], text: str, *, inside: bool, special: bool) -> None:
        if not text:
            return
        self._tokenizer.encode_special_tokens = not special
        encoded = self._tokenizer.encode(text, add_special_tokens=False).ids
        ids.extend(encoded)
        mask.extend([int(inside)] * len(encoded))


def _cut(start: int, end: int, spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Split [start, end) where a generation span begins or ends."""
    edges = sorted({start, end, *(edge for span in spans for edge in span if start < edge < end)})
    return list(pairwise(edges))


def _inside(position: int, spans: Sequence[tuple[int, int]]) -> bool:
    return any(start <= position < end for start, end in spans)
