"""The frozen pydantic base of everything that crosses a process; the string under a field is its only documentation."""

from enum import StrEnum

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Immutable, strict about unknown fields; derive a changed copy with `model_copy(update=...)`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


class Choice(StrEnum):
    """A string to choose from, written as `NAME = "value", "what people read in the form"`."""

    _value_: str
    label: str

    def __new__(cls, value: str, label: str = "") -> "Choice":
        choice = str.__new__(cls, value)
        choice._value_ = value
        choice.label = label or value
        return choice
