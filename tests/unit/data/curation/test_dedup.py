"""Who stays of several equal documents, and that near copies are found over shard borders."""

from pathlib import Path

from datatrove.data import Document

from stages.config.curate import CurateConfig
from stages.data.curation.dedup import clusters, match_bucket, signature_block
from stages.data.curation.dedup_keys import Candidate, extra_copies, text_key


def _candidate(shard: int, index: int, key: str = "k", *, heldout: bool = False, planted: bool = False) -> Candidate:
    return Candidate(shard, index, key, heldout, planted)


def test_the_first_of_equal_documents_stays() -> None:
    assert extra_copies([_candidate(0, 1), _candidate(0, 0), _candidate(1, 0)]) == {(0, 1), (1, 0)}


def test_held_out_wins_over_training_and_both_over_planted() -> None:
    entries = [
        _candidate(0, 0, planted=True),
        _candidate(0, 1),
        _candidate(5, 5, heldout=True),
        _candidate(6, 0, "other"),
    ]
    assert extra_copies(entries) == {(0, 0), (0, 1)}


def test_case_and_white_space_do_not_make_a_text_another_one() -> None:
    assert text_key("Some  Text\n") == text_key("some text")
    assert text_key("some text") != text_key("some texts")


def test_near_duplicates_cluster_over_shards_and_strangers_do_not(tmp_path: Path) -> None:
    config = CurateConfig()
    words = [f"w{chr(97 + number % 26)}{chr(97 + number // 26)}" for number in range(300)]
    changed = [*words[:150], "other", *words[151:]]
    shards = {0: [words, words[::-1]], 1: [[f"x{word}" for word in words], changed]}
    for shard, texts in shards.items():
        documents = (Document(text=" ".join(text), id=str(shard)) for text in texts)
        signature_block(config, tmp_path).run(documents, shard)
    for bucket in range(config.minhash_buckets):
        match_bucket(bucket, config, tmp_path)
    found = clusters(config, tmp_path)
    assert set(found) == {(0, 0), (1, 1)}
    assert len(set(found.values())) == 1
