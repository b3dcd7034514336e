"""Folders that `save_to_disk` of Hugging Face's datasets wrote: which of their files hold the rows.

A dataset lists its files in `state.json`; other .arrow files next to them are caches of what was once computed from it.
A dict of datasets lists its splits in `dataset_dict.json`. One split is read, never all of them together: the training
data would hold the test set.
"""

import posixpath
from collections.abc import Iterable
from typing import Any

from stages.config.errors import ConfigError, DataError
from stages.data.sources.rows import parse_json
from stages.data.sources.storage import ARROW, Listing, Unread
from stages.data.sources.streams import Damaged, Stored, read_whole

_STATE, _INFO, _DICT = "state.json", "dataset_info.json", "dataset_dict.json"
_MAX_BYTES = 16 * 2**20


def without_descriptions(source: str, found: Listing) -> Listing:
    """The listing without the files of saved datasets that hold no rows.

    Raises ConfigError for a dict of several splits, and DataError for a dataset whose files are not all there.
    """
    files = {entry.name: entry for entry in found.files}
    unread: dict[str, str] = {}
    for name in files:
        folder, file = posixpath.split(name)
        if file == _DICT and (splits := _splits(files[name])):
            if len(splits) > 1:
                place = posixpath.join(source.rstrip("/"), folder).rstrip("/")
                raise ConfigError(
                    f"source {source!r} holds a dataset with the splits {', '.join(splits)} ({name})",
                    advice=f"Name the one that is meant: {' or '.join(f'{place}/{split}' for split in splits)}.",
                )
            unread[name] = "dataset_description"
        elif file == _STATE and (state := _object(files[name])) and "_data_files" in state:
            unread |= _not_rows(source, folder, state, files)
    kept = tuple(entry for entry in found.files if entry.name not in unread)
    return Listing(kept, (*found.unread, *(Unread(reason, name) for name, reason in unread.items())))


def _not_rows(source: str, folder: str, state: dict[str, Any], files: Iterable[str]) -> dict[str, str]:
    """Names of the files of one dataset's folder that are not to be read, with the reason."""
    listed = {posixpath.join(folder, name) for name in _names(state["_data_files"])}
    if absent := sorted(listed - set(files)):
        raise DataError(
            f"source {source!r}: {posixpath.join(folder, _STATE)} lists {', '.join(absent)}, which is not there",
            advice="Copy the whole folder again.",
        )
    if _names(state.get("_indices_data_files") or state.get("_indices_files")):
        raise DataError(
            f"source {source!r}: the dataset in {folder or 'it'} is a selection of the rows in its files",
            advice="Save it again with a current version of datasets, which writes only the selected rows.",
        )
    beside = [name for name in files if posixpath.dirname(name) == folder]
    described = {name: "dataset_description" for name in beside if posixpath.basename(name) in (_STATE, _INFO)}
    caches = {name: "not_in_dataset" for name in beside if name.endswith(ARROW) and name not in listed}
    return described | caches


def _names(entries: object) -> list[str]:
    if not isinstance(entries, list):
        return []
    return [str(entry.get("filename", "")) for entry in entries if isinstance(entry, dict)]


def _splits(stored: Stored) -> list[str]:
    found = _object(stored).get("splits")
    return [str(split) for split in found] if isinstance(found, list) else []


def _object(stored: Stored) -> dict[str, Any]:
    """The object in a JSON file; empty for anything else, which is then read as rows and judged there."""
    try:
        found = parse_json(read_whole(stored, _MAX_BYTES))
    except (Damaged, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
