"""Which of several equal documents stays, and that near copies are found over shard borders."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from datatrove.data import Document

from stages.config.curate import CurateConfig
from stages.data.curation.dedup import clusters, match_bucket, signature_block
from stages.data.curation.dedup_keys import KEY, extra_copies, text_key
from stages.data.curation.workbench import Workbench


def _extra(keys: list[int], *, heldout: Iterable[int] = (), planted: Iterable[int] = ()) -> list[int]:
    places = np.arange(len(keys))
    flags = {"heldout": np.isin(places, list(heldout)), "planted": np.isin(places, list(planted))}
    return np.flatnonzero(extra_copies(np.array(keys), **flags)).tolist()


def test_the_first_of_equal_documents_stays() -> None:
    assert _extra([7, 3, 7, 7]) == [2, 3]


def test_held_out_wins_over_training_and_both_over_planted() -> None:
    assert _extra([7, 7, 7, 3], heldout=[2], planted=[0]) == [0, 1]
    assert _extra([7, 7], planted=[0], heldout=[0]) == [0]


def test_columns_of_keys_compare_and_sort_as_bytes_do() -> None:
    """numpy cuts trailing zero bytes off a value of a bytes column; hashes that end in them must stay apart."""
    keys = [b"\xff" * 15 + b"\x00", b"\x00" * 16, b"\xff" * 14 + b"\x00\x00", b"\x7f" * 16, b"\x00" * 15 + b"\x01"]
    column = np.array(keys, dtype=KEY)
    assert np.unique(column).tobytes() == b"".join(sorted(keys))
    nothing = np.zeros(len(keys), dtype=bool)
    assert not extra_copies(column, heldout=nothing, planted=nothing).any()
    assert np.isin(column, column[2:3]).tolist() == [False, False, True, False, False]


def test_case_and_white_space_do_not_make_a_text_another_one() -> None:
    assert text_key("Some  Text\n") == text_key("some text")
    assert text_key("some text") != text_key("some texts")


def test_near_duplicates_cluster_over_shards_and_strangers_do_not(tmp_path: Path) -> None:
    words = [f"w{chr(97 + number % 26)}{chr(97 + number // 26)}" for number in range(300)]
    changed = [*words[:150], "other", *words[151:]]
    shards = {0: [words, words[::-1]], 1: [[f"x{word}" for word in words], changed]}
    bench = Workbench(CurateConfig(), tmp_path / "work", tmp_path / "out")
    for shard, texts in shards.items():
        documents = (Document(text=" ".join(text), id=str(shard)) for text in texts)
        signature_block(bench).run(documents, shard)
    for bucket in range(bench.config.minhash_buckets):
        match_bucket(bucket, bench)
    (first, alone), (stranger, second) = clusters([2, 2], bench)
    assert first == second >= 0
    assert alone == stranger == -1
