"""Decisions over all documents, on columns that a reader can check by hand."""

import numpy as np

from stages.data.curation.dedup_keys import KEY
from stages.data.curation.marks import Documents, Mark, judged, mark, near_copies

NOTHING_SEEN = np.empty(0, dtype=KEY)


def documents(keys: str, *, sizes: int = 10, draws: list[int] | None = None, heldout: str = "") -> Documents:
    count = len(keys)
    return Documents(
        keys=np.array([key.encode() for key in keys], dtype=KEY),
        sizes=np.full(count, sizes),
        draws=np.array(draws or range(count), dtype=np.uint64),
        heldout=np.array([flag == "h" for flag in heldout.ljust(count)]),
        planted=np.zeros(count, dtype=bool),
    )


def reasons(column: np.ndarray) -> list[str]:
    return [Mark(number).reason for number in column]


def test_the_held_out_copy_stays_and_what_was_seen_before_goes_with_all_its_copies() -> None:
    column = mark(documents("abaca", heldout="  h"), max_bytes=0, seen=np.array([b"b", b"c"], dtype=KEY))
    assert reasons(column) == ["exact_duplicate", "seen_before", "none", "seen_before", "exact_duplicate"]
    twice = mark(documents("aa"), max_bytes=0, seen=np.array([b"a"], dtype=KEY))
    assert reasons(twice) == ["seen_before", "seen_before"]


def test_the_cap_takes_distinct_documents_in_the_order_of_the_draw_and_forgets_what_it_left_out() -> None:
    given = documents("abacd", draws=[5, 1, 0, 9, 2])
    column = mark(given, max_bytes=25, seen=NOTHING_SEEN)
    assert reasons(column) == ["over_max_bytes", "none", "exact_duplicate", "over_max_bytes", "none"]
    assert judged(given, column).tolist() == [b"b", b"a", b"d"]
    assert not (mark(given, max_bytes=40, seen=NOTHING_SEEN) == Mark.OVER_MAX_BYTES).any()


def test_draws_above_the_range_of_signed_integers_keep_their_order() -> None:
    column = mark(documents("ab", draws=[2**64 - 1, 2**63]), max_bytes=10, seen=NOTHING_SEEN)
    assert reasons(column) == ["over_max_bytes", "none"]


def test_of_a_cluster_one_stays_and_none_when_one_of_it_was_seen_before() -> None:
    clusters = np.array([-1, 7, 7, 8, 8, 8, -1])
    seen = np.array([False, False, False, False, True, False, True])
    planted = np.array([False, False, False, True, False, False, False])
    column = near_copies(clusters, seen, heldout=np.zeros(7, dtype=bool), planted=planted)
    known, extra = "near_duplicate_of_seen", "near_duplicate"
    assert reasons(column) == ["none", "none", extra, extra, known, known, known]
