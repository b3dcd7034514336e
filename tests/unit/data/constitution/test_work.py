"""Draws, rounds and comparisons with writers that say what a test wants; counts and rows by hand."""

from collections import Counter

import pytest

from stages.config.principles import Area
from stages.data.constitution.account import ledger, metrics
from stages.data.constitution.draws import compared_by, drawn_principles
from stages.data.constitution.rows import instructions, preferences
from stages.data.constitution.work import Asked, Work, Worked, Written
from tests.constitutions import ALL, CONSTITUTION, Prefers, Says, config_of, prompt_about

RESPONSE = "The moon is made of old cheese, as everybody knows."
CRITIQUE = "It claims cheese, although the surface consists of rock and dust."
REVISION = "Our moon consists of rock, much like the mantle of the earth."


def critic(text: str) -> str:
    return CRITIQUE if "Critique request" in text else REVISION


def worked(
    *prompts: str, responder=lambda text: RESPONSE, critic=critic, outcome: str = "first", **settings
) -> list[Worked]:
    work = Work(
        config_of(**settings), CONSTITUTION, Says(responder), Says(critic), Prefers(outcome), lambda text: False
    )
    return work.on([prompt_about(text, id=text) for text in prompts])


def test_principles_are_drawn_by_seed_and_prompt_and_each_equally_often() -> None:
    prompts = [prompt_about("x", id=str(number)) for number in range(3000)]
    drawn = [drawn_principles(CONSTITUTION, prompt, seed=0, number=1)[0] for prompt in prompts]
    assert drawn == [drawn_principles(CONSTITUTION, prompt, seed=0, number=1)[0] for prompt in prompts]
    assert drawn != [drawn_principles(CONSTITUTION, prompt, seed=1, number=1)[0] for prompt in prompts]
    counts = Counter(one.id for one in drawn)
    assert len(counts) == 6
    assert all(400 < count < 600 for count in counts.values())  # 500 each, standard deviation 20


def test_rounds_repeat_no_principle_before_all_were_drawn_and_keep_to_the_areas_of_the_prompt() -> None:
    prompt = prompt_about("x", areas=frozenset({Area.HONEST}))
    ids = [one.id for one in drawn_principles(CONSTITUTION, prompt, seed=0, number=5)]
    assert set(ids[:2]) == set(ids[2:4]) == {"honest-1", "honest-2"}
    assert ids[4] in ids[:2]
    assert (
        drawn_principles(CONSTITUTION, prompt, seed=0, number=2)
        == drawn_principles(CONSTITUTION, prompt, seed=0, number=5)[:2]
    )
    chosen = compared_by(CONSTITUTION, prompt, seed=0)
    assert chosen is not None
    assert chosen.area is Area.HONEST


def test_after_all_principles_were_drawn_they_are_drawn_anew_and_not_in_the_order_of_before() -> None:
    """Two principles have two orders, so a second turn has that of the first for every other prompt."""
    prompts = [prompt_about("x", areas=frozenset({Area.HONEST}), id=str(number)) for number in range(400)]
    turns = [[one.id for one in drawn_principles(CONSTITUTION, one, seed=0, number=6)] for one in prompts]
    repeated = [sum(ids[:2] == ids[start : start + 2] for ids in turns) for start in (2, 4)]
    assert all(150 < number < 250 for number in repeated)  # 200, standard deviation 10
    assert 150 < sum(ids[2:4] == ids[4:] for ids in turns) < 250


def test_the_second_round_criticises_the_revision_of_the_first() -> None:
    revisions = iter([REVISION, "Rock and dust, brought there by four billion years of impacts."])
    found = worked(
        "What is the moon made of?",
        critic=lambda text: CRITIQUE if "Critique request" in text else next(revisions),
        rounds=2,
    )[0]
    assert [one.before for one in found.rounds] == [RESPONSE, REVISION]
    assert [one.outcome for one in found.rounds] == ["accepted", "accepted"]
    assert found.revision.startswith("Rock and dust")
    assert len({one.principle for one in found.rounds}) == 2


def test_a_round_that_is_dropped_leaves_the_response_for_the_next_one() -> None:
    revisions = iter(["Too short.", REVISION])
    found = worked(
        "What is the moon made of?",
        critic=lambda text: CRITIQUE if "Critique request" in text else next(revisions),
        rounds=2,
    )[0]
    assert [(one.before, one.outcome) for one in found.rounds] == [(RESPONSE, "too_short"), (RESPONSE, "accepted")]
    assert (found.outcome, found.revision) == ("revised", REVISION)


def test_what_a_model_could_not_write_is_counted_with_its_reason() -> None:
    def respond(text: str) -> str | Written:
        return {"long": Written("", reason="prompt_too_long"), "cut": Written("One two three four", ended=False)}.get(
            text, RESPONSE
        )

    found = worked("long", "cut", "What is the moon?", "Moon?", responder=respond, critic=lambda text: "")
    assert [one.outcome for one in found] == ["prompt_too_long", "cut_off", "no_round_accepted", "no_round_accepted"]
    assert [[r.outcome for r in one.rounds] for one in found] == [[], [], ["no_critique"], ["no_critique"]]
    account = ledger(found, {"in": 5, "kept": 4, "dropped": {"duplicate": 1}}, {})
    assert account["responses"] == {
        "in": 4,
        "kept": 0,
        "dropped": {"cut_off": 1, "no_round_accepted": 2, "prompt_too_long": 1},
    }
    assert account["rounds"] == {"in": 2, "kept": 0, "dropped": {"no_critique": 2}}


