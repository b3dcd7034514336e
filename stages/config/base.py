"""The frozen pydantic base of everything that crosses a process; the string under a field is its only documentation."""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Immutable, strict about unknown fields; derive a changed copy with `model_copy(update=...)`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())
