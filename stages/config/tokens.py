"""Settings of `tokenize`: the tokenizer, the chat template and the packed shards."""

from typing import Literal

from pydantic import Field, field_validator

from stages.config.base import Config

OWN, INFER, PLAIN = "own", "infer", "plain"


class TokenizeConfig(Config):
    """Byte-level BPE, chat template, packed token shards."""

    vocab_size: int = Field(default=8192, ge=300, le=2**20)
    """Size of the vocabulary, special tokens included; ignored when a base model brings its tokenizer."""
    sequence_length: int = Field(default=512, ge=16)
    """Tokens in a packed sequence: the context that models are trained with."""
    bpe_train_bytes: int = Field(default=8_000_000, ge=1000)
    """Text that the tokenizer is trained on, taken evenly over the documents."""
    max_prompt_length: int = Field(default=256, ge=1)
    """PPO skips prompts with more tokens; their conversations and pairs are still trained on."""
    too_long: Literal["drop", "truncate"] = "drop"
    """What happens to a conversation longer than `sequence_length`: it is dropped, or cut after the last answer that
    fits. Both are counted, in conversations and in tokens."""
    chat_template: str = OWN
    """`own`: the tokenizer's, which must mark the assistant's text with {% generation %}. `infer`: the tokenizer's,
    unmarked; the assistant's text is taken up to the special token that ends its turn. `plain`: User: and Assistant: as
    plain text. Anything else is the text of a Jinja template with markers."""
    min_word_frequency: int = Field(default=2, ge=1)
    """How often a pair must occur to be merged."""
    base_model: str = ""
    """Where the tokenizer comes from when a base model is given; filled from the form."""

    @field_validator("chat_template")
    @classmethod
    def _template_is_a_word_or_a_template(cls, value: str) -> str:
        if value not in (OWN, INFER, PLAIN) and "{{" not in value:
            raise ValueError(f"chat_template={value!r} is neither 'own', 'infer', 'plain' nor the text of a template")
        return value
