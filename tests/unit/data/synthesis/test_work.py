"""The three methods with a generator whose answers are known: what is asked, what stays, and why the rest goes."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from stages.config.scorers import LengthRule
from stages.config.synthesis import Synthesis, SynthesizeConfig
from stages.data.synthesis.asking import Task
from stages.data.synthesis.filters import Rules
from stages.data.synthesis.sources import Passage, Prompt
from stages.data.synthesis.work import ACCEPTED, BUDGET, Asked, Draft, Score, Work, Written, rows

SEEDS = [
    Task("s:1", "Sum up the text.", "A long text about ships."),
    Task("s:2", "Tell me a joke about cats."),
    Task("s:3", "Name five rivers of Africa."),
]

Answer = Callable[[Asked], Written]


def work(answer: Answer, *, score: Score | None = None, **settings: Any) -> tuple[Work, list[Asked]]:
    asked: list[Asked] = []

    def write(part: Sequence[Asked]) -> list[Written]:
        asked.extend(part)
        return [answer(one) for one in part]

    config = SynthesizeConfig(**settings)
    rules = Rules(config, is_in_language=lambda text: True, declines=lambda text: text.startswith("I cannot"))
    return Work(config, rules, write, score, lambda done, total, phase: None), asked


def said(one: Asked) -> str:
    return one.turns[-1]["content"]


def tasks(*texts: str) -> Written:
    return Written("".join(f"{place}. {text}\n" for place, text in enumerate(texts, start=4)))


def test_self_instruct_grows_its_pool_gives_inputs_and_answers_and_counts_every_loss() -> None:
    rounds = iter(
        [
            tasks("Describe how a bridge is built.", "Tell me a joke about cats!", "Short one"),
            tasks("Describe how a bridge gets built.", "Translate the sentence into French."),
            Written("I would rather not."),
            Written(reason="endpoint_refused"),
            tasks("Write a haiku about snow.", "List three uses of salt.", "Explain why the sky is blue."),
        ]
    )

    def answer(one: Asked) -> Written:
        text = said(one)
        if text.startswith("Here is a list"):
            return next(rounds)
        if text.startswith("Task: "):
            match text.split("\n")[0].removeprefix("Task: "):
                case "Translate the sentence into French.":
                    return Written("Input: The cat sleeps.")
                case "Write a haiku about snow.":
                    return Written("Write a haiku about snow")
            return Written("none")
        if text == "Describe how a bridge is built.":
            return Written("I cannot say.")
        return Written(f"An answer to that question, number {len(text)}.")

    one, asked = work(
        answer, method=Synthesis.SELF_INSTRUCT, num_rows=4, prompts_per_round=1, shown_seeds=2, shown_made=1
    )
    drafts = one.self_instruct(SEEDS)
    assert [draft.messages[0]["content"] for draft in drafts if draft.outcome == ACCEPTED] == [
        "Translate the sentence into French.\n\nThe cat sleeps.",
        "List three uses of salt.",
    ]
    assert one.account.to_dict() == {
        "instructions": {
            "in": 10,
            "kept": 4,
            "dropped": {"endpoint_refused": 1, "near_copy": 2, "no_list": 1, "over_num_rows": 1, "too_short": 1},
        },
        "inputs": {"in": 4, "kept": 3, "dropped": {"input_copies_instruction": 1}},
        "responses": {"in": 3, "kept": 2, "dropped": {"refusal": 1}},
        "rows": {"in": 3, "kept": 2, "dropped": {"refusal": 1}},
    }
    assert sum(said(each).startswith("Here is a list") for each in asked) == 5
    # The first round knows no new task; a later one shows one of those that were accepted before.
    assert "bridge" not in said(asked[0])
    assert "Describe how a bridge is built." in said(asked[1])


def test_rows_say_where_they_come_from() -> None:
    answers = {"Here": tasks("Write a haiku about snow."), "Task": Written("none"), "Writ": Written("White and cold.")}
    one, asked = work(
        lambda each: answers[said(each)[:4]], method="self_instruct", num_rows=1, prompts_per_round=1, shown_seeds=2
    )
    (row,) = rows(one.self_instruct(SEEDS), method=Synthesis.SELF_INSTRUCT, generator="m", identity="d")
    assert [turn["content"] for turn in row["messages"]] == ["Write a haiku about snow.", "White and cold."]
    shown = [task.id for task in SEEDS if task.instruction in said(asked[0])]
    assert row["provenance"] == {
        "method": "self_instruct",
        "generator": "m",
        "generator_identity": "d",
        "task_prompt": asked[0].digest,
        "seeds": row["provenance"]["seeds"],
        "input_prompt": asked[1].digest,
        "input": False,
        "sampled": 1,
        "prompt": asked[2].digest,
    }
    assert sorted(row["provenance"]["seeds"]) == shown
    assert len({each.digest for each in asked}) == 3


def test_every_prompt_for_tasks_shows_other_examples_in_its_round_and_in_later_ones() -> None:
    """Nothing is accepted, so the pool is the same in every round; only the draw can differ."""
    seeds = [Task(f"s:{number}", f"Name the {number}th letter of it.") for number in range(40)]
    settings: dict[str, Any] = {"prompts_per_round": 3, "max_rounds": 4, "shown_seeds": 6, "num_rows": 5}
    one, asked = work(lambda each: Written("I would rather not."), method="self_instruct", **settings)
    one.self_instruct(seeds)
    shown = [tuple(task.id for task in seeds if task.instruction in said(each)) for each in asked]
    assert [len(ids) for ids in shown] == [6] * 12
    assert len(set(shown)) == 12
    assert [each.number for each in asked] == list(range(12))
    again, asked_again = work(lambda each: Written("I would rather not."), method="self_instruct", **settings)
    again.self_instruct(seeds)
    assert [said(each) for each in asked_again] == [said(each) for each in asked]


def test_a_spent_budget_ends_the_rounds_and_what_is_done_is_kept() -> None:
    left = [3]

    def answer(one: Asked) -> Written:
        left[0] -= 1
        if left[0] < 0:
            return Written(reason=BUDGET)
        return tasks(f"Write about subject number {left[0]} {'xyz'[left[0]] * 9} in verse.")

    one, asked = work(answer, method="self_instruct", prompts_per_round=2, ask_for_inputs=False, max_similarity=0.99)
    drafts = one.self_instruct(SEEDS)
    assert len(asked) == 2 + 2 + 2 + 3  # the third round is refused whole
    assert one.account.rows.to_dict() == {"in": 3, "kept": 0, "dropped": {BUDGET: 3}}
    assert one.account.instructions.dropped == {BUDGET: 3}
    assert not [draft for draft in drafts if draft.chosen]


def prompt(text: str) -> Prompt:
    return Prompt(
        f"p:{text}", "p.jsonl", ({"role": "system", "content": "Be brief."}, {"role": "user", "content": text})
    )


def test_the_best_of_several_responses_is_kept_and_equal_ones_by_their_order() -> None:
    def answer(one: Asked) -> Written:
        return Written("word " * (one.number + 1), is_cut=one.number == 3)

    def score(pairs: Sequence[tuple[Sequence[Any], str]]) -> list[float | str]:
        assert all(messages[0]["content"] == "Be brief." for messages, _ in pairs)
        return ["scorer_failed" if text == "word" else float(len(text.split()) > 2) for _, text in pairs]

    settings = {"num_responses": 5, "scorer": LengthRule(), "max_repetition": 1.0}
    one, asked = work(answer, score=score, method="distillation", **settings)
    (draft,) = one.distillation([prompt("Say words.")])
    assert [each.number for each in asked] == [0, 1, 2, 3, 4]
    assert [candidate.outcome for candidate in draft.candidates] == [
        "scorer_failed", ACCEPTED, ACCEPTED, "cut_off", ACCEPTED,
    ]  # fmt: skip
    assert [candidate.score for candidate in draft.candidates] == [None, 0.0, 1.0, None, 1.0]
    assert draft.chosen is not None
    assert draft.chosen.text == "word word word"
    assert draft.provenance == {
        "row": "p:Say words.", "source": "p.jsonl", "sampled": 5, "prompt": asked[2].digest, "score": 1.0,
    }  # fmt: skip
    assert one.account.responses.to_dict() == {"in": 5, "kept": 4, "dropped": {"cut_off": 1}}


def test_a_best_response_below_the_least_score_is_dropped() -> None:
    settings = {"scorer": LengthRule(), "min_score": 0.5}
    one, _ = work(lambda each: Written("Fine."), score=lambda pairs: [0.4 for _ in pairs], **settings)
    (draft,) = one.distillation([prompt("Hello?")])
    assert (draft.outcome, draft.chosen) == ("score_too_low", None)
    assert one.account.rows.to_dict() == {"in": 1, "kept": 0, "dropped": {"score_too_low": 1}}


def test_without_a_scorer_the_first_response_that_passes_is_kept() -> None:
    one, _ = work(lambda each: Written("" if each.number == 0 else f"Answer {each.number}."), num_responses=3)
    (draft,) = one.distillation([prompt("Hello?")])
    assert draft.chosen is not None
    assert draft.chosen.text == "Answer 1."


def test_earlier_answers_of_a_conversation_are_not_trained_on() -> None:
    turns = (
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Go"},
    )
    one, _ = work(lambda each: Written("Gone."))
    (row,) = rows(
        one.distillation([Prompt("p:1", "p", turns)]), method=Synthesis.DISTILLATION, generator="m", identity=""
    )
    assert [turn.get("weight") for turn in row["messages"]] == [None, 0, None, None]


def test_grounded_questions_differ_and_their_answers_are_in_the_text() -> None:
    passages = [
        Passage("a.txt", "texts", "Whales are mammals. They breathe air."),
        Passage("b.txt", "texts", "Tin melts."),
    ]
    script = {
        ("Whales", 0): Written("Question: What are whales?\nAnswer: Whales are mammals."),
        ("Whales", 1): Written("Question: What are the whales?\nAnswer: Mammals."),
        ("Tin", 0): Written("Question: At what temperature?\nAnswer: Around two hundred degrees."),
        ("Tin", 1): Written("It melts."),
    }
    one, asked = work(
        lambda each: script[said(each).split()[1], each.number], method="grounded", questions_per_text=2, num_rows=4
    )
    drafts = one.grounded(passages)
    assert [draft.outcome for draft in drafts] == [ACCEPTED, "not_in_text", "near_copy", "no_question"]
    assert "- What are whales?" in said(asked[2])
    assert "something else" not in said(asked[3])  # the question that was dropped is not shown
    (row,) = rows(drafts, method=Synthesis.GROUNDED, generator="m", identity="d")
    assert row["messages"][0]["content"] == "What are whales?\n\nWhales are mammals. They breathe air."
    assert {"doc": "a.txt", "source": "texts", "question": "What are whales?"}.items() <= row["provenance"].items()
    assert one.account.to_dict()["rows"] == {
        "in": 4, "kept": 1, "dropped": {"near_copy": 1, "no_question": 1, "not_in_text": 1},
    }  # fmt: skip


def test_no_more_questions_are_asked_than_rows_are_wanted_and_the_text_may_stay_out() -> None:
    passages = [Passage(f"{number}", "t", f"Text {number} says it.") for number in range(3)]
    answer = Written("Question: What does the text say?\nAnswer: Text says.")
    one, asked = work(lambda each: answer, method="grounded", questions_per_text=1, num_rows=2, with_text=False)
    drafts = one.grounded(passages)
    assert len(asked) == 2
    assert [draft.messages[0]["content"] for draft in drafts] == ["What does the text say?"] * 2


def test_another_seed_asks_with_other_numbers() -> None:
    numbers = []
    for seed in (0, 1):
        one, asked = work(lambda each: Written("Fine."), seed=seed, num_responses=2)
        one.distillation([prompt("Hello?")])
        numbers.append([each.number for each in asked])
    assert numbers == [[0, 1], [1 << 20, (1 << 20) + 1]]


@pytest.mark.parametrize("count", [0, 1, 16, 17, 40])
def test_shards_lose_nothing(count: int) -> None:
    one, _ = work(lambda each: Written(f"{said(each)} is fine."), num_responses=2, max_copied=1.0)
    drafts: list[Draft] = one.distillation([prompt(f"Thing {number}") for number in range(count)])
    assert [draft.chosen.text for draft in drafts if draft.chosen] == [f"Thing {n} is fine." for n in range(count)]
