"""The run's own held-out data as texts: documents, and conversations with their questions and answers.

A model is measured on it whatever its tokenizer is, so the texts come from the `curated` artifact and not from tokens.
Only the files of the held-out split are read.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from stages.artifacts.manifests import read_manifest
from stages.config.errors import StageError
from stages.config.graph import GRAPH, Stage
from stages.config.request import ArtifactRef
from stages.data.pairs.turns import Message
from stages.data.tokens.views import Split
from stages.job.context import StageContext
from stages.judge.curated import curated_data, lines_of
from stages.judge.subjects import is_permanent

NO_DATA = "no_curated_data"
"""Reason where the texts behind the tokens are gone."""


@dataclass(frozen=True)
class HeldoutDocument:
    """One document that no model of the run was trained on."""

    id: str
    text: str


@dataclass(frozen=True)
class HeldoutConversation:
    """One conversation that no model of the run was trained on, up to an answer."""

    id: str
    prompt: tuple[Message, ...]
    """All messages before the last answer."""
    answer: str
    has_tools: bool = False


class HeldoutRows:
    """Reads the held-out split of a `curated` artifact."""

    def __init__(self, ref: ArtifactRef) -> None:
        self._ref = ref

    def documents(self) -> Iterator[HeldoutDocument]:
        for line in lines_of(self._ref, f"documents/{Split.HELDOUT}/"):
            row = json.loads(line)
            yield HeldoutDocument(str(row["id"]), row["text"])

    def conversations(self) -> Iterator[HeldoutConversation]:
        for line in lines_of(self._ref, f"instructions/{Split.HELDOUT}.jsonl.gz"):
            row = json.loads(line)
            *prompt, last = row["messages"]
            if prompt and last["role"] == "assistant" and isinstance(last.get("content"), str):
                yield HeldoutConversation(str(row["id"]), tuple(prompt), last["content"], bool(row.get("tools")))


def heldout_rows(
    context: StageContext,
) -> tuple[list[HeldoutDocument], list[HeldoutConversation]] | None:
    """Read both, found by lineage as a model that is measured again comes with tokens alone; None where the data is
    gone."""
    try:
        ref = curated_data(context, read_manifest(context.inputs[GRAPH[Stage.TOKENIZE].role]))
        if ref is None:
            return None
        rows = HeldoutRows(ref)
        return list(rows.documents()), list(rows.conversations())
    except (StageError, FileNotFoundError, EOFError, gzip.BadGzipFile, zlib.error, KeyError, ValueError) as error:
        if isinstance(error, StageError) and not is_permanent(error):
            raise
        return None
