"""Many short sequences in one row, without a token of one seeing another.

The document mask is carried by `position_ids`, which start again at 0 in every sequence: transformers derives the
block-diagonal causal mask from them. Padding tokens are sequences of length one, so no row of the mask is empty.

Shape legend: B rows, T positions of a row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from stages.config.errors import DataError

PADDING = -1
"""Segment id of padding."""


@dataclass(frozen=True)
class Packed:
    """One micro-batch. A token with `loss_mask` 1 is a target; it is predicted from the position before it."""

    input_ids_BT: Tensor
    position_ids_BT: Tensor
    segment_ids_BT: Tensor
    """Number of the sequence in this micro-batch, -1 for padding."""
    loss_mask_BT: Tensor
    num_segments: int
    fields: Mapping[str, Tensor] = field(default_factory=dict)
    """Further values per token, shape (B, T)."""

    def to(self, device: torch.device) -> "Packed":
        return Packed(
            self.input_ids_BT.to(device),
            self.position_ids_BT.to(device),
            self.segment_ids_BT.to(device),
            self.loss_mask_BT.to(device),
            self.num_segments,
            {name: tensor.to(device) for name, tensor in self.fields.items()},
        )

    @property
    def num_targets(self) -> int:
        return int(self.loss_mask_BT.sum())


@dataclass(frozen=True)
class TokenSequence:
    """Token ids of one sequence, which of them are targets, and further values per token."""

    ids: np.ndarray
    loss_mask: np.ndarray
    fields: Mapping[str, np.ndarray] = field(default_factory=dict)


def plan_rows(lengths: Sequence[int] | np.ndarray, row_length: int) -> list[list[int]]:
    """Assign sequences to rows in the given order (next fit): deterministic, and close to full for short sequences.

    Raises DataError for a sequence longer than a row.
    """
    rows: list[list[int]] = []
    free = 0
    for index, length in enumerate(lengths):
        if length > row_length:
            raise DataError(
                f"sequence {index} has {length} tokens, a row holds {row_length}",
                advice="Raise tokenize.sequence_length or shorten the data; `tokenize` drops and counts such rows.",
            )
        if length > free:
            rows.append([])
            free = row_length
        rows[-1].append(index)
        free -= int(length)
    return rows


def collate(rows: Sequence[Sequence[TokenSequence]], row_length: int) -> Packed:
    """Lay out rows of sequences; segments are numbered in reading order."""
    shape = (len(rows), row_length)
    input_ids = np.zeros(shape, dtype=np.int64)
    position_ids = np.zeros(shape, dtype=np.int64)
    segment_ids = np.full(shape, PADDING, dtype=np.int64)
    loss_mask = np.zeros(shape, dtype=np.int64)
    names = rows[0][0].fields.keys() if rows and rows[0] else ()
    fields = {name: np.zeros(shape, dtype=np.float32) for name in names}
    segment = 0
    for b, row in enumerate(rows):
        start = 0
        for sequence in row:
            span = slice(start, start + len(sequence.ids))
            input_ids[b, span] = sequence.ids
            position_ids[b, span] = np.arange(len(sequence.ids))
            segment_ids[b, span] = segment
            loss_mask[b, span] = sequence.loss_mask
            loss_mask[b, start] = 0  # nothing precedes the first token
            for name, values in sequence.fields.items():
                fields[name][b, span] = values
            start = span.stop
            segment += 1
    return Packed(
        torch.from_numpy(input_ids),
        torch.from_numpy(position_ids),
        torch.from_numpy(segment_ids),
        torch.from_numpy(loss_mask),
        segment,
        {name: torch.from_numpy(values) for name, values in fields.items()},
    )


def pack(sequences: Sequence[TokenSequence], row_length: int) -> Packed:
    """Plan and lay out sequences in their order."""
    plan = plan_rows([len(sequence.ids) for sequence in sequences], row_length)
    return collate([[sequences[index] for index in row] for row in plan], row_length)


def split_by_rows(groups: Sequence[Sequence[int]], *, row_length: int, max_rows: int) -> list[range]:
    """Cut groups of sequence lengths (a pair's two answers, say) into consecutive ranges of at most `max_rows` rows.

    A group is never split, so that a loss over the group sees all of it.
    """
    ranges: list[range] = []
    start, lengths = 0, []
    for index, group in enumerate(groups):
        if lengths and len(plan_rows([*lengths, *group], row_length)) > max_rows:
            ranges.append(range(start, index))
            start, lengths = index, []
        lengths.extend(group)
    if lengths:
        ranges.append(range(start, len(groups)))
    return ranges
