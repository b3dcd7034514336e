"""Rows hold whole sequences, positions restart, padding counts nothing."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.config.errors import DataError
from stages.data.packing import TokenSequence, collate, pack, plan_rows, split_by_rows


def sequence(length: int, first: int = 1) -> TokenSequence:
    return TokenSequence(np.arange(first, first + length), np.ones(length, dtype=np.int64))


@given(st.lists(st.integers(1, 16), min_size=1, max_size=40))
def test_every_sequence_lands_in_exactly_one_row_that_holds_it(lengths: list[int]) -> None:
    rows = plan_rows(lengths, 16)
    assert [index for row in rows for index in row] == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= 16 for row in rows)


def test_a_sequence_that_does_not_fit_is_named() -> None:
    with pytest.raises(DataError, match=r"sequence 1 has 17 tokens, a row holds 16"):
        plan_rows([3, 17], 16)


def test_positions_restart_and_the_first_token_is_no_target() -> None:
    batch = pack([sequence(3), sequence(2)], 8)
    assert batch.position_ids_BT.tolist() == [[0, 1, 2, 0, 1, 0, 0, 0]]
    assert batch.segment_ids_BT.tolist() == [[0, 0, 0, 1, 1, -1, -1, -1]]
    assert batch.loss_mask_BT.tolist() == [[0, 1, 1, 0, 1, 0, 0, 0]]
    assert batch.num_targets == 3


def test_fields_travel_with_their_tokens() -> None:
    one = TokenSequence(np.array([1, 2]), np.array([0, 1]), {"advantages": np.array([0.0, 2.5], dtype=np.float32)})
    two = TokenSequence(np.array([3]), np.array([0]), {"advantages": np.array([-1.0], dtype=np.float32)})
    assert collate([[one, two]], 4).fields["advantages"].tolist() == [[0.0, 2.5, -1.0, 0.0]]


@given(st.lists(st.tuples(st.integers(1, 8), st.integers(1, 8)), min_size=1, max_size=30), st.integers(1, 4))
def test_pairs_are_never_split_over_micro_batches(groups: list[tuple[int, int]], max_rows: int) -> None:
    ranges = split_by_rows(groups, row_length=16, max_rows=max_rows)
    assert [index for part in ranges for index in part] == list(range(len(groups)))
    for part in ranges:
        rows = plan_rows([length for index in part for length in groups[index]], 16)
        assert len(rows) <= max_rows or len(part) == 1
