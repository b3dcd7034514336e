"""Settings of `tokenize`: the tokenizer, the chat template and the packed shards."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from stages.config.base import AddedLater, Config

AUTO, OWN, INFER, PLAIN = "auto", "own", "infer", "plain"


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
    chat_template: str = AUTO
    """`auto`: the tokenizer's, trained where its {% generation %} markers say so; where it has none, or they leave out
    the token that ends a turn, as with `infer`. The stage says which. `own`: the tokenizer's, which must have markers.
    `infer`: the tokenizer's; the assistant's text is taken up to the special token that ends its turn. `plain`: User:
    and Assistant: as plain text. Anything else is the text of a Jinja template, with or without markers."""
    thinking: Annotated[Literal["keep", "drop"], AddedLater("keep")] = "keep"
    """What the assistant thought (`<think>...</think>` before its answer, or `reasoning_content`): `keep` renders it as
    the template does, which may leave out that of earlier turns; `drop` takes it out before."""
    trained_turns: Annotated[Literal["all", "last", "weight"], AddedLater("all")] = "all"
    """Which turns of the assistant conversations train: all of them, the last one, or those that do not have OpenAI's
    `weight: 0`. With `all` and `last`, a conversation in which such a turn would be trained is dropped."""
    min_word_frequency: int = Field(default=2, ge=1)
    """How often a pair must occur to be merged."""
    base_model: str = ""
    """Where the tokenizer comes from when a base model is given; filled from the form."""

    @field_validator("chat_template")
    @classmethod
    def _template_is_a_word_or_a_template(cls, value: str) -> str:
        if value not in (AUTO, OWN, INFER, PLAIN) and "{{" not in value:
            raise ValueError(
                f"chat_template={value!r} is neither 'auto', 'own', 'infer', 'plain' nor the text of a template"
            )
        return value

    def identity(self, *, only_given: bool = False) -> dict[str, Any]:
        """The tokenizers that we train have markers, so for them `auto` makes what `own` made before there was it."""
        found = super().identity(only_given=only_given)
        if found.get("chat_template") == AUTO and not self.base_model:
            found["chat_template"] = OWN
        return found
