"""The `tokens` artifact as typed views: documents, conversations, pairs and prompts of one split."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from stages.config.errors import DataError
from stages.config.principles import Area
from stages.data.tokens.controls import is_of_tokenizers
from stages.data.tokens.packing import TokenSequence
from stages.data.tokens.ragged import Ragged
from stages.data.tokens.reasons import FILE as REASONS
from stages.data.tokens.reasons import names_any


class Split(StrEnum):
    """Held-out data is never trained on."""

    TRAIN = "train"
    HELDOUT = "heldout"


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt; the loss masks cover the answers."""

    chosen: TokenSequence
    rejected: TokenSequence


@dataclass(frozen=True)
class Labelled:
    """One answer to a prompt, found good or bad by itself; the loss mask covers the answer."""

    sequence: TokenSequence
    is_desirable: bool


@dataclass(frozen=True)
class Sources:
    """Which source each conversation or pair is of."""

    names: tuple[str, ...]
    indices: np.ndarray


class TokensArtifact:
    """Opens parts of a `tokens` folder on demand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta = _meta(folder / "meta.json")
        self.sequence_length: int = self.meta["sequence_length"]
        self.vocab_size: int = self.meta["vocab_size"]
        self.pad_id: int = self.meta["pad_id"]
        self.eos_id: int = self.meta["eos_id"]
        """What ends an assistant's turn; documents may end with another token."""
        self.bos_id: int = self.meta["bos_id"]

    @property
    def tokenizer_dir(self) -> Path:
        return self.folder / "tokenizer"

    def tokenizer(self) -> Tokenizer:
        """The tokenizer as it was published; raises DataError when its file is none."""
        path = self.tokenizer_dir / "tokenizer.json"
        try:
            return Tokenizer.from_file(str(path))
        except BaseException as error:
            if not is_of_tokenizers(error):
                raise
            raise DataError(f"{path} is no tokenizer: {error}", advice="Run `tokenize` again.") from error

    def documents(self, split: Split) -> Ragged:
        return self._ragged("documents", split, "tokens")

    def document_bytes(self, split: Split) -> np.ndarray:
        """UTF-8 bytes of each document."""
        return np.load(self.folder / "documents" / split / "bytes.npy")

    def conversations(self, split: Split) -> "SequenceView":
        return SequenceView(self._ragged("conversations", split, "ids"), self._ragged("conversations", split, "mask"))

    def prompts(self, split: Split) -> Ragged:
        """Distinct prompts of the conversations, generation prompt included."""
        return self._ragged("prompts", split, "ids")

    def pairs(self, split: Split) -> "PairView":
        sides = [
            SequenceView(
                self._ragged("preferences", split, f"{side}-ids"), self._ragged("preferences", split, f"{side}-mask")
            )
            for side in ("chosen", "rejected")
        ]
        return PairView(*sides)

    def pair_kinds(self, split: Split) -> list[str]:
        return json.loads((self.folder / "preferences" / split / "kinds.json").read_text())

    def pair_margins(self, split: Split) -> np.ndarray | None:
        """By how much the chosen response of each pair is better, 0 where its row does not say; None without any."""
        path = self.folder / "preferences" / split / "margins.npy"
        return np.load(path) if path.exists() else None

    def pair_reasons(self, split: Split) -> np.ndarray:
        """The areas that the reason of each pair names, as bits (`stages.data.tokens.reasons`); 0 for none."""
        return self._reasons("preferences", split, len(self.pairs(split)))

    def pairs_naming(self, split: Split, areas: Sequence[Area]) -> np.ndarray:
        """Return which pairs name one of these areas, in order; of no areas, all pairs."""
        return np.flatnonzero(names_any(self.pair_reasons(split), areas))

    def unpaired_reasons(self, split: Split) -> np.ndarray:
        """The same of each answer with a label of its own."""
        return self._reasons("unpaired", split, len(self.unpaired(split)))

    def unpaired(self, split: Split) -> "UnpairedView":
        """Answers with a label of their own; none in a folder of data that has no such source."""
        folder = self.folder / "unpaired" / split
        if not folder.exists():
            return UnpairedView(None, np.zeros(0, dtype=np.uint8))
        answers = SequenceView(self._ragged("unpaired", split, "ids"), self._ragged("unpaired", split, "mask"))
        return UnpairedView(answers, np.load(folder / "labels.npy"))

    def unpaired_sources(self, split: Split) -> "Sources":
        if not (self.folder / "unpaired" / split).exists():
            return Sources((), np.zeros(0, dtype=np.int32))
        return self._sources("unpaired", split)

    def conversation_sources(self, split: Split) -> "Sources":
        return self._sources("conversations", split)

    def pair_sources(self, split: Split) -> "Sources":
        return self._sources("preferences", split)

    def _sources(self, part: str, split: Split) -> "Sources":
        folder = self.folder / part / split
        return Sources(tuple(json.loads((folder / "sources.json").read_text())), np.load(folder / "sources.npy"))

    def _reasons(self, part: str, split: Split, size: int) -> np.ndarray:
        path = self.folder / part / split / REASONS
        return np.load(path) if path.exists() else np.zeros(size, dtype=np.uint8)

    def _ragged(self, part: str, split: Split, name: str) -> Ragged:
        return Ragged(self.folder / part / split, name)


