"""The run's own held-out data as texts: documents, and conversations with their questions and answers.

A model is measured on it whatever its tokenizer is, so the texts come from the `curated` artifact and not from tokens.
"""

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.config.errors import DataError
from stages.config.graph import GRAPH, Stage
from stages.data.pairs.turns import Message


@dataclass(frozen=True)
class HeldoutDocument:
    """One document that no model of the run was trained on."""

    id: str
    text: str
    group: str


@dataclass(frozen=True)
class HeldoutConversation:
    """One conversation that no model of the run was trained on, up to an answer."""

    id: str
    prompt: tuple[Message, ...]
    """All messages before the last answer."""
    answer: str
    has_tools: bool = False


class HeldoutRows:
    """Opens parts of a `curated` folder on demand."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def documents(self) -> Iterator[HeldoutDocument]:
        for path in sorted((self._folder / "documents" / "heldout").glob("*.jsonl.gz")):
            for row in _rows(path):
                yield HeldoutDocument(str(row["id"]), row["text"], str(row.get("group", "")))

    def conversations(self) -> Iterator[HeldoutConversation]:
        path = self._folder / "instructions" / "heldout.jsonl.gz"
        for row in _rows(path) if path.is_file() else ():
            *prompt, last = row["messages"]
            if prompt and last["role"] == "assistant" and isinstance(last.get("content"), str):
                yield HeldoutConversation(str(row["id"]), tuple(prompt), last["content"], bool(row.get("tools")))


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)
    except (OSError, EOFError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read: {error}", advice=f"Run `{GRAPH[Stage.CURATE].stage}` again."
        ) from error