def test_nothing_is_asked_of_an_empty_critique_and_random_numbers_differ_by_step() -> None:
    writer = Says(lambda text: "")
    responder = Says(lambda text: RESPONSE)
    Work(config_of(rounds=2), CONSTITUTION, responder, writer, Prefers("first"), lambda text: False).on(
        [prompt_about("Moon?")]
    )
    assert len(writer.asked) == 2  # two critiques and no revision
    steps: list[Asked] = [*responder.asked, *writer.asked]
    assert len({one.step for one in steps}) == len(steps) == 4


def test_critique_and_revision_of_every_round_are_steps_of_their_own() -> None:
    revisions = iter([REVISION, "Rock and dust, brought there by four billion years of impacts."])
    responder, writer = (
        Says(lambda text: RESPONSE),
        Says(lambda text: CRITIQUE if "Critique request" in text else next(revisions)),
    )
    Work(config_of(rounds=2), CONSTITUTION, responder, writer, Prefers("first"), lambda text: False).on(
        [prompt_about("Moon?")]
    )
    assert [one.step for one in responder.asked] == [0, 1]
    assert [one.step for one in writer.asked] == [2, 3, 4, 5]


def test_pairs_are_the_revision_against_the_response_and_what_both_orders_prefer() -> None:
    texts = iter([RESPONSE, "Nobody has ever been there, so nobody can know."])
    found = worked("What is the moon made of?", responder=lambda text: next(texts), outcome="second")
    rows = list(preferences(found))
    assert [(row["chosen"], row["rejected"], row["made"]) for row in rows] == [
        (REVISION, RESPONSE, "revision"),
        ("Nobody has ever been there, so nobody can know.", RESPONSE, "labelled"),
    ]
    first = found[0].rounds[0]
    assert rows[0]["reasons"] == [first.area, first.principle]
    assert rows[1]["reasons"][0] in {area.value for area in Area}
    assert [row["messages"][-1]["content"] for row in instructions(found)] == [REVISION]


@pytest.mark.parametrize("outcome", ["orders_disagree", "judge_unclear"])
def test_without_a_common_verdict_there_is_no_pair(outcome: str) -> None:
    texts = iter([RESPONSE, "Nobody has ever been there, so nobody can know."])
    found = worked("Moon?", responder=lambda text: next(texts), outcome=outcome, critic=lambda text: "")
    assert list(preferences(found)) == []
    account = ledger(found, {"in": 1, "kept": 1, "dropped": {}}, {})
    assert account["comparisons"] == {"in": 1, "kept": 0, "dropped": {outcome: 1}}


def test_equal_responses_are_not_compared_and_a_run_for_revisions_compares_nothing() -> None:
    comparer = Prefers("first")
    for settings in ({}, {"makes": "revisions"}, {"comparisons": False}):
        work = Work(
            config_of(**settings), CONSTITUTION, Says(lambda text: RESPONSE), Says(critic), comparer, lambda t: False
        )
        found = work.on([prompt_about("Moon?")])
        assert (found[0].comparison is None) == bool(settings)
    assert comparer.matches == []


def test_metrics_are_shares_of_the_counts() -> None:
    def say(text: str) -> str:
        return CRITIQUE if "Critique request" in text else "Short." if "Mars?" in text else REVISION

    found = worked("Moon?", "Mars?", "Sun?", critic=say, outcome="first", makes="revisions")
    account = ledger(found, {"in": 3, "kept": 3, "dropped": {}}, {"instructions": 2})
    values = metrics(found, account)
    assert values["constitution/accepted_share"] == pytest.approx(2 / 3)
    assert values["constitution/length_ratio"] == pytest.approx(12 / 10)
    assert values["constitution/pairs"] == 0
    assert "constitution/agreed_share" not in values
    by_principle = sum(account["principles"]["rounds"][name]["in"] for name in account["principles"]["rounds"])
    assert by_principle == account["rounds"]["in"] == 3


def test_earlier_turns_of_the_assistant_are_not_trained_on() -> None:
    turns = (
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Moon?"},
    )
    prompt = prompt_about("Moon?")
    prompt = type(prompt)("p", turns, ALL, "/p")
    found = Work(
        config_of(), CONSTITUTION, Says(lambda text: RESPONSE), Says(critic), Prefers("first"), lambda t: False
    ).on([prompt])
    messages = next(instructions(found))["messages"]
    assert [message.get("weight") for message in messages] == [None, 0, None, None]


def test_a_record_survives_its_json() -> None:
    for one in worked("Moon?", "Sun?", responder=lambda text: RESPONSE + text):
        assert Worked.from_dict(one.to_dict()) == one
