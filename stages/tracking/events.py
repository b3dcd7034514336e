"""What a stage tells MLflow, as typed records: each is a line of the spool.

Surprising on purpose: a spool in the store can be written by everyone who may write to the bucket. So a record names no
path of this machine, no MLflow run, experiment or model, and no tag that decides where it goes; all of these come from
the request and from MLflow itself. A line that says more is not a record.
"""

import base64
import binascii
import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from stages.config.base import Config
from stages.config.errors import DataError
from stages.config.records import first_error
from stages.config.request import FolderName, Manifest

_ENDINGS = (".html", ".json", ".jsonl", ".md", ".svg", ".txt")
_OURS = ("airflow.", "git.", "ray.")


def _artifact_name(name: str) -> str:
    if any(part in ("", ".", "..") for part in name.split("/")) or "\\" in name or not name.isprintable():
        raise ValueError(f"name={name!r} leads out of the run's artifacts; use a relative path with forward slashes")
    if not name.endswith(_ENDINGS) or len(name) > 200:
        raise ValueError(f"name={name!r} is not one of the files that stages write; they end in {', '.join(_ENDINGS)}")
    return name


def _tag_of_ours(key: str) -> str:
    if not key.startswith(_OURS):
        raise ValueError(f"tag {key!r} is not for a stage to set; its tags begin with {', '.join(_OURS)}")
    return key


def _base64(text: str) -> str:
    try:
        base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"content is not base64: {error}") from None
    return text


Milliseconds = Annotated[int, Field(ge=0, le=253_402_300_799_000)]
"""Since the epoch, until the year 9999."""


class _Event(Config):
    # A loss that is not finite is worth knowing; JSON spells it as a string.
    model_config = ConfigDict(allow_inf_nan=True)


class StartEvent(_Event):
    """The stage begins, or another attempt at it."""

    type: Literal["start"] = "start"
    fingerprint: FolderName
    params: dict[str, str] = Field(default_factory=dict)
    tags: dict[Annotated[str, AfterValidator(_tag_of_ours)], str] = Field(default_factory=dict)
    time: Milliseconds


class MetricsEvent(_Event):
    """The metrics of one step."""

    type: Literal["metrics"] = "metrics"
    step: Annotated[int, Field(ge=-(2**53), le=2**53)]
    values: dict[str, float]
    time: Milliseconds


class FileEvent(_Event):
    """A file for the stage's run, or for the pipeline's; it lies next to the spool or, in the store, in the line."""

    type: Literal["file"] = "file"
    name: Annotated[str, AfterValidator(_artifact_name)]
    parent: bool = False
    attachment: FolderName | None = None
    """A file in the folder of the spool, while the spool lies on the worker that writes it."""
    content: Annotated[str, AfterValidator(_base64)] | None = None
    """Base64."""

    @model_validator(mode="after")
    def _one_place(self) -> "FileEvent":
        if (self.attachment is None) == (self.content is None):
            raise ValueError("a file has either an attachment or content")
        return self


class FinishEvent(_Event):
    """The stage ended well."""

    type: Literal["finish"] = "finish"
    manifest: Manifest
    history: str = ""
    """The metrics of every step as JSON lines."""
    time: Milliseconds


class FailEvent(_Event):
    """The attempt failed."""

    type: Literal["fail"] = "fail"
    message: str
    time: Milliseconds


Event = Annotated[StartEvent | MetricsEvent | FileEvent | FinishEvent | FailEvent, Field(discriminator="type")]
_EVENT: TypeAdapter[Event] = TypeAdapter(Event)


def to_line(event: Event) -> bytes:
    """Return the record as one line of valid JSON, without its end."""
    return json.dumps(_spelled(event.model_dump(mode="json")), allow_nan=False).encode()


def from_line(line: bytes) -> Event:
    """Return the record of a line; raises DataError that says what is wrong with it."""
    try:
        return _EVENT.validate_json(line)
    except ValidationError as error:
        raise DataError(first_error(error)) from None


def _spelled(value: Any) -> Any:
    """Spell numbers that JSON does not have as strings, which pydantic reads back, and text that is no Unicode."""
    match value:
        case float() if not math.isfinite(value):
            return str(value)
        case str():
            return value if value.isascii() else value.encode("utf-8", "replace").decode()  # half a surrogate pair
        case Mapping():
            return {_spelled(key): _spelled(item) for key, item in value.items()}
        case list():
            return [_spelled(item) for item in value]
        case _:
            return value
