"""Curation that builds on earlier data: only what is new is published, and held-out text and pairs are taken over."""

from pathlib import Path
from typing import Any

import pytest

from stages.config.errors import ConfigError
from stages.job.context import StageOutcome
from tests.curating import PLAIN, curated, digests, prose, rows_of, write_jsonl


def _increment(tmp_path: Path, name: str, texts: list[str], **settings: Any) -> tuple[StageOutcome, Path]:
    folder = tmp_path / f"{name}.raw"
    folder.mkdir()
    source = write_jsonl(folder / "documents.jsonl", [{"text": text} for text in texts])
    return curated(tmp_path, name, documents=(source,), **{**PLAIN, **settings})


def _texts(output: Path, split: str = "train") -> set[str]:
    return {row["text"] for row in rows_of(output / "documents" / split)}


def test_an_increment_holds_what_no_earlier_one_has_seen(tmp_path: Path) -> None:
    old, later, new = ([prose(number, 12) for number in range(start, start + 10)] for start in (0, 100, 200))
    too_short = "This was too short."
    _, first = _increment(tmp_path, "first", [*old, too_short], heldout_fraction=0.3)
    _, second = _increment(tmp_path, "second", [*old, *later], heldout_fraction=0.3, previous=first)
    near = [text + " So it was." for text in (old[0], later[0])]
    outcome, third = _increment(
        tmp_path, "third", [*new, *old, *later, *near, too_short, new[0]], heldout_fraction=0.3, previous=second
    )
    assert _texts(second) | _texts(second, "heldout") == set(later) | _texts(first, "heldout")
    assert _texts(third) | _texts(third, "heldout") == set(new) | _texts(second, "heldout")
    assert not _texts(third) & _texts(third, "heldout")
    ledger = outcome.ledger
    dropped = {reason: amount["documents"] for reason, amount in ledger["documents"]["dropped"].items()}
    assert dropped == {
        "exact_duplicates/exact_duplicate": 1,
        "exact_duplicates/seen_before": 21,
        "near_duplicates/near_duplicate_of_seen": 2,
    }
    carried = len(_texts(second, "heldout"))
    assert carried
    assert ledger["carried"]["documents/heldout"]["documents"] == carried
    published = sum(part["documents"] for part in ledger["documents"]["published"].values())
    assert published == ledger["documents"]["steps"][-1]["kept"]["documents"] + carried
    assert outcome.metrics["curate/documents_new"] == 10
    assert outcome.metrics["curate/bytes_new"] == sum(len(text) for text in _texts(third))


def test_a_chain_of_copies_of_seen_text_goes_as_a_whole_and_planted_documents_are_nobodys_copies(
    tmp_path: Path,
) -> None:
    settings = {"planted": 2, "heldout_fraction": 0.0, "toxicity": "classifier"}
    old = [prose(number, 14) for number in range(6)]
    _, first = _increment(tmp_path, "first", old, **settings)
    outcome, _ = _increment(
        tmp_path,
        "second",
        [prose(100), prose(101), *(text + " So it was." for text in old)],
        previous=first,
        **settings,
    )
    assert outcome.ledger["documents"]["dropped"]["near_duplicates/near_duplicate_of_seen"]["documents"] == 6
    assert outcome.metrics["curate/documents_new"] == 2
    for kind, entry in outcome.ledger["planted"].items():
        if kind != "near_duplicate":
            assert entry["found"] == 2, kind


def test_nothing_new_is_no_failure_and_a_capped_document_may_come_again(tmp_path: Path) -> None:
    texts = [prose(number, 12) for number in range(10)]
    size = sum(map(len, texts))
    _, first = _increment(tmp_path, "first", texts, max_bytes=size // 2, heldout_fraction=0.0)
    outcome, second = _increment(tmp_path, "second", texts, previous=first, heldout_fraction=0.0)
    assert _texts(second) == set(texts) - _texts(first)
    assert _texts(second)
    outcome, third = _increment(tmp_path, "third", texts, previous=second, heldout_fraction=0.0)
    assert outcome.metrics["curate/bytes_new"] == outcome.metrics["curate/pairs_new"] == 0
    assert _texts(third) == set()


def test_pairs_are_taken_over_and_only_new_ones_added(tmp_path: Path) -> None:
    def pairs(numbers: range) -> dict[str, Any]:
        instructions = [{"instruction": f"Name {n}.", "response": f"{n}, jane.doe@example.com."} for n in numbers]
        preferences = [{"prompt": f"Name {n}.", "chosen": f"{n}", "rejected": "None."} for n in numbers]
        return {
            "instructions": (write_jsonl(tmp_path / f"i{numbers.stop}.jsonl", instructions),),
            "preferences": (write_jsonl(tmp_path / f"p{numbers.stop}.jsonl", preferences),),
            "heldout_fraction": 0.2,
        }

    _, first = _increment(tmp_path, "first", [prose(n) for n in range(10)], **pairs(range(20)))
    outcome, second = _increment(tmp_path, "second", [prose(50)], previous=first, **pairs(range(25)))
    for name in ("instructions", "preferences"):
        before, after = (
            [rows_of(out / name / f"{split}.jsonl.gz") for split in ("train", "heldout")] for out in (first, second)
        )
        assert [rows[: len(old)] for rows, old in zip(after, before, strict=True)] == before
        assert sum(map(len, after)) == 25
        steps = {step["step"]: step["dropped"] for step in outcome.ledger[name]["steps"]}
        assert steps["duplicates"]["seen_before"]["documents"] == 20
    assert outcome.metrics["curate/pairs_new"] == 10
    # Without sources of its own the increment still has pairs to train on.
    outcome, third = _increment(
        tmp_path, "third", [prose(60)], previous=second, instructions=("derived",), preferences=("derived",)
    )
    assert digests(third)["preferences/train.jsonl.gz"] == digests(second)["preferences/train.jsonl.gz"]
    assert outcome.metrics["curate/pairs_new"] == 0


def test_signatures_that_do_not_compare_are_refused(tmp_path: Path) -> None:
    _, first = _increment(tmp_path, "first", [prose(n) for n in range(5)])
    with pytest.raises(ConfigError, match=r"curate\.minhash_ngram=3, but previous_data was made with 5"):
        _increment(tmp_path, "second", [prose(9)], previous=first, minhash_ngram=3)
    (first / "index" / "settings.json").unlink()
    with pytest.raises(ConfigError, match="has no index"):
        _increment(tmp_path, "third", [prose(9)], previous=first)


def test_the_index_does_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    texts = [prose(number, 12) for number in range(8)]
    found = []
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        folder.mkdir()
        _, first = _increment(folder, "first", texts[:4], workers=workers)
        _, second = _increment(folder, "second", texts, workers=workers, previous=first)
        found.append({name: value for name, value in digests(second).items() if name.startswith("index/")})
    assert found[0] == found[1]
    assert len(found[0]) == 16
