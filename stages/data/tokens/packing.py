"""Many sequences in one micro-batch, without padding, and no token attends to another sequence.

Sequences are laid end to end; `spans_D4` says where each begins and what it may look back to. A sequence that begins
like the one before it (a rejected answer after the chosen one) can leave that beginning out and look back to it there.

Shape legend: B rows (one here; engines may think in more), T positions of a row, D laid-out sequences.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from stages.config.errors import DataError


@dataclass(frozen=True)
class Packed:
    """One micro-batch. A token with `loss_mask` 1 is a target; it is predicted from the token before it in its
    sequence."""

    input_ids_BT: Tensor
    position_ids_BT: Tensor
    segment_ids_BT: Tensor
    """Number of the sequence in this micro-batch."""
    loss_mask_BT: Tensor
    num_segments: int
    spans_D4: Tensor
    """Start and end of each sequence, and of the earlier tokens that it continues, over all rows; on the CPU."""
    fields: Mapping[str, Tensor] = field(default_factory=dict)
    """Further values per token, shape (B, T)."""

    def to(self, device: torch.device) -> "Packed":
        return Packed(
            input_ids_BT=_copied(self.input_ids_BT, device),
            position_ids_BT=_copied(self.position_ids_BT, device),
            segment_ids_BT=_copied(self.segment_ids_BT, device),
            loss_mask_BT=_copied(self.loss_mask_BT, device),
            num_segments=self.num_segments,
            spans_D4=self.spans_D4,  # stays on the CPU: attention loops over it, and would wait for a GPU
            fields={name: _copied(tensor, device) for name, tensor in self.fields.items()},
        )

    @property
    def num_targets(self) -> int:
        return int(self.loss_mask_BT.sum())

    @property
    def num_tokens(self) -> int:
        return self.input_ids_BT.numel()


def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    """To a GPU from page-locked memory, because a copy from ordinary memory waits until the GPU has finished its queue.
    torch keeps the locked memory until the copy is over."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@dataclass(frozen=True)
class TokenSequence:
    """Token ids of one sequence, which of them are targets, and further values per token."""

    ids: np.ndarray
    loss_mask: np.ndarray
    fields: Mapping[str, np.ndarray] = field(default_factory=dict)
    shared: int = 0
    """Leading tokens that the sequence before begins with too, and that are laid out only there."""

    @property
    def num_laid_out(self) -> int:
        return len(self.ids) - self.shared


def prompt_and_response(
    prompt: np.ndarray, response: np.ndarray, fields: Mapping[str, np.ndarray] | None = None
) -> TokenSequence:
    """Join both; the targets are the response's tokens. `fields` holds a value per token of the response."""
    head = np.zeros(len(prompt), dtype=np.float32)
    return TokenSequence(
        np.concatenate([prompt, response]),
        np.concatenate([np.zeros(len(prompt), dtype=np.int64), np.ones(len(response), dtype=np.int64)]),
        {name: np.concatenate([head, values]).astype(np.float32) for name, values in (fields or {}).items()},
    )


def all_targets(ids: np.ndarray) -> TokenSequence:
    """A sequence whose every token but the first, which nothing precedes, is a target."""
    return TokenSequence(ids, np.ones(len(ids), dtype=np.int64))


@dataclass(frozen=True)
class RowBudget:
    """How much one micro-batch holds."""

    row_length: int
    max_rows: int

    def cut(self, sequences: Sequence[TokenSequence]) -> list[list[TokenSequence]]:
        """Cut sequences into consecutive micro-batches, to be laid out one by one; their order is kept."""
        plan = plan_rows([len(sequence.ids) for sequence in sequences], self.row_length)
        return [
            [sequences[index] for row in plan[start : start + self.max_rows] for index in row]
            for start in range(0, len(plan), self.max_rows)
        ]


def plan_rows(lengths: Sequence[int] | np.ndarray, row_length: int) -> list[list[int]]:
    """Assign sequences to rows in the given order (next fit): deterministic, and close to full for short sequences.

    Raises DataError for a sequence longer than a row.
    """
    # Next fit never looks back at an earlier row, so sequences stay in the order in which training draws them.
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


def collate(rows: Sequence[Sequence[TokenSequence]]) -> Packed:
    """Lay out planned rows: they bound a micro-batch's memory, and are laid end to end without padding."""
    return lay_out([sequence for row in rows for sequence in row])


def lay_out(sequences: Sequence[TokenSequence]) -> Packed:
    """Lay sequences end to end in one row; segments are numbered in their order."""
    total = sum(sequence.num_laid_out for sequence in sequences)
    numbers = {name: np.zeros(total, dtype=np.int64) for name in ("ids", "positions", "segments", "mask")}
    fields = {name: np.zeros(total, dtype=np.float32) for name in (sequences[0].fields if sequences else ())}
    spans = np.zeros((len(sequences), 4), dtype=np.int64)
    before = start = 0  # `before` is where the sequence laid out last begins
    for segment, sequence in enumerate(sequences):
        shared, end = sequence.shared, start + sequence.num_laid_out
        numbers["ids"][start:end] = sequence.ids[shared:]
        # Positions count in the sequence, not in the row, so rotary embeddings are the same wherever it is laid.
        numbers["positions"][start:end] = np.arange(shared, len(sequence.ids))
        numbers["segments"][start:end] = segment
        numbers["mask"][start:end] = sequence.loss_mask[shared:]
        # After a shared beginning the first own token is predicted from the last shared one, so it stays a target.
        if not shared:
            numbers["mask"][start] = 0  # nothing precedes the first token
        for name, values in sequence.fields.items():
            fields[name][start:end] = values[shared:]
        # Without a shared beginning the earlier range is empty, at the sequence's own start.
        spans[segment] = (start, end, before, before + shared) if shared else (start, end, start, start)
        before, start = start, end
    tensors_BT = {name: torch.from_numpy(values)[None] for name, values in numbers.items()}
    return Packed(
        input_ids_BT=tensors_BT["ids"],
        position_ids_BT=tensors_BT["positions"],
        segment_ids_BT=tensors_BT["segments"],
        loss_mask_BT=tensors_BT["mask"],
        num_segments=len(sequences),
        spans_D4=torch.from_numpy(spans),
        fields={name: torch.from_numpy(values)[None] for name, values in fields.items()},
    )


def split_by_rows(groups: Sequence[Sequence[int]], *, row_length: int, max_rows: int) -> list[range]:
    """Cut groups of sequence lengths (a pair's two answers, say) into consecutive ranges of at most `max_rows` rows.

    A group is never split, so that a loss over the group sees all of it.
    """
    ranges: list[range] = []
    start, lengths = 0, []
    for index, group in enumerate(groups):
        # Planned anew with every group, because the free end of a row depends on all that came before it.
        if lengths and len(plan_rows([*lengths, *group], row_length)) > max_rows:
            ranges.append(range(start, index))
            start, lengths = index, []
        lengths.extend(group)
    if lengths:
        ranges.append(range(start, len(groups)))
    return ranges
