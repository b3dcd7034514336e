"""The key of an endpoint: read from the environment of this process, and never told."""

import os

from stages.config.errors import ConfigError


def key_in(variable: str, *, field: str) -> str:
    """Read the key; empty without a variable. Errors name the variable and never what is in it."""
    if not variable:
        return ""
    key = os.environ.get(variable, "").strip()  # a file that it was read from ends with a line end
    if not key:
        raise ConfigError(
            f"{field}={variable!r} is not set where Ray's processes run",
            advice="Set it in the environment of Ray's workers, or leave api_key_env empty.",
        )
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(
            f"{field}={variable!r} holds characters that no HTTP header may have; allowed are "
            "printable ASCII characters",
            advice="Set it again in the environment of Ray's workers: the key alone, without line ends in it.",
        )
    return key
