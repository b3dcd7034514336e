"""The string under a field is its help."""

from stages.config.base import Config
from stages.config.help import field_help


class Settings(Config):
    documented: int = 1
    """What it means,
    on two lines."""
    silent: int = 2


class Further(Settings):
    own: str = "a"
    """Added by the subclass."""


def test_the_string_under_a_field_is_its_help_also_in_subclasses() -> None:
    assert field_help(Further) == {
        "documented": "What it means,\non two lines.",
        "silent": "",
        "own": "Added by the subclass.",
    }
