"""Decisions over all documents at once: what earlier data has seen, which copies are extra, what is over the cap.

They need no texts, so they work on columns with one entry a document, in the order of units and of documents in them.
"""

from collections.abc import Sequence, Sized
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from stages.data.curation.dedup_keys import KEY, extra_copies, text_key
from stages.data.sources.records import SourceDocument, stable_hash, utf8_size


class Mark(IntEnum):
    """Why a pass over a shard must drop a document; columns of marks hold the numbers."""

    NONE = 0
    SEEN_BEFORE = 1
    EXACT_DUPLICATE = 2
    OVER_MAX_BYTES = 3
    NEAR_DUPLICATE = 4
    NEAR_DUPLICATE_OF_SEEN = 5

    @property
    def reason(self) -> str:
        """The name in the ledger."""
        return self.name.lower()


@dataclass(frozen=True)
class Documents:
    """What is known of documents, one column a property; about 35 bytes a document."""

    keys: np.ndarray
    """Hashes of the texts, see `dedup_keys`."""
    sizes: np.ndarray
    draws: np.ndarray
    """Hashes of seed and id: the order in which `max_bytes` takes documents."""
    heldout: np.ndarray
    planted: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def num_bytes(self) -> int:
        return int(self.sizes.sum())


def describe(documents: Sequence[SourceDocument], *, seed: int) -> Documents:
    """The columns of documents whose texts are in memory."""
    return Documents(
        keys=np.array([text_key(entry.text) for entry in documents], dtype=KEY),
        sizes=np.array([utf8_size(entry.text) for entry in documents], dtype=np.int64),
        draws=np.array([stable_hash(seed, "cap", entry.id) for entry in documents], dtype=np.uint64),
        heldout=np.array([entry.heldout for entry in documents], dtype=bool),
        planted=np.array([bool(entry.planted) for entry in documents], dtype=bool),
    )


def joined(parts: Sequence[Documents]) -> Documents:
    """The columns of several units, end to end."""
    return Documents(
        keys=np.concatenate([part.keys for part in parts]),
        sizes=np.concatenate([part.sizes for part in parts]),
        draws=np.concatenate([part.draws for part in parts]),
        heldout=np.concatenate([part.heldout for part in parts]),
        planted=np.concatenate([part.planted for part in parts]),
    )


def parted(column: np.ndarray, parts: Sequence[Sized]) -> list[np.ndarray]:
    """Cut a column over all documents into one for each of the units or shards that it was joined from."""
    return np.split(column, np.cumsum([len(part) for part in parts])[:-1])


def mark(documents: Documents, *, max_bytes: int, seen: np.ndarray) -> np.ndarray:
    """What earlier increments, exact copies and the cap take, as a column of marks; 0 for what stays."""
    marks = np.zeros(len(documents), dtype=np.uint8)
    marks[extra_copies(documents.keys, heldout=documents.heldout, planted=documents.planted)] = Mark.EXACT_DUPLICATE
    # Overwrites: of a text that was seen before, every copy goes under that reason.
    marks[np.isin(documents.keys, seen)] = Mark.SEEN_BEFORE
    marks[_over_cap(documents, marks == Mark.NONE, max_bytes)] = Mark.OVER_MAX_BYTES
    return marks


def _over_cap(documents: Documents, stays: np.ndarray, max_bytes: int) -> np.ndarray:
    """Places beyond `max_bytes` of the documents that stay, in the order of the draw."""
    places = np.flatnonzero(stays)
    if not max_bytes:
        return places[:0]
    # Ties of the draw keep the order of documents. The document that crosses the limit is over it, as are all after.
    order = places[np.argsort(documents.draws[places], kind="stable")]
    return order[np.cumsum(documents.sizes[order]) > max_bytes]


def judged(documents: Documents, marks: np.ndarray) -> np.ndarray:
    """Keys of all documents except those that the cap left out, which may come again."""
    return documents.keys[marks != Mark.OVER_MAX_BYTES]


def near_copies(clusters: np.ndarray, seen: np.ndarray, *, heldout: np.ndarray, planted: np.ndarray) -> np.ndarray:
    """Marks for all but the best document of every cluster, and for all of a cluster of which one was seen before.

    `clusters` has -1 for a document without a near copy. Planted documents measure the filters and are not matched
    with earlier data.
    """
    marks = np.zeros(len(clusters), dtype=np.uint8)
    members = np.flatnonzero(clusters >= 0)
    extra = extra_copies(clusters[members], heldout=heldout[members], planted=planted[members])
    marks[members[extra]] = Mark.NEAR_DUPLICATE
    # Likeness is not transitive, so a chain of near copies may reach text that was seen: the whole cluster goes.
    known_clusters = np.unique(clusters[seen & (clusters >= 0)])
    marks[(seen | np.isin(clusters, known_clusters)) & ~planted] = Mark.NEAR_DUPLICATE_OF_SEEN
    return marks
