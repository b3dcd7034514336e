"""Documents as rows of equal length: what pretraining trains on, and what perplexity is measured on."""

import numpy as np

from stages.data.tokens.packing import TokenSequence
from stages.data.tokens.ragged import Ragged


class DocumentRows:
    """The documents of a split one after another, cut into rows of equal length; the rest at the end is left out."""

    def __init__(self, documents: Ragged, row_length: int) -> None:
        self._documents, self._row_length = documents, row_length

    def __len__(self) -> int:
        return self._documents.num_items // self._row_length

    def __getitem__(self, index: int) -> list[TokenSequence]:
        start, stop = index * self._row_length, (index + 1) * self._row_length
        ids = self._documents.slice(start, stop)
        inner = self._documents.offsets
        # Offsets strictly inside the row: there a document ends, and attention and position ids start anew.
        first, last = np.searchsorted(inner, [start + 1, stop])
        pieces = np.split(ids, inner[first:last] - start)
        return [TokenSequence(piece, np.ones(len(piece), dtype=np.int64)) for piece in pieces if len(piece)]
