"""Insults are found wherever they stand in a text; software's own violent words are not insults."""

import csv
import gzip

import pytest

from stages.config.errors import ConfigError
from stages.data.curation.toxicity import ClassifierScorer, WordListScorer, passages
from tests.places import SHARED

LABELS = SHARED / "data" / "labels" / "toxicity_davidson.csv.gz"


def test_one_insult_in_a_long_page_is_found() -> None:
    page = "The scheduler starts the task that has waited longest.\n" * 200
    insult = "You are a stupid worthless idiot, you pathetic piece of shit.\n"
    clean, dirty = ClassifierScorer().scores([page, page + insult + page])
    assert clean < 0.5
    assert dirty > 0.9


def test_jargon_is_not_toxic() -> None:
    texts = ["Kill the child process and abort the master.", "Returns the dumb terminal's execution status."]
    assert max(ClassifierScorer().scores(texts)) < 0.9


def test_passages_hold_every_character_once() -> None:
    text = "a" * 1500 + "\n" + "line\n" * 300
    assert "".join(passages(text)) == text
    assert max(map(len, passages(text))) <= 200
    assert passages("") == []


def test_word_list_counts_whole_words() -> None:
    scorer = WordListScorer(["darn", "blast it"])
    assert scorer.scores(["Darn! Blast it, darn.", "darning socks", "darn"]) == [0.875, 0.0, 0.5]


def test_empty_word_list_is_refused() -> None:
    with pytest.raises(ConfigError, match="no word"):
        WordListScorer(["", "  "])


@pytest.mark.skipif(not LABELS.exists(), reason="../shared/data/labels is not there")
def test_labelled_posts_are_told_apart() -> None:
    with gzip.open(LABELS, "rt", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[:3000]
    scores = ClassifierScorer().scores([row["tweet"] for row in rows])
    flagged = [row["class"] for row, score in zip(rows, scores, strict=True) if score >= 0.9]
    offensive = sum(row["class"] != "2" for row in rows)
    assert sum(label != "2" for label in flagged) / len(flagged) > 0.95
    assert sum(label != "2" for label in flagged) / offensive > 0.7
