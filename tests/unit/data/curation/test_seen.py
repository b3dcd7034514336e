"""Which documents earlier increments have seen."""

import numpy as np

from stages.data.curation.seen import _among


def test_signatures_are_looked_up_in_a_sorted_bucket() -> None:
    published = np.unique(np.array([b"b", b"d", b"f"], dtype="S4"))
    asked = np.array([b"a", b"b", b"c", b"f", b"g"], dtype="S4")
    assert _among(asked, published).tolist() == [False, True, False, True, False]


def test_nothing_is_among_nothing() -> None:
    none = np.empty(0, dtype="S4")
    assert _among(np.array([b"a"], dtype="S4"), none).tolist() == [False]
    assert _among(none, none).tolist() == []


def test_the_answer_is_that_of_numpy_for_random_bytes() -> None:
    rng = np.random.default_rng(0)
    published = np.unique(rng.integers(0, 4, (200, 3), dtype=np.uint8).view("S3").ravel())
    asked = rng.integers(0, 4, (500, 3), dtype=np.uint8).view("S3").ravel()
    assert (_among(asked, published) == np.isin(asked, published)).all()
