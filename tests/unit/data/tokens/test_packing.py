"""Rows hold whole sequences, positions restart, nothing is padding."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.config.errors import DataError
from stages.data.tokens.packing import TokenSequence, collate, lay_out, plan_rows, split_by_rows


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
    batch = collate([[sequence(3)], [sequence(2)]])
    assert batch.position_ids_BT.tolist() == [[0, 1, 2, 0, 1]]
    assert batch.segment_ids_BT.tolist() == [[0, 0, 0, 1, 1]]
    assert batch.loss_mask_BT.tolist() == [[0, 1, 1, 0, 1]]
    assert batch.spans_D4.tolist() == [[0, 3, 0, 0], [3, 5, 3, 3]]
    assert (batch.num_targets, batch.num_tokens) == (3, 5)


def test_a_shared_beginning_is_laid_out_once() -> None:
    chosen = TokenSequence(np.array([7, 8, 9, 1]), np.array([0, 0, 1, 1]))
    rejected = TokenSequence(np.array([7, 8, 5]), np.array([0, 0, 1]), shared=2)
    batch = lay_out([sequence(2), chosen, rejected])
    assert batch.input_ids_BT.tolist() == [[1, 2, 7, 8, 9, 1, 5]]
    assert batch.position_ids_BT.tolist() == [[0, 1, 0, 1, 2, 3, 2]]
    assert batch.loss_mask_BT.tolist() == [[0, 1, 0, 0, 1, 1, 1]]
    assert batch.spans_D4.tolist() == [[0, 2, 0, 0], [2, 6, 2, 2], [6, 7, 2, 4]]


def test_fields_travel_with_their_tokens() -> None:
    one = TokenSequence(np.array([1, 2]), np.array([0, 1]), {"advantages": np.array([0.0, 2.5], dtype=np.float32)})
    two = TokenSequence(np.array([3]), np.array([0]), {"advantages": np.array([-1.0], dtype=np.float32)})
    assert collate([[one, two]]).fields["advantages"].tolist() == [[0.0, 2.5, -1.0]]


@given(st.lists(st.tuples(st.integers(1, 8), st.integers(1, 8)), min_size=1, max_size=30), st.integers(1, 4))
def test_pairs_are_never_split_over_micro_batches(groups: list[tuple[int, int]], max_rows: int) -> None:
    ranges = split_by_rows(groups, row_length=16, max_rows=max_rows)
    assert [index for part in ranges for index in part] == list(range(len(groups)))
    for part in ranges:
        rows = plan_rows([length for index in part for length in groups[index]], 16)
        assert len(rows) <= max_rows or len(part) == 1
