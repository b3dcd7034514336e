"""Settings of `tokenize`: the tokenizer, the chat template and the packed shards."""

from pydantic import Field

from stages.config.base import Config


class TokenizeConfig(Config):
    """Byte-level BPE, chat template, packed token shards."""

    vocab_size: int = Field(default=8192, ge=300, le=2**20)
    """Entries of the vocabulary, special tokens included; ignored when a base model brings its tokenizer."""
    sequence_length: int = Field(default=512, ge=16)
    """Tokens in a packed sequence: the context that models are trained with."""
    bpe_train_bytes: int = Field(default=8_000_000, ge=1000)
    """Text that the tokenizer is trained on, taken evenly over the documents."""
    max_prompt_length: int = Field(default=256, ge=1)
    """Prompts with more tokens are dropped and counted."""
    min_word_frequency: int = Field(default=2, ge=1)
    """Merges must be seen this often."""
    base_model: str = ""
    """Where the tokenizer comes from when a base model is given; filled from the form."""