def _meta(path: Path) -> dict[str, Any]:
    names = ("sequence_length", "vocab_size", "pad_id", "eos_id", "bos_id")
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: {error}", advice="Run `tokenize` again.") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} is no JSON object", advice="Run `tokenize` again.")
    if wrong := [name for name in names if not isinstance(found.get(name), int)]:
        raise DataError(f"{path} has no whole number as {', '.join(wrong)}", advice="Run `tokenize` again.")
    return found


class SequenceView:
    """Ids and loss masks as TokenSequence, by index."""

    def __init__(self, ids: Ragged, mask: Ragged) -> None:
        self._ids, self._mask = ids, mask

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> TokenSequence:
        return TokenSequence(self._ids[index], self._mask[index])

    @property
    def num_targets(self) -> np.ndarray:
        """Trained tokens of each sequence."""
        return np.asarray([int(self._mask[index].sum()) for index in range(len(self))], dtype=np.int64)

    @property
    def lengths(self) -> np.ndarray:
        return self._ids.lengths


class PairView:
    """Chosen and rejected sequences by index."""

    def __init__(self, chosen: SequenceView, rejected: SequenceView) -> None:
        self.chosen, self.rejected = chosen, rejected

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Pair:
        return Pair(self.chosen[index], self.rejected[index])

    @property
    def num_targets(self) -> np.ndarray:
        """Trained tokens of each pair, both answers together."""
        return self.chosen.num_targets + self.rejected.num_targets


class UnpairedView:
    """Labelled sequences by index."""

    def __init__(self, answers: SequenceView | None, labels: np.ndarray) -> None:
        self._answers, self._labels = answers, labels

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def num_targets(self) -> np.ndarray:
        """Trained tokens of each answer."""
        return self._answers.num_targets if self._answers is not None else np.zeros(0, dtype=np.int64)

    def __getitem__(self, index: int) -> Labelled:
        assert self._answers is not None
        return Labelled(self._answers[index], bool(self._labels[index]))


def require(items: int, what: str, *, advice: str) -> None:
    """Raise DataError when there is nothing to train or to evaluate on."""
    if items == 0:
        raise DataError(f"there are no {what}", advice=advice)


def evenly(num_items: int, *, at_most: int) -> np.ndarray:
    """Return up to `at_most` indices spread evenly over range(num_items): the same ones every time, of every source."""
    return np.unique(np.linspace(0, num_items - 1, num=min(at_most, num_items)).astype(np.int64))
