"""Benchmarks where they lie: what identifies them, their rows, and the folder of a task file as a local copy.

A task file of lm-evaluation-harness names data, other task files and functions by relative paths, so a task is its
whole folder: all of it is in the digest, and nothing outside of it is read.
"""

import hashlib
import importlib.metadata
import importlib.util
import logging
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from stages.config.benchmarks import LM_EVAL, Benchmark
from stages.config.errors import ConfigError, DataError
from stages.config.graph import BENCHMARKS
from stages.config.places import real_path
from stages.data.sources.hub import loading, parse_hub, read_hub
from stages.data.sources.readers import data_files
from stages.data.sources.records import BadRecord, Row
from stages.data.sources.rows import read_rows
from stages.data.sources.storage import ROW_SUFFIXES, Listing, identity, list_objects
from stages.data.sources.streams import Damaged, Stored, open_raw

logger = logging.getLogger(__name__)

HARNESS = "lm_eval"
FILE_READERS = ("json", "csv", "parquet", "text")
"""Readers of files that run no code and unpickle nothing, by their names in `datasets`."""
_DATA_SET = re.compile(r"^\s*dataset_path:\s*['\"]?([\w./-]+)", re.MULTILINE)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LARGEST_FOLDER = 2**30
"""Bytes of a task's folder, which is copied to where it is run."""


def harness_version() -> str:
    """Version of lm-evaluation-harness; raises ConfigError where it is not installed."""
    try:
        return importlib.metadata.version(HARNESS)
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(
            "benchmarks: a task of lm-evaluation-harness, which is not installed where Ray's processes run",
            advice="Install the extra `eval` there (pip install 'athanor[eval]'), or give the items as a file.",
        ) from None


def snapshot_benchmark(uri: str) -> str:
    """The identity of a benchmark's content, as a hex digest; raises ConfigError when there is none."""
    if uri.startswith("hf://"):
        wanted = parse_hub(uri)
        lines = [str(wanted), _hub_commit(wanted.name, wanted.revision)]
    elif uri.startswith(LM_EVAL):
        # The task's items come from the hub, by names that this version of the harness fixes.
        version, folder = harness_version(), installed_folder(uri.removeprefix(LM_EVAL))
        texts = [path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.glob("**/*.yaml"))]
        lines = [uri, f"{HARNESS}=={version}", *_data_set_commits(texts)]
    elif Benchmark(uri=uri).is_task:
        files = _listed(_folder_of(uri)).files
        texts = [_text_of(stored) for stored in files if stored.name.endswith((".yaml", ".yml"))]
        lines = [f"{HARNESS}=={harness_version()}", *map(identity, files), *_data_set_commits(texts)]
    else:
        lines = list(map(identity, _listed(uri).files))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def installed_folder(name: str) -> Path:
    """The folder of a task or group that the harness brings; raises ConfigError when it brings none of that name."""
    found = importlib.util.find_spec(f"{HARNESS}.tasks")
    assert found is not None
    assert found.origin is not None
    wanted = re.compile(rf"^(?:task|group):\s*['\"]?{re.escape(name)}['\"]?\s*$", re.MULTILINE)
    for path in sorted(Path(found.origin).parent.glob("**/*.yaml")):
        if wanted.search(path.read_text(encoding="utf-8", errors="replace")):
            return path.parent
    raise ConfigError(
        f"benchmarks: {HARNESS} {harness_version()} has no task {name!r}",
        advice=f"List its tasks with `python -m {HARNESS} ls tasks`.",
    )


def _data_set_commits(texts: Iterable[str]) -> list[str]:
    """The data sets of the hub that task files name, each with the commit that it is at."""
    names = sorted({found[1] for text in texts for found in _DATA_SET.finditer(text)} - set(FILE_READERS))
    return [f"{name}@{_hub_commit(name, None)}" for name in names]


def _hub_commit(name: str, revision: str | None) -> str:
    """What the items of a data set are identified by: without it, changed items would be taken for those that were
    measured. Where the hub is switched off, only what is kept on this machine can be read."""
    from huggingface_hub import HfApi
    from huggingface_hub.constants import is_offline_mode

    if Path(folder := real_path(name)).is_dir():
        return " ".join(map(identity, _listed(folder).files))
    if (revision and _COMMIT.fullmatch(revision)) or is_offline_mode():
        return revision or "offline"
    with loading(f"hf://{name}"):
        return str(HfApi().dataset_info(name, revision=revision).sha)


def _text_of(stored: Stored) -> str:
    with open_raw(stored) as source:
        return source.read().decode(errors="replace")


def identify_benchmark(uri: str) -> str:
    """As `snapshot_benchmark`, for an evaluation after hours of training: a benchmark that is gone since the look costs
    its own suites, so it has an identity too."""
    try:
        return snapshot_benchmark(uri)
    except (ConfigError, DataError) as error:
        logger.warning("benchmark %s is gone: %s", uri, error.message)
        return hashlib.sha256(f"gone {uri}".encode()).hexdigest()


def benchmark_rows(uri: str) -> Iterator[tuple[str, Row | BadRecord]]:
    """Rows of all files of a benchmark, each with its file's name (empty where there is only one)."""
    if uri.startswith("hf://"):
        for row in read_hub(uri):
            yield "", row
        return
    files = data_files(uri, ROW_SUFFIXES).files
    for stored in files:
        for row in read_rows(stored):
            yield stored.name if len(files) > 1 else "", row


def copied_task(uri: str, into: Path) -> Path:
    """Copy the folder of a task file, without links and hidden files, and return the path of the task file in it."""
    listing = _listed(_folder_of(uri))
    if (size := sum(stored.size for stored in listing.files)) > _LARGEST_FOLDER:
        raise ConfigError(
            f"benchmarks: the folder of {uri!r} has {size} bytes, more than {_LARGEST_FOLDER}",
            advice="Put the task into a folder of its own, with its data and nothing else.",
        )
    for stored in listing.files:
        target = into / stored.name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open_raw(stored) as source, target.open("wb") as copy:
                shutil.copyfileobj(source, copy)
        except Damaged as error:
            raise DataError(f"benchmarks: {uri!r}: {error}", advice="Let the workers' account read it.") from None
    task = into / uri.rpartition("/")[2]
    if not task.is_file():
        raise ConfigError(f"benchmarks: {uri!r} does not exist", advice="Give the address of a task file.")
    return task


def _folder_of(uri: str) -> str:
    """The folder that a task file lies in."""
    folder, slash, _ = uri.rpartition("/")
    if not slash:
        return "."
    return f"{folder}/" if folder.startswith("s3://") else folder or "/"


def _listed(uri: str) -> Listing:
    return list_objects(uri, field=BENCHMARKS)
