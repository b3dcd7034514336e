"""A judge's ratings as scores, against a server that misbehaves."""

from pathlib import Path
from typing import Any

import pytest

from stages.artifacts.folder import FileStore
from stages.config.endpoints import EndpointConfig
from stages.config.errors import Category, ConfigError, StageError
from stages.config.scorers import JudgeScorer
from stages.rules.ready import Row, Value
from stages.train.rollout.scorers.judge import Judge, number_in, rubric
from tests.judge_server import Asked, Reply, judge_server


def judge(url: str, store: FileStore | None = None, *, budget_requests: int = 0, **settings: Any) -> Judge:
    # Five attempts, because one request may meet all four failures of `rated`.
    how: dict[str, Any] = {"timeout_seconds": 10, "max_retries": 4, "budget_requests": budget_requests}
    scorer = JudgeScorer(endpoint=EndpointConfig(endpoint=url, model="m", **how), **settings)
    return Judge(scorer, field="ppo.scorer", store=store, artifact="a" * 64, sleep=lambda seconds: None)


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("Score: 7", 7),
        ("The first is a score of 3, but overall **Score:** 8.5", 8.5),
        ("7", 7),
        (" 7/10 ", 7),
        ("**7**.", 7),
        ("It answers 2 of 3 questions.", None),
        ("", None),
    ],
)
def test_the_number_is_the_one_that_is_called_a_score_or_that_is_all(answer: str, number: float | None) -> None:
    assert number_in(answer) == number


def rated(number: int, asked: Asked) -> Reply:
    """By the length of the answer, after one failure of each kind."""
    failures = {1: Reply(status=429, body=b""), 2: Reply(status=500, body=b""), 3: Reply(cut=True), 5: Reply(body=b"<")}
    response = asked.text.partition("<answer>\n")[2].partition("\n</answer>")[0]
    special = {"mumbles": "Well.", "beyond": "Score: 11", "cut": "Let me"}
    said = special.get(response, f"Score: {len(response)}")
    return failures.get(number) or Reply(said, finish_reason="length" if response == "cut" else "stop", usage=(10, 5))


def test_ratings_are_shares_of_the_scale_and_nothing_is_asked_twice(tmp_path: Path) -> None:
    store, rows = FileStore(tmp_path), [Row(prompt="Why?")] * 6
    responses = ["a", "abcdefghij", "mumbles", "beyond", "cut", "a"]
    expected = [
        Value(0.0),
        Value(1.0),
        Value(0.25, "no_number"),
        Value(0.25, "out_of_range"),
        Value(0.25, "answer_cut"),
        Value(0.0),
    ]
    with judge_server(rated) as server:
        first = judge(server.url, store, failed_value=0.25)
        assert first.values(responses, rows) == expected
        assert len(server.asked) == 5 + 4  # two responses are alike, and four attempts failed
        assert first.account()["not_rated"] == {"no_number": 1, "out_of_range": 1, "answer_cut": 1}
        again = judge(server.url, store, failed_value=0.25)
        assert again.values(responses, rows) == expected
        assert len(server.asked) == 9
        assert again.account()["answered"] == 0
        assert "Why?" in server.asked[0].text


def test_a_response_does_not_fill_places_of_the_rubric() -> None:
    with judge_server(lambda number, asked: Reply("Score: 5")) as server:
        scorer = judge(server.url, prompt="Q {prompt} R {reference} A {response}")
        scorer.values(["{reference} {prompt}"], [Row(prompt="{response}", reference=("x", "y"))])
        assert server.asked[0].text == "Q {response} R x\ny A {reference} {prompt}"
    assert {"{prompt}", "{response}"} <= {word for word in rubric("rubric-v1").split() if word.startswith("{")}


def test_a_judge_that_is_away_or_says_nothing_or_costs_too_much_ends_the_training_instead_of_inventing_scores() -> None:
    rows = [Row(prompt="Why?")] * 8
    responses = [f"answer {number}" for number in range(8)]
    with judge_server(lambda number, asked: Reply(status=503, body=b"")) as server, pytest.raises(StageError) as away:
        judge(server.url).values(responses, rows)
    assert away.value.category is Category.INFRASTRUCTURE
    assert "ppo.scorer: http://127.0.0.1" in away.value.message
    with judge_server(lambda number, asked: Reply("Hm.")) as server, pytest.raises(StageError, match="rated none of 8"):
        judge(server.url).values(responses, rows)
    with judge_server(lambda number, asked: Reply("Score: 5")) as server, pytest.raises(ConfigError, match="budget"):
        judge(server.url, budget_requests=3).values(responses, rows)
