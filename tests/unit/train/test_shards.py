"""Pieces of tensors: what one layout wrote is what another reads."""

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from stages.train.ranks import Processes
from stages.train.shards import Box, Piece, SavedState, StoredPiece, whole_tensors

WHOLE = torch.arange(24.0).view(6, 4)


def saved(*pieces: tuple[Box, Tensor]) -> SavedState:
    return SavedState({"w": [StoredPiece(box, value.dtype, lambda value=value: value) for box, value in pieces]})


def rows(*bounds: int) -> list[tuple[Box, Tensor]]:
    return [
        (Box((6, 4), (start, 0), (stop - start, 4)), WHOLE[start:stop]) for start, stop in itertools.pairwise(bounds)
    ]


def columns(*bounds: int) -> list[tuple[Box, Tensor]]:
    return [
        (Box((6, 4), (0, start), (6, stop - start)), WHOLE[:, start:stop]) for start, stop in itertools.pairwise(bounds)
    ]


def ranges(*bounds: int) -> list[tuple[Box, Tensor]]:
    return [
        (Box.flat(24, start, stop - start), WHOLE.flatten()[start:stop]) for start, stop in itertools.pairwise(bounds)
    ]


LAYOUTS = {
    "whole": [(Box.whole((6, 4)), WHOLE)],
    "rows": rows(0, 1, 4, 6),
    "columns": columns(0, 3, 4),
    "ranges": ranges(0, 5, 6, 17, 24),
    "rows of columns": [(Box((6, 4), (i, j), (3, 2)), WHOLE[i : i + 3, j : j + 2]) for i in (0, 3) for j in (0, 2)],
}


@pytest.mark.parametrize("read", LAYOUTS)
@pytest.mark.parametrize("written", LAYOUTS)
def test_any_layout_reads_any_other(written: str, read: str) -> None:
    state = saved(*LAYOUTS[written])
    for box, expected in LAYOUTS[read]:
        assert torch.equal(state.read("w", box), expected)


def test_random_boxes_are_read_from_random_ranges() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        cuts = sorted({0, 24, *rng.integers(1, 24, size=rng.integers(0, 6)).tolist()})
        i, j = rng.integers(0, 6), rng.integers(0, 4)
        m, n = rng.integers(0, 7 - i), rng.integers(0, 5 - j)
        box = Box((6, 4), (int(i), int(j)), (int(m), int(n)))
        assert torch.equal(saved(*ranges(*cuts)).read("w", box), WHOLE[i : i + m, j : j + n])


def test_a_piece_is_opened_only_when_something_is_read_from_it() -> None:
    def unopened() -> Tensor:
        raise AssertionError("this file belongs to another rank")

    (first, values), (second, _) = rows(0, 3, 6)
    state = SavedState(
        {"w": [StoredPiece(first, values.dtype, lambda: values), StoredPiece(second, values.dtype, unopened)]}
    )
    assert torch.equal(state.read("w", first), values)


def test_a_gap_between_pieces_is_an_error() -> None:
    state = saved(*rows(0, 2), *rows(3, 6))
    with pytest.raises(ValueError, match="hold 20 of 24 elements"):
        state.read("w", Box.whole((6, 4)))
    with pytest.raises(ValueError, match="hold 20 of 24 elements"):
        state.read("w", Box.flat(24, 0, 24))


def test_kinds_belong_to_one_parameter() -> None:
    keys = ["parameter/a.w", "exp_avg/a.w", "step/a.w", "exp_avg/b.a.w", "loss_scale"]
    state = SavedState({key: [] for key in keys})
    assert sorted(state.kinds("a.w")) == ["exp_avg", "step"]


class Recorded(Processes):
    """Three processes seen from rank 0: what the others send is given."""

    def __init__(self, others: list[list[dict[str, Piece]]]) -> None:
        super().__init__(rank=0, size=3)
        self._others, self._sent = others, self._rounds(others)

    @staticmethod
    def _rounds(others: list[list[dict[str, Piece]]]) -> Iterator[list[dict[str, Piece]]]:
        for number in range(max(len(portions) for portions in others)):
            yield [portions[number] if number < len(portions) else {} for portions in others]

    def gather(self, item: int) -> list[int]:  # type: ignore[override]
        return [item, *(len(portions) for portions in self._others)]

    def gather_to_main(self, item: dict[str, Piece]) -> list[dict[str, Piece]]:  # type: ignore[override]
        return [item, *next(self._sent)]


def test_whole_tensors_are_put_together_from_what_all_send() -> None:
    (top, above), (middle, between), (bottom, below) = rows(0, 1, 4, 6)
    bias = Piece(Box.whole((2,)), torch.ones(2))
    others = [[{"w": Piece(middle, between)}, {"b": bias}], [{"w": Piece(bottom, below)}]]
    whole = whole_tensors({"w": Piece(top, above)}, Recorded(others))
    assert torch.equal(whole["w"], WHOLE)
    assert torch.equal(whole["b"], torch.ones(2))
