"""The tokenizer that a run trains, or the one that its base model brings, as one small object."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from stages.config.errors import ConfigError
from stages.config.tokens import AUTO, INFER, OWN, PLAIN, TokenizeConfig
from stages.data.tokens.chat import CHAT_TEMPLATE, ChatEncoder
from stages.data.tokens.controls import encodable, plain_text_copy

_BOS, _EOS, _PAD = "<|bos|>", "<|end|>", "<|pad|>"
_SPECIAL_TOKENS = [_BOS, _EOS, _PAD, "<|system|>", "<|user|>", "<|assistant|>"]

PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}Assistant:"
    "{% generation %} {{ message['content'] }}{{ eos_token }}{% endgeneration %}\n"
    "{% else %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""For base models without a template: plain words, so that the vocabulary need not grow."""


@dataclass(frozen=True)
class LoadedTokenizer:
    """A fast tokenizer with its chat template and special ids."""

    backend: Tokenizer
    chat_template: str
    special_tokens: dict[str, str]
    """`bos_token`, `eos_token`, `pad_token`: the names that templates use."""
    max_length: int
    infer_spans: bool = False
    """Whether the assistant's text is inferred from the rendered template instead of marked in it."""
    template_origin: str = ""
    """The folder that the template comes from, for errors; empty where it is ours or the user's."""

    def chat(self) -> ChatEncoder:
        return self._chat

    @cached_property
    def _chat(self) -> ChatEncoder:
        return ChatEncoder(
            self.backend,
            self.chat_template,
            self.special_tokens,
            infer_spans=self.infer_spans,
            origin=self.template_origin,
        )

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id: ids may have holes, so the number of entries says nothing about their width."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @cached_property
    def digest(self) -> str:
        """Hash over all that decides which ids a text or a conversation gets; equal for a copy in another folder."""
        backend = json.loads(self.backend.to_str())
        decisive = {name: backend.get(name) for name in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
        told = [decisive, self.chat_template, self.special_tokens, self.infer_spans]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    @property
    def bos_id(self) -> int:
        return self._id("bos_token")

    @property
    def eos_id(self) -> int:
        return self._id("eos_token")

    @property
    def pad_id(self) -> int:
        return self._id("pad_token")

    def _id(self, name: str) -> int:
        token = self.special_tokens[name]
        found = self.backend.token_to_id(token) if token else None
        return -1 if found is None else found

    def encode_texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode documents: begin token, text without control tokens, end token."""
        head = [] if self.bos_id < 0 else [self.bos_id]
        return [np.asarray([*head, *ids, self.eos_id], dtype=np.int64) for ids in self.encode_plain(texts)]

    def encode_plain(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode texts alone: no begin and end token, and what looks like a control token is text."""
        with encodable():
            encodings = self._for_text.encode_batch(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int64) for encoding in encodings]

    @cached_property
    def text_prefix(self) -> np.ndarray:
        """What plain transformers puts before a text, such as the begin token; empty for many tokenizers."""
        with encodable():
            whole = self.backend.encode("a").ids
            bare = self.backend.encode("a", add_special_tokens=False).ids
        start = next((at for at in range(len(whole)) if whole[at : at + len(bare)] == bare), 0)
        return np.asarray(whole[:start], dtype=np.int64)

    @cached_property
    def _for_text(self) -> Tokenizer:
        """Encodes control tokens that a text spells out as ordinary text, also those that are not marked as special."""
        return plain_text_copy(self.backend, self.chat().control_ids)

    def save(self, folder: Path) -> None:
        """Write the Hugging Face files; plain transformers then gives the same ids."""
        from transformers import PreTrainedTokenizerFast

        self.backend.encode_special_tokens = False
        saved = PreTrainedTokenizerFast(
            tokenizer_object=self.backend, model_max_length=self.max_length, **self.special_tokens
        )
        saved.chat_template = self.chat_template
        saved.save_pretrained(folder)


def train_tokenizer(texts: Iterator[str], config: TokenizeConfig) -> LoadedTokenizer:
    """Train a byte-level BPE; raises ConfigError when the text has too few distinct pieces for `vocab_size`."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        # One token a digit, so that numbers of any length are built from the same ten pieces.
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=config.min_word_frequency,
        special_tokens=_SPECIAL_TOKENS,
        # All 256 bytes, so that no text is unknown whatever the tokenizer was trained on.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    reached = backend.get_vocab_size()
    if reached < config.vocab_size:
        raise ConfigError(
            f"tokenize.vocab_size={config.vocab_size} but the text supports only {reached} entries",
            advice=f"Set tokenize.vocab_size to at most {reached}, or bring more text.",
        )
    backend.post_processor = processors.TemplateProcessing(
        single=f"{_BOS} $A", pair=f"{_BOS} $A $B", special_tokens=[(_BOS, backend.token_to_id(_BOS))]
    )
    special = {"bos_token": _BOS, "eos_token": _EOS, "pad_token": _PAD}
    template = marked_template(config.chat_template, CHAT_TEMPLATE)
    made = LoadedTokenizer(backend, template, special, config.sequence_length)
    return with_spans(made, config.chat_template)


def with_spans(tokenizer: LoadedTokenizer, wanted: str) -> LoadedTokenizer:
    """The tokenizer with the spans that `tokenize.chat_template` asks for.

    A template that ends an assistant's turn only when another turn follows gets that token at its end, too.
    """
    is_given = wanted in (OWN, PLAIN)
    if is_given or (wanted != INFER and tokenizer.chat().marks_turns):
        return tokenizer
    made = replace(tokenizer, infer_spans=True)
    if end := made.chat().missing_end:
        made = replace(made, chat_template=made.chat_template.removesuffix("\n") + _CLOSED % json.dumps(end))
    return made


_CLOSED = (
    "{%% if messages and messages[-1]['role'] == 'assistant' and not add_generation_prompt %%}{{ %s }}{%% endif %%}"
)


def marked_template(wanted: str, own: str) -> str:
    """The text of the template that `tokenize.chat_template` names."""
    if wanted == PLAIN:
        return PLAIN_TEMPLATE
    return own if wanted in (AUTO, OWN, INFER) else wanted
