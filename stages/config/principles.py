"""A constitution: principles by which a model criticises, revises and compares responses, as a file states them."""

from collections import Counter
from typing import Annotated

from pydantic import AfterValidator, Field, field_validator

from stages.config.base import Choice, Config

PRINCIPLES = "principles"
"""Field of the form that names the file, and role of the source."""
SHIPPED = "default"
"""The address of the principles that come with Athanor."""


class Area(Choice):
    """What a principle is about, in the words in which raters give their reasons."""

    HELPFUL = "helpful", "Helpful: it does what was asked for"
    HONEST = "honest", "Honest: it is true, and says what it does not know"
    HARMLESS = "harmless", "Harmless: it hurts nobody"


def _says_something(text: str) -> str:
    if not text.strip():
        raise ValueError("it is empty; write one or two sentences")
    return text.strip()


Request = Annotated[str, Field(max_length=2000), AfterValidator(_says_something)]
"""What the critic is asked."""


class Principle(Config):
    """One principle, as three things that the critic may be asked by it."""

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")
    """Its name in provenance and metrics: small letters, digits and dashes."""
    area: Area
    """What it is about."""
    critique: Request
    """Asks what is wrong with a response."""
    revision: Request
    """Asks for a better response."""
    comparison: Request
    """Asks which of two responses is better."""


class Constitution(Config):
    """The whole file."""

    name: str = Field(min_length=1, max_length=200)
    """What people call it."""
    version: int = Field(ge=1)
    """Raise it with every change; it is kept with what is made."""
    principles: tuple[Principle, ...] = Field(min_length=1)
    """In any order; each is drawn equally often within what its prompt allows."""

    @field_validator("principles")
    @classmethod
    def _ids_differ(cls, principles: tuple[Principle, ...]) -> tuple[Principle, ...]:
        counts = Counter(principle.id for principle in principles)
        if repeated := [name for name, count in counts.items() if count > 1]:
            raise ValueError(f"the ids {repeated} stand there more than once; give each principle an id of its own")
        return principles

    def of(self, areas: frozenset[Area]) -> tuple[Principle, ...]:
        """Return the principles about any of these areas, in the order of the file."""
        return tuple(principle for principle in self.principles if principle.area in areas)
