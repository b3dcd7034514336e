"""Responses to compare: as many as asked for, different from each other, from their own draws."""

import json
from pathlib import Path
from typing import Any

import pytest

from stages.config.collect import RespondConfig
from stages.config.errors import DataError
from stages.config.graph import Stage
from stages.config.request import ArtifactRef
from stages.job.context import StageContext, StageOutcome
from stages.respond import sample_responses
from tests.small_world import make_context, make_models, make_tokens


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, ArtifactRef]]:
    """An untrained model, whose samples differ, and its tokens."""
    home = tmp_path_factory.mktemp("world")
    tokens = make_tokens(home)
    return home, {"tokens": tokens, "model": make_models(home, tokens)[Stage.DPO]["model"]}


def respond(inputs: tuple[Path, dict[str, ArtifactRef]], **settings: Any) -> tuple[StageOutcome, list[dict[str, Any]]]:
    home, artifacts = inputs
    context: StageContext = make_context(
        home, Stage.RESPOND, RespondConfig(max_response_length=6, **settings), artifacts
    )
    outcome = sample_responses(context)
    text = (context.output_dir / "responses.jsonl").read_text()
    return outcome, [json.loads(line) for line in text.splitlines()]


def test_each_prompt_gets_its_responses_and_the_ledger_conserves(inputs) -> None:
    outcome, rows = respond(inputs, num_prompts=5, num_responses=3)
    assert 1 <= len(rows) <= 5
    assert all(2 <= len(set(row["responses"])) == len(row["responses"]) <= 3 for row in rows)
    for account in outcome.ledger.values():
        assert account["in"] == account["kept"] + sum(account["dropped"].values())
    assert outcome.ledger["prompts"]["kept"] == len(rows)
    assert outcome.ledger["responses"]["kept"] == sum(len(row["responses"]) for row in rows)


def test_given_prompts_are_answered_and_unusable_ones_counted(inputs) -> None:
    prompts = ("What does `sort_array` do?", "What does `sort_array` do?", "  ", "word " * 200)
    outcome, rows = respond(inputs, prompts=prompts)
    assert [row["prompt"] for row in rows] == ["What does `sort_array` do?"]
    dropped = outcome.ledger["prompts"]["dropped"]
    assert {name: dropped[name] for name in ("duplicate", "empty", "too_long")} == {
        "duplicate": 1,
        "empty": 1,
        "too_long": 1,
    }


def test_a_prompt_is_answered_alike_whatever_is_asked_beside_it_and_otherwise_with_another_seed(inputs) -> None:
    first = "What does `sort_array` do?"
    _, alone = respond(inputs, prompts=(first,))
    _, beside = respond(inputs, prompts=(first, "What does `merge_tree` do, and what is it for?"))
    _, other = respond(inputs, prompts=(first,), seed=1)
    assert alone[0] == beside[0]
    assert alone[0]["responses"] != other[0]["responses"]


def test_a_model_that_always_says_the_same_has_nothing_to_compare(inputs) -> None:
    with pytest.raises(DataError, match="two different responses") as caught:
        respond(inputs, prompts=("What does `sort_array` do?",), temperature=1e-4)
    assert "temperature" in caught.value.advice
