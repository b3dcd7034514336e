"""Rows of Hugging Face data sets. A data set is read within itself, whatever files its card names: the card is data,
written by whoever may push to the data set."""

import contextlib
import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import parse_qs

from stages.config.errors import ConfigError, StageError
from stages.config.places import check_source, hub_name, is_within, real_path
from stages.data.sources.records import BadRecord, Row


@dataclass(frozen=True)
class HubDataset:
    """What an hf:// address says."""

    name: str
    config: str | None
    split: str
    text: str | None
    revision: str | None


def parse_hub(uri: str) -> HubDataset:
    """Read `hf://name?split=train&config=..&text=..&revision=..`; raises ConfigError for anything else."""
    name = hub_name(uri)
    query = {key: values[-1] for key, values in parse_qs(uri.partition("?")[2]).items()}
    unknown = sorted(set(query) - {"split", "config", "text", "revision"})
    if not name or "#" in uri or unknown:
        why = f"unknown {unknown}" if unknown else "'#' is no part of it" if "#" in uri else "it names no dataset"
        raise ConfigError(
            f"source {uri!r} is not understood: {why}",
            advice="Write hf://name?split=train&config=..&text=..&revision=..; only these four are known.",
        )
    return HubDataset(name, query.get("config"), query.get("split", "train"), query.get("text"), query.get("revision"))


def read_hub(uri: str) -> Iterator[Row | BadRecord]:
    """Rows of a Hugging Face dataset, streamed."""
    wanted = parse_hub(uri)
    with loading(uri):
        rows = cast(Any, _builder(wanted, uri).as_streaming_dataset(split=wanted.split))
        if rows.features:
            # Or the path in a row of an image or a sound would be opened, wherever it leads.
            rows = rows.decode(False)
    number = 0
    try:
        for values in rows:
            number += 1
            yield Row(number, dict(cast(Any, values)), len(str(values)))
    except StageError:
        raise
    except Exception as error:
        if _is_outage(error):
            raise StageError(
                f"source {uri!r} broke off after row {number}, the hub does not answer: {error}",
                advice="Check that the machine of the Ray job reaches the hub.",
            ) from error
        # A library's error in the middle of its files; what follows cannot be reached.
        if isinstance(error, MemoryError | OSError) and not isinstance(error, gzip.BadGzipFile):
            raise
        yield BadRecord(f"{wanted.name}:{number + 1}", "unreadable_row", 0, str(error)[:200])


def hub_splits(name: str, config: str | None) -> Any:
    """All splits of a Hugging Face dataset, loaded; with the same checks as its rows."""
    uri = f"hf://{name}"
    with loading(uri):
        builder = _builder(HubDataset(name, config, split="", text=None, revision=None), uri)
        builder.download_and_prepare()
        return builder.as_dataset()


def _builder(wanted: HubDataset, uri: str) -> Any:
    """What loads a dataset; raises ConfigError for one that is none, or that reads files outside itself."""
    check_source(uri)
    from datasets import load_dataset_builder
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    if wanted.name in _PACKAGED_DATASETS_MODULES:
        raise ConfigError(
            f"source {uri!r} names a file format, which would read the job's working folder",
            advice="Give the name of a dataset; files and folders are sources by their path.",
        )
    builder = load_dataset_builder(wanted.name, wanted.config, revision=wanted.revision)
    _refuse_files_elsewhere(builder, wanted.name, uri)
    return builder


@contextlib.contextmanager
def loading(uri: str) -> Iterator[None]:
    """Tell an outage of the hub from a dataset that is not there or is broken."""
    try:
        yield
    except (StageError, MemoryError):  # ours, and SIGTERM's
        raise
    except Exception as error:
        if _is_outage(error):
            raise StageError(
                f"source {uri!r} cannot be loaded, the hub does not answer: {error}",
                advice="Check that the machine of the Ray job reaches the hub, or give its files as a folder.",
            ) from error
        # What a card or a file breaks first has any type: YAML's own, RuntimeError for a script, ImportError, ...
        raise ConfigError(
            f"source {uri!r} cannot be loaded: {error}",
            advice="Check name, config and split, and that the machine of the Ray job reaches the hub.",
        ) from error


def _is_outage(error: Exception) -> bool:
    """Whether the hub was not reached, or said that it cannot answer now; a hub that is switched off never will."""
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import httpx

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500 or error.response.status_code == 429
    return isinstance(error, httpx.RequestError | ConnectionError | TimeoutError) and not is_offline_mode()


def _refuse_files_elsewhere(builder: Any, name: str, uri: str) -> None:
    """Raise ConfigError for a data set that names files outside itself: of this machine, or of any web server."""
    root = real_path(name)
    for files in (builder.config.data_files or {}).values():
        for file in files:
            inside = str(file).startswith("hf://") or ("://" not in file and is_within(real_path(file), root))
            if not inside:
                raise ConfigError(
                    f"source {uri!r} names a file outside the data set: {str(file)!r}",
                    advice="Correct data_files in the data set's README.md, or give its files as a folder.",
                )
