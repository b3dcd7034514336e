"""Where curation keeps its files: acts and workers ask for rows by name and never build a path themselves.

A workbench travels to every worker process, so it holds settings and places only, nothing that was found out. Today
the places are folders that all processes share. A prefix of an object store needs the same few methods.
"""

import gzip
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.config.curate import CurateConfig
from stages.data.sources.records import read_lines, write_lines

SPLITS = ("train", "heldout")


@dataclass(frozen=True)
class Workbench:
    """The settings of one curation, its scratch files, what it publishes, and the previous data that it builds on."""

    config: CurateConfig
    scratch: Path
    """Files between the passes; they are gone after the run."""
    output: Path
    """What is published."""
    previous: Path | None = None
    """The curated data of an earlier run, when this one is an increment."""
    words: tuple[str, ...] = ()
    """The word list of toxicity=`word-list`."""
    made: Mapping[str, Path] = field(default_factory=dict)
    """The data that stages of this run have made, by the name under which it is a source: a file for each kind."""

    def folder(self, name: str) -> str:
        """A scratch folder for a library that writes its own files."""
        return str(self.scratch / name)

    def files(self, name: str, pattern: str) -> list[Path]:
        """The files in a scratch folder, in the order of their names."""
        return sorted((self.scratch / name).glob(pattern))

    def rows(self, name: str, number: int) -> Iterator[dict[str, Any]]:
        """Rows that an earlier pass has set aside as `name` for unit or shard `number`."""
        return read_lines(self._scratch_file(name, number))

    def write_rows(self, name: str, number: int, rows: Iterable[Any]) -> None:
        """Set rows (dataclasses or dicts) aside for a later pass."""
        write_lines(self._scratch_file(name, number), rows)

    @contextmanager
    def row_writer(self, name: str, number: int) -> Iterator[Callable[[Mapping[str, Any]], None]]:
        """As `write_rows`, one row at a time, for rows that are on their way to something else."""
        with self._scratch_file(name, number).open("w", encoding="utf-8") as file:
            yield lambda row: print(json.dumps(row), file=file)

    def _scratch_file(self, name: str, number: int) -> Path:
        self.scratch.mkdir(parents=True, exist_ok=True)
        return self.scratch / f"{number:05d}.{name}.jsonl"

    def publish(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write gzipped JSON lines whose bytes depend on the rows alone: the header has no time and no file name."""
        path = self._output_file(f"{name}.jsonl.gz")
        with path.open("wb") as raw, gzip.GzipFile("", "wb", compresslevel=6, fileobj=raw, mtime=0) as packed:
            with io.TextIOWrapper(packed, encoding="utf-8", newline="\n") as file:
                for row in rows:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def publish_json(self, name: str, value: Any, *, indent: int | None = None) -> None:
        text = json.dumps(value, indent=indent, ensure_ascii=False) + "\n"
        self._output_file(name).write_text(text, encoding="utf-8")

    def publish_bytes(self, name: str, data: bytes) -> None:
        self._output_file(name).write_bytes(data)

    def _output_file(self, name: str) -> Path:
        path = self.output / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def published_documents(self, split: str) -> list[str]:
        """Names of the published files with documents of one split."""
        return published_documents(self.output, split)

    def published_rows(self, name: str) -> Iterator[dict[str, Any]]:
        """Read back what was published under `name`."""
        return published_rows(self.output, name)


def published_documents(curated: Path, split: str) -> list[str]:
    """Names of the files with documents of one split of a curated artifact."""
    return [f"documents/{split}/{path.name}" for path in sorted((curated / "documents" / split).glob("*.jsonl.gz"))]


def published_rows(curated: Path, name: str) -> Iterator[dict[str, Any]]:
    """The rows of one published file of a curated artifact."""
    with gzip.open(curated / name, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)
