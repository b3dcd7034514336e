"""Preference data that waits for a retraining: what was announced, what was used, and what was set aside.

The watermark is `retrain/<run name>.json` in the artifact store. An announcement comes only once, so a source stays
pending until a retraining with it succeeds. One that can never succeed would hold back all others: it is set aside with
the reason, when it is announced or by the run that fails over it. What may be a passing fault never sets it aside.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pydantic import Field, ValidationError

from stages.artifacts.store import Store, write_json
from stages.config.base import Config
from stages.config.curate import DERIVED
from stages.config.errors import Category, ConfigError, DataError, StageError
from stages.config.places import bucket_and_key, check_source, local_path
from stages.config.records import parse_record
from stages.config.request import Failure
from stages.config.sources import PreferenceFormat, parse_source, parse_sources

logger = logging.getLogger(__name__)

_OWN_FAULTS = frozenset({Category.CONFIG.value, Category.DATA.value})
# What curate says with category `config` although an outage or missing rights can be the cause.
_MAY_PASS = ("cannot be listed", "cannot be loaded")
_LONGEST_REASON = 1000


class Watermark(Config):
    """What retraining has seen."""

    documents: str = ""
    """Digest of the listing."""
    preferences: tuple[str, ...] = ()
    """Preference data that a retraining has used."""
    pending: tuple[str, ...] = ()
    """Announced preference data that no retraining has used yet."""
    set_aside: dict[str, str] = Field(default_factory=dict)
    """Announced preference data that cannot be used, and why; the form of `retrain` takes it back or forgets it."""


@dataclass(frozen=True)
class Sorted:
    """The watermark with all announcements in it, and what has just been set aside."""

    watermark: Watermark
    set_aside: dict[str, str] = field(default_factory=dict)


def sort_out(
    before: Watermark, *, announced: Sequence[str], given: Sequence[str], take_back: bool, forget: Iterable[str]
) -> Sorted:
    """Put announced and given sources among the pending ones, or aside when they cannot be used.

    Raises ConfigError for a source that a person gives in the form: it can be corrected there.
    """
    for uri in given:
        if reason := fault_of(uri):
            raise ConfigError(f"preferences={uri!r} {reason}", advice="Correct the line, or leave it out.")
    again = before.set_aside if take_back else ()
    aside = {uri: reason for uri, reason in before.set_aside.items() if uri not in {*again, *given, *forget}}
    wanted = dict.fromkeys((*before.pending, *again, *announced, *given))
    pending: dict[str, str] = {}
    faults: dict[str, str] = {}
    for uri in wanted:
        if uri in before.preferences or uri in forget or uri in aside:
            continue
        if reason := fault_of(uri):
            faults[uri] = reason
        else:
            # Two lines of one source would be refused by every run.
            pending.setdefault(parse_source(uri).uri, uri)
    update = {"pending": tuple(pending.values()), "set_aside": {**aside, **faults}}
    return Sorted(before.model_copy(update=update), faults)


def put_aside(before: Watermark, faults: Mapping[str, str]) -> Watermark:
    """Move pending sources aside."""
    pending = tuple(uri for uri in before.pending if uri not in faults)
    return before.model_copy(update={"pending": pending, "set_aside": {**before.set_aside, **faults}})


def fault_of(uri: str) -> str:
    """Return why a source can never be used, as far as Airflow can tell; empty when it is fine or not for us to say."""
    try:
        (source,) = parse_sources("preferences", [uri], PreferenceFormat)
    except ValueError as error:
        return f"is refused: {error}"
    if not source.uri.strip():
        return "is blank"
    if source.uri == DERIVED:
        return ""
    try:
        check_source(source.uri)
    except ConfigError as error:
        return f"is refused: {error.message}"
    if source.uri.startswith("hf://"):
        return ""
    return _missing_object(source.uri) if source.uri.startswith("s3://") else _missing_path(source.uri)


def _missing_path(uri: str) -> str:
    """A path is judged where Airflow sees the folder that it should be in; others may exist on the workers alone."""
    path = local_path(uri)
    try:
        if path.is_absolute() and path.parent.is_dir() and not path.exists():
            return f"does not exist: there is no {path.name!r} in {path.parent}"
    except (OSError, ValueError) as error:  # a name that is too long, or holds a NUL
        return f"is no path: {error}"
    return ""


def _missing_object(uri: str) -> str:
    from stages.artifacts.s3 import S3Store
    from stages.artifacts.s3_client import HASTY

    bucket, key = bucket_and_key(uri)
    store, key = S3Store(bucket, "", HASTY), key.rstrip("/")
    try:
        found = next(store.listing(), None) if not key else store.exists(key) or next(store.list(key), None)
    except FileNotFoundError:
        return f"does not exist: there is no bucket {bucket!r}"
    except StageError as error:
        logger.warning("%s cannot be looked up, and stays pending: %s", uri, error.message)
        return ""
    return "" if found else "does not exist: there is no object of that name and none below it"


def fault_in(failure: bytes, sources: Iterable[str]) -> tuple[str, str] | None:
    """Return the source that a stage's `failure.json` blames, and its words; None for any other failure."""
    try:
        told = Failure.model_validate_json(failure)
    except ValidationError:
        return None
    if told.category not in _OWN_FAULTS or any(words in told.message for words in _MAY_PASS):
        return None
    # The longest first: a source may lie below another one.
    for uri in sorted(sources, key=len, reverse=True):
        name = parse_source(uri).uri
        for spelling in (name, repr(name)[1:-1]):
            if re.search(rf"(?<![\w/.:-]){re.escape(spelling)}(?![\w.-])", told.message):
                return uri, told.message[:_LONGEST_REASON]
    return None


def as_sentence(set_aside: Mapping[str, str]) -> str:
    """Say what is set aside; empty when nothing is."""
    if not set_aside:
        return ""
    number = f"{len(set_aside)} source is" if len(set_aside) == 1 else f"{len(set_aside)} sources are"
    return (
        f"{number} set aside: {', '.join(sorted(set_aside))}. Repair them and trigger retrain with take_back, or name "
        "them in forget."
    )


def read_watermark(store: Store, run_name: str) -> Watermark:
    """Read what the last retraining left; raises DataError when the record is damaged."""
    key = watermark_key(run_name)
    try:
        return parse_record(Watermark, store.read_bytes(key), f"{store.root_uri}/{key}")
    except FileNotFoundError:
        return Watermark()
    except DataError as error:
        raise DataError(
            error.message,
            advice="Repair it, or delete it: the next retraining then takes all documents for new, and pending "
            "preference data must be given again.",
        ) from None


def write_watermark(store: Store, run_name: str, watermark: Watermark) -> None:
    write_json(store, watermark_key(run_name), watermark.model_dump(mode="json"))


def watermark_key(run_name: str) -> str:
    return f"retrain/{run_name}.json"
