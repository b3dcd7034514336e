"""What `convert` makes of a GGUF file."""

from typing import Literal

from stages.config.base import Config


class ConvertConfig(Config):
    """A given GGUF file as a Hugging Face model."""

    dtype: Literal["bf16", "fp32"] = "bf16"
    """Type of the stored weights: `fp32` keeps what the file says exactly, `bf16` rounds it to 8 significant bits and
    takes half the space. Stages compute with the same precision either way."""
