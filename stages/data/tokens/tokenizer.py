"""The tokenizer that a run trains, or the one that its base model brings, behind one small object."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from stages.config.errors import ConfigError
from stages.config.tokens import INFER, OWN, PLAIN, TokenizeConfig
from stages.data.tokens.chat import CHAT_TEMPLATE, ChatEncoder
from stages.models.foreign_code import may_run_code

_BOS, _EOS, _PAD = "<|bos|>", "<|end|>", "<|pad|>"
_SPECIAL_TOKENS = [_BOS, _EOS, _PAD, "<|system|>", "<|user|>", "<|assistant|>"]

_PLAIN_TEMPLATE = (
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
    """Whether what the assistant says is inferred from the rendered template instead of marked in it."""

    def chat(self) -> ChatEncoder:
        return ChatEncoder(self.backend, self.chat_template, self.special_tokens, infer_spans=self.infer_spans)

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

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
        """Encode documents: begin token, text without special tokens, end token."""
        self.backend.encode_special_tokens = True
        head = [] if self.bos_id < 0 else [self.bos_id]
        return [
            np.asarray([*head, *encoding.ids, self.eos_id], dtype=np.int64)
            for encoding in self.backend.encode_batch(list(texts), add_special_tokens=False)
        ]

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
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=config.min_word_frequency,
        special_tokens=_SPECIAL_TOKENS,
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
    template = _template(config.chat_template, CHAT_TEMPLATE)
    return LoadedTokenizer(backend, template, special, config.sequence_length, config.chat_template == INFER)


def _template(wanted: str, own: str) -> str:
    """What `tokenize.chat_template` stands for."""
    if wanted == PLAIN:
        return _PLAIN_TEMPLATE
    return own if wanted in (OWN, INFER) else wanted


def given_tokenizer(folder: Path, *, chat_template: str = OWN) -> LoadedTokenizer:
    """Load a base model's tokenizer; raises ConfigError when it is not a fast tokenizer or does not fit the model.

    A tokenizer that begins every text with its begin token gets it in front of the chat template too, if that writes
    none.
    """
    from transformers import AutoConfig, AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)  # a tokenizer's code never runs
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"base_model: no tokenizer in {folder}: {error}",
            advice="Save the model's tokenizer files beside its weights.",
        ) from error
    if not getattr(loaded, "is_fast", False):
        raise ConfigError(
            f"base_model: the tokenizer in {folder} is not a fast tokenizer", advice="Provide its tokenizer.json."
        )
    if not loaded.eos_token:
        raise ConfigError(f"base_model: the tokenizer in {folder} has no end token", advice="Set its eos_token.")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=may_run_code(folder))
    check_growth(loaded.backend_tokenizer, rows=config.vocab_size)
    special = {
        "bos_token": loaded.bos_token or "",
        "eos_token": loaded.eos_token,
        "pad_token": loaded.pad_token or loaded.eos_token,
    }
    template = _template(chat_template, _own_template(loaded) or _PLAIN_TEMPLATE)
    made = LoadedTokenizer(
        loaded.backend_tokenizer, template, special, int(loaded.model_max_length), chat_template == INFER
    )
    if _adds_bos(made) and not made.chat().begins_with(special["bos_token"]):
        made = replace(made, chat_template="{{ bos_token }}" + template)
    return made


def _own_template(loaded: Any) -> str:
    """A tokenizer's chat template; of several named ones the one called `default`."""
    template = loaded.chat_template or ""
    if isinstance(template, dict):
        if "default" not in template:
            raise ConfigError(
                f"base_model: the tokenizer has the chat templates {sorted(template)} and none called 'default'",
                advice="Give the text of the one to use as tokenize.chat_template.",
            )
        template = template["default"]
    return template


def _adds_bos(tokenizer: LoadedTokenizer) -> bool:
    """Whether plain encoding begins with the begin token."""
    tokenizer.backend.encode_special_tokens = False
    ids = tokenizer.backend.encode("a", add_special_tokens=True).ids
    return tokenizer.bos_id >= 0 and ids[:1] == [tokenizer.bos_id]


def check_growth(backend: Tokenizer, *, rows: int) -> int:
    """Return how many rows an embedding of `rows` lacks for this tokenizer.

    Raises ConfigError unless all that it lacks are tokens that somebody added to a vocabulary: a tokenizer whose own
    pieces have no row is another model's.
    """
    without = {index for index in backend.get_vocab(with_added_tokens=True).values() if index >= rows}
    if without - set(backend.get_added_tokens_decoder()):
        raise ConfigError(
            f"base_model: the tokenizer has {backend.get_vocab_size()} entries, the model embeds {rows}; not a pair",
            advice="Use the tokenizer that the model was trained with; only tokens added to it may be new.",
        )
    return max(without, default=rows - 1) + 1 - rows
