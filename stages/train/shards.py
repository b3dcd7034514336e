"""Tensors of which every process holds a piece, and how pieces of one layout are read in another.

A piece is a box in the whole tensor, or in the whole tensor seen flat: that covers rows (FSDP), slices (tensor
parallelism) and ranges of elements (ZeRO). Training state goes by `<kind>/<parameter's name>` with the kinds of AdamW
(`parameter`, `exp_avg`, `exp_avg_sq`, `step`) whatever the engine, so each engine reads what any other wrote.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from stages.train.ranks import Processes

# What rank 0 holds from every other process at a time, besides the tensors that it puts together.
_GATHERED_BYTES = 256 << 20


@dataclass(frozen=True)
class Box:
    """A part of a tensor of the given shape."""

    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @staticmethod
    def whole(shape: tuple[int, ...]) -> "Box":
        return Box(shape, (0,) * len(shape), shape)

    @staticmethod
    def flat(numel: int, start: int, length: int) -> "Box":
        """Elements start:start+length of a tensor seen flat."""
        return Box((numel,), (start,), (length,))

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    def meet(self, other: "Box") -> "Box":
        """The common part of two boxes in tensors of the same shape; empty when they do not touch."""
        starts = [max(a, b) for a, b in zip(self.offsets, other.offsets, strict=True)]
        stops = [
            min(a + m, b + n) for a, m, b, n in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        ]
        sizes = tuple(max(0, stop - start) for start, stop in zip(starts, stops, strict=True))
        return Box(self.shape, tuple(starts), sizes)

    def within(self, outer: "Box") -> tuple[slice, ...]:
        """Where this box lies in a tensor that holds `outer`."""
        return tuple(
            slice(start - base, start - base + size)
            for start, base, size in zip(self.offsets, outer.offsets, self.sizes, strict=True)
        )


@dataclass(frozen=True)
class Piece:
    """What one process holds of a tensor."""

    box: Box
    tensor: Tensor
    """Of the box's sizes."""


def scalar(value: Tensor) -> Piece:
    """A number that only one process answers for."""
    return Piece(Box.whole(()), value.detach().to("cpu", copy=True))


class Readable(Protocol):
    """A stored tensor that gives parts of itself, as safetensors' slices do."""

    def __getitem__(self, index: tuple[slice, ...]) -> Tensor: ...


@dataclass(frozen=True)
class StoredPiece:
    """A piece that lies somewhere else."""

    box: Box
    dtype: torch.dtype
    open: Callable[[], Readable | Tensor]


class SavedState:
    """Training state in pieces, of which each process reads what it needs."""

    def __init__(self, pieces: Mapping[str, list[StoredPiece]]) -> None:
        self._pieces = pieces

    def __contains__(self, key: str) -> bool:
        return key in self._pieces

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def kinds(self, name: str) -> list[str]:
        """What is known of the parameter `name` besides its value: `exp_avg` and so on."""
        known = (key.partition("/") for key in self._pieces)
        return [kind for kind, _, of in known if of == name and kind != "parameter"]

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape in which a tensor was written; flat where ranges of elements were."""
        return self._pieces[key][0].box.shape

    def is_scalar(self, key: str) -> bool:
        return self.shape(key) == ()

    def read(self, key: str, box: Box) -> Tensor:
        """Return the part `box` of a tensor; raises ValueError when the pieces leave a gap, KeyError without any."""
        pieces = self._pieces[key]
        if all(piece.box.shape == box.shape for piece in pieces):
            return _assemble(key, pieces, box)
        # Written flat by ZeRO and read as rows or slices, or the other way round: only a whole tensor can be reshaped.
        if len({piece.box.shape for piece in pieces}) == 1:
            whole = _assemble(key, pieces, Box.whole(pieces[0].box.shape))
            return whole.view(box.shape)[box.within(Box.whole(box.shape))]
        raise ValueError(f"the pieces of {key} belong to tensors of different shapes")


def _assemble(key: str, pieces: list[StoredPiece], box: Box) -> Tensor:
    # Pieces never overlap, so counting elements is enough to see that none is missing.
    result = torch.empty(box.sizes, dtype=pieces[0].dtype)
    filled = 0
    for piece in pieces:
        common = piece.box.meet(box)
        if common.numel:
            result[common.within(box)] = piece.open()[common.within(piece.box)]
            filled += common.numel
    if filled != box.numel:
        raise ValueError(f"the pieces of {key} hold {filled} of {box.numel} elements")
    return result


def whole_tensors(pieces: Mapping[str, Piece], processes: Processes) -> dict[str, Tensor]:
    """Put every process's pieces together on rank 0, a few hundred megabytes at a time; {} elsewhere."""
    if processes.size == 1:
        return {key: piece.tensor for key, piece in pieces.items()}
    whole: dict[str, Tensor] = {}
    portions = _portions(pieces)
    for number in range(max(processes.gather(len(portions)))):
        mine = portions[number] if number < len(portions) else {}
        for received in processes.gather_to_main(mine):
            for key, piece in received.items():
                if key not in whole:
                    whole[key] = torch.empty(piece.box.shape, dtype=piece.tensor.dtype)
                whole[key][piece.box.within(Box.whole(piece.box.shape))] = piece.tensor
    return whole


def _portions(pieces: Mapping[str, Piece]) -> list[dict[str, Piece]]:
    portions: list[dict[str, Piece]] = []
    room = 0
    for key, piece in pieces.items():
        size = piece.tensor.nbytes
        if size > room or not portions:
            portions.append({})
            room = _GATHERED_BYTES
        portions[-1][key] = piece
        room -= size
    return portions
