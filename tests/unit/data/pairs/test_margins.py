"""By how much a chosen response is better: from ratings in whatever shape, from a field, and what is counted."""

import json
from pathlib import Path
from typing import Any

import pytest

from stages.config.curate import CurateConfig
from stages.config.errors import DataError
from stages.config.sources import InstructionFormat, parse_source, parse_sources
from stages.data.curation.ledger import Step
from stages.data.pairs.given import given_preferences

PAIR = {"prompt": "Q", "chosen": "good", "rejected": "bad"}
TWO = {"prompt": "Q", "response_a": "bad", "response_b": "good"}


def load(folder: Path, rows: list[dict[str, Any]], options: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    steps: list[Step] = []
    accounts: dict[str, Any] = {}
    made = given_preferences([parse_source(f"{path}{options}")], CurateConfig(), steps, accounts)
    steps[0].verify()
    return made, accounts[str(path)]


@pytest.mark.parametrize(
    ("row", "options", "margin"),
    [
        ({**PAIR, "score_chosen": 8.5, "score_rejected": 6}, "#margin=ratings", 2.5),
        ({**PAIR, "chosen-rating": "5", "rejected-rating": "3"}, "#margin=ratings", 2.0),
        ({**PAIR, "rejected_score": 0, "chosen_score": 1}, "#margin=ratings", 1.0),
        ({**PAIR, "strength": -3}, "#margin=strength", 3.0),
        ({**TWO, "score_a": 1, "score_b": 4}, "#margin=ratings", 3.0),
        ({**TWO, "overall_preference": 2}, "#margin=ratings", 2.0),
        ({**TWO, "individual_preferences": [{"score": 1}, {"score": 2}, {"score": 3}]}, "#margin=ratings", 2.0),
        ({"prompt": "Q", "responses": ["bad", "good"], "scores": [1, 3.5]}, "#margin=ratings", 2.5),
        ({"prompt": "Q", "completions": [{"response": "bad", "overall_score": 2},
                                         {"response": "good", "overall_score": 6}]}, "#margin=ratings", 4.0),
    ],
)  # fmt: skip
def test_a_margin_is_the_difference_of_ratings_or_a_field(
    row: dict[str, Any], options: str, margin: float, tmp_path: Path
) -> None:
    (made,), account = load(tmp_path, [row], options)
    assert (made["chosen"], made["rejected"], made["margin"]) == ("good", "bad", margin)
    assert account["changed"] in ({}, {"annotators_disagreed": 1})
    assert "margin" not in load(tmp_path, [row], "")[0][0]  # what is not asked for is not published


def test_a_ranking_with_scores_has_a_margin_for_each_of_its_pairs(tmp_path: Path) -> None:
    made, _ = load(tmp_path, [{"prompt": "Q", "responses": ["b", "a", "c"], "scores": [5, 9, 2]}], "#margin=ratings")
    margins = {row["chosen"] + row["rejected"]: row["margin"] for row in made}
    assert margins == {"ab": 4.0, "ac": 7.0, "bc": 3.0}


def test_places_are_no_ratings_and_what_has_no_margin_is_kept_and_counted(tmp_path: Path) -> None:
    ranked = {"prompt": "P", "responses": ["a", "b"], "ranks": [1, 2]}
    rated = {"prompt": "Q", "responses": ["a", "b"], "scores": [9, 2]}
    against = {**PAIR, "prompt": "R", "score_chosen": 1, "score_rejected": 4}
    made, account = load(tmp_path, [ranked, rated, against], "#margin=ratings")
    assert [row["margin"] for row in made] == [0.0, 7.0, 0.0]
    assert account["changed"] == {"no_margin": 1, "margin_below_zero": 1}


def test_a_source_without_a_single_margin_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"margin='strenght' is in none of its 1 pairs") as caught:
        load(tmp_path, [{**PAIR, "strength": 2}], "#margin=strenght")
    assert "margin=ratings" in caught.value.advice


def test_the_option_is_part_of_what_is_curated_and_only_preferences_have_it() -> None:
    assert str(parse_source("/a.jsonl#weight=0.5&margin=ratings")) == "/a.jsonl#margin=ratings"
    with pytest.raises(ValueError, match="empty margin="):
        parse_source("/a.jsonl#margin=")
    with pytest.raises(ValueError, match="margin= of '/a' says how much better"):
        parse_sources("instructions", ["/a#margin=x"], InstructionFormat)
