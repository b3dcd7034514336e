"""Rows that users bring: common shapes are detected from their fields and adapted; everything else has a reason."""

import json
from pathlib import Path
from typing import Any

import pytest

from stages.config.curate import CurateConfig
from stages.config.errors import DataError
from stages.config.sources import InstructionFormat, PreferenceFormat, parse_source
from stages.data.curation.ledger import Step
from stages.data.pairs import instructions, preferences
from stages.data.pairs.given import given_instructions, given_preferences
from stages.data.pairs.instructions import to_conversation
from stages.data.pairs.preferences import to_preferences
from stages.data.pairs.sides import Preference, split_transcript
from stages.data.pairs.turns import Conversation, Unusable
from tests.places import SHARED

DATA = SHARED / "data"
_CONFIG = CurateConfig(heldout_fraction=0.0)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def adapted(values: dict[str, Any]) -> Conversation | str:
    """Through detection and adapter, or the reason."""
    (shape,) = instructions.fitting_formats(values)
    try:
        return to_conversation(shape, values)
    except Unusable as error:
        return error.reason


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(*lines: str, config: CurateConfig = _CONFIG) -> tuple[list[dict[str, Any]], Step, dict[str, Any]]:
    steps: list[Step] = []
    accounts: dict[str, Any] = {}
    rows = given_instructions([parse_source(line) for line in lines], config, steps, accounts)
    steps[0].verify()
    return rows, steps[0], accounts


def load_pairs(*lines: str) -> tuple[list[dict[str, Any]], Step, dict[str, Any]]:
    steps: list[Step] = []
    accounts: dict[str, Any] = {}
    rows = given_preferences([parse_source(line) for line in lines], _CONFIG, steps, accounts)
    steps[0].verify()
    return rows, steps[0], accounts


def dropped(step: Step) -> dict[str, int]:
    return {reason: amount.documents for reason, amount in step.dropped.items()}


@pytest.mark.parametrize(
    ("shape", "values", "expected"),
    [
        ("alpaca", {"instruction": "Add.", "input": "1 2", "output": "3"}, [user("Add.\n\n1 2"), assistant("3")]),
        ("alpaca", {"instruction": "Add.", "input": "", "output": "3", "text": "x"}, [user("Add."), assistant("3")]),
        (
            "alpaca",
            {"instruction": "c", "output": "d", "history": [["a", "b"]], "system": "s"},
            [system("s"), user("a"), assistant("b"), user("c"), assistant("d")],
        ),
        (
            "dolly",
            {"instruction": "Who?", "context": "Ann sang.", "response": "Ann", "category": "closed_qa"},
            [user("Who?\n\nAnn sang."), assistant("Ann")],
        ),
        ("instruction", {"instruction": "Add.", "input": "1", "response": "3"}, [user("Add.\n\n1"), assistant("3")]),
        ("instruction", {"instruction": "Add.", "completion": "3"}, [user("Add."), assistant("3")]),
        ("flan", {"inputs": "Q: 1+2?", "targets": "3", "task": "sum"}, [user("Q: 1+2?"), assistant("3")]),
        ("prompt", {"prompt": "Add.", "response": " 3 "}, [user("Add."), assistant("3")]),
        ("prompt", {"question": "Add.", "answer": "3"}, [user("Add."), assistant("3")]),
        (
            "prompt",
            {"system_prompt": "Be brief.", "question": "Add.", "response": "3"},
            [system("Be brief."), user("Add."), assistant("3")],
        ),
        (
            "messages",
            {"messages": [system("s"), user("a"), assistant("b"), user("c"), assistant("d")], "prompt": "a"},
            [system("s"), user("a"), assistant("b"), user("c"), assistant("d")],
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": [text_part("a "), text_part("b")]}, assistant("c")]},
            [user("a b"), assistant("c")],
        ),
        ("messages", {"conversations": [user("a"), assistant("b")]}, [user("a"), assistant("b")]),
        (
            "sharegpt",
            {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "a"},
                               {"from": "gpt", "value": "b"}, {"from": "human", "value": "c"},
                               {"from": "gpt", "value": "d"}]},
            [system("s"), user("a"), assistant("b"), user("c"), assistant("d")],
        ),
        (
            "oasst_tree",
            {"message_tree_id": "t", "prompt": {"text": "a", "role": "prompter", "replies": [
                {"text": "worse", "role": "assistant", "rank": 1, "replies": []},
                {"text": "better", "role": "assistant", "rank": 0, "replies": []},
                {"text": "gone", "role": "assistant", "rank": -1, "deleted": True, "replies": []},
            ]}},
            [user("a"), assistant("better")],
        ),
    ],
)  # fmt: skip
def test_instruction_shapes(shape: str, values: dict[str, Any], expected: list[dict[str, str]]) -> None:
    assert instructions.fitting_formats(values) == [shape]
    made = adapted(values)
    assert isinstance(made, Conversation)
    assert list(made.messages) == expected


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"instruction": "Add.", "response": "  "}, "empty_response"),
        ({"instruction": "Add.", "response": None, "completion": None}, "empty_response"),
        ({"instruction": " ", "response": "3"}, "empty_prompt"),
        ({"instruction": "Add.", "response": 3}, "not_text"),
        ({"messages": [user("Add.")]}, "no_assistant_turn"),
        ({"messages": [system("s")]}, "no_turns"),
        ({"messages": [{"role": "robot", "content": "3"}]}, "unknown_role"),
        ({"messages": [user("a"), {"role": "tool", "content": "3"}, assistant("b")]}, "tool_answer_without_call"),
        ({"messages": [user("a"), {"role": "assistant", "content": None, "tool_calls": [{}]}]}, "malformed_tool_call"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, assistant("b")]}, "not_text"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": 3, "content": "b"}]}, "malformed_turn"),
        ({"messages": [assistant("3")]}, "starts_with_assistant"),
        ({"messages": [user("a"), user("b"), assistant("c")]}, "wrong_alternation"),
        ({"messages": [user("a"), assistant("b"), assistant("c")]}, "wrong_alternation"),
        ({"messages": [user("a"), system("s"), assistant("c")]}, "system_not_first"),
        ({"messages": [user("a"), assistant(""), user("b"), assistant("c")]}, "empty_response"),
        ({"messages": [user("a"), assistant("x"), user(" "), assistant("c")]}, "empty_prompt"),
        ({"conversations": [{"from": "gpt", "value": "hi"}, {"from": "human", "value": "a"}]}, "starts_with_assistant"),
        ({"conversations": [{"from": "tool", "value": ""}, {"from": "gpt", "value": "a"}]}, "tool_answer_without_call"),
    ],
)  # fmt: skip
def test_unusable_instructions_have_a_reason(values: dict[str, Any], reason: str) -> None:
    values = {name: "" if value is None else value for name, value in values.items()}
    assert adapted(values) == reason


def test_a_last_question_without_an_answer_is_cut_and_counted() -> None:
    made = adapted({"messages": [user("a"), assistant("b"), user("c")]})
    assert made == Conversation((user("a"), assistant("b")), ("unanswered_last_turn",))
    made = adapted({"messages": [system(""), user("a"), assistant("b")]})
    assert made == Conversation((user("a"), assistant("b")), ("blank_system_message",))


def test_each_file_of_a_source_has_a_format_of_its_own(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{"instruction": "Add.", "output": "3"}])
    write(tmp_path / "b.jsonl", [{"inputs": "Add.", "targets": "4"}, {"inputs": "Add.", "targets": ""}])
    rows, step, accounts = load(str(tmp_path))
    assert [row["messages"][-1]["content"] for row in rows] == ["3", "4"]
    assert dropped(step) == {"empty_response": 1}
    account = {"formats": {"alpaca": 1, "flan": 2}, "in": 3, "kept": 2, "dropped": {"empty_response": 1}, "changed": {}}
    assert accounts == {str(tmp_path): account}


def test_a_context_that_only_later_rows_have_is_not_lost(tmp_path: Path) -> None:
    early = [{"instruction": f"q{n}", "response": "a", "context": None} for n in range(150)]
    rows, _, _ = load(write(tmp_path / "a.jsonl", [*early, {"instruction": "q", "response": "a", "context": "c"}]))
    assert rows[-1]["messages"][0]["content"] == "q\n\nc"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"instruction": "a", "output": "b", "response": "c"},
            "fit alpaca and instruction; found: instruction, output",
        ),
        ({"headline": "a", "body": "b"}, "fit none of the formats .*; found: body, headline"),
    ],
)
def test_fields_that_fit_no_format_or_two_are_refused_by_name(tmp_path: Path, row: dict[str, str], said: str) -> None:
    path = write(tmp_path / "a.jsonl", [row])
    with pytest.raises(DataError, match=said) as caught:
        load(path)
    assert "#format=" in caught.value.advice


def test_a_stated_format_decides_where_fields_do_not(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"instruction": "a", "output": "b", "response": "c"}])
    rows, _, accounts = load(f"{path}#format=alpaca")
    assert rows[0]["messages"][1]["content"] == "b"
    assert rows[0]["group"] == path
    assert accounts[path]["formats"] == {"alpaca": 1}
    rows, step, _ = load(f"{path}#format=sharegpt")
    assert (rows, dropped(step)) == ([], {"no_turns": 1})


def message(name: str, parent: str | None, text: str, rank: int | None = None, **more: Any) -> dict[str, Any]:
    role = "prompter" if len(name) % 2 else "assistant"
    return {"message_id": name, "parent_id": parent, "text": text, "role": role, "rank": rank, **more}


def test_a_table_of_messages_becomes_the_best_ranked_path_of_each_tree(tmp_path: Path) -> None:
    rows, step, accounts = load(
        write(
            tmp_path / "trees.jsonl",
            [
                message("ab", "a", "second best", 1),  # a reply may stand before its question
                message("a", None, "question"),
                message("ac", "a", "best", 0),
                message("acd", "ac", "nobody answers this", 0),
                message("ace", "ac", "and then?", 1),
                message("acef", "ace", "first of two without rank"),
                message("aceg", "ace", "second of two without rank"),
                message("acdx", "acd", "removed", 0, deleted=True),
                message("acefg", "acef", "and no answer"),
                message("ah", "a", "spam", 0, review_result=False),
                message("ahi", "ah", "reply to spam"),
                message("j", None, "a tree without an answer"),
            ],
        )
    )
    assert [row["messages"] for row in rows] == [
        [user("question"), assistant("best"), user("and then?"), assistant("first of two without rank")]
    ]
    assert step.entered.documents == 12
    assert dropped(step) == {
        "joined": 3,
        "unanswered": 1,
        "not_best_ranked": 3,
        "deleted": 1,
        "failed_review": 1,
        "parent_missing": 1,
        "no_assistant_turn": 1,
    }
    assert accounts[str(tmp_path / "trees.jsonl")]["changed"] == {"unanswered_last_turn": 1}


@pytest.mark.parametrize(
    ("shape", "values"),
    [
        ("pair", {"prompt": "Q", "chosen": "good", "rejected": "bad"}),
        ("pair", {"prompt": [user("Q")], "chosen": [assistant("good")], "rejected": assistant("bad")}),
        ("pair", {"prompt": "\n\nHuman: Q\n\nAssistant:", "chosen": " good", "rejected": " bad"}),
        ("pair", {"prompt": "Q", "chosen": [user("Q"), assistant("good")], "rejected": [user("Q"), assistant("bad")]}),
        ("transcripts", {"chosen": "\n\nHuman: Q\n\nAssistant: good", "rejected": "\n\nHuman: Q\n\nAssistant: bad"}),
        ("dialogues", {"chosen": [user("Q"), assistant("good")], "rejected": [user("Q"), assistant("bad")]}),
        ("ranked", {"prompt": "Q", "responses": ["bad", "good"], "ranks": [2, 1]}),
        ("ranked", {"prompt": "Q", "responses": ["bad", "good"], "scores": [0.1, 0.9]}),
        ("ranked", {"prompt": "Q", "responses": ["bad", "good"], "ranking": [1, 0]}),
        ("ranked", {"instruction": "Q", "completions": [{"response": "bad", "overall_score": 1},
                                                        {"response": "good", "overall_score": 8}]}),
        ("ranked", {"prompt": "Q", "answers": [{"answer": "bad", "rank": 2.0}, {"answer": "good", "rank": 1.0}]}),
    ],
)  # fmt: skip
def test_preference_shapes_agree(shape: str, values: dict[str, Any]) -> None:
    assert preferences.fitting_formats(values) == [shape]
    assert to_preferences(PreferenceFormat(shape), values) == [Preference((user("Q"),), "good", "bad")]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"prompt": "Q", "chosen": "same", "rejected": " same "}, "equal_sides"),
        ({"prompt": "Q", "chosen": "good", "rejected": ""}, "side_missing"),
        ({"prompt": " ", "chosen": "good", "rejected": "bad"}, "no_prompt"),
        ({"prompt": [user("a"), assistant("b")], "chosen": "good", "rejected": "bad"}, "no_prompt"),
        ({"prompt": [user("a"), user("b")], "chosen": "good", "rejected": "bad"}, "wrong_alternation"),
        ({"chosen": "good", "rejected": "bad"}, "no_prompt"),
        ({"chosen": "Human: A\n\nAssistant: x", "rejected": "Human: B\n\nAssistant: y"}, "prompts_differ"),
        ({"chosen": "Human: A\n\nAssistant: x", "rejected": "Human: A\n\nAssistant: y\n\nHuman: z"}, "no_response"),
        ({"chosen": [user("A"), assistant("x")], "rejected": [user("A"), user("y")]}, "no_response"),
        ({"prompt": "B", "chosen": [user("A"), assistant("x")], "rejected": [user("A"), assistant("y")]},
         "prompts_differ"),
        ({"prompt": "Q", "responses": ["only"], "scores": [1]}, "one_response"),
        ({"prompt": "Q", "responses": ["a", "b"]}, "no_ranking"),
        ({"prompt": "Q", "responses": ["a", "b"], "scores": [1, None]}, "no_ranking"),
        ({"prompt": "Q", "responses": ["a", "b"], "ranking": [1, 1]}, "malformed_ranking"),
        ({"prompt": "Q", "responses": ["a", "b"], "scores": [1, 1]}, "tie"),
        ({"prompt": "Q", "responses": ["a", "a"], "scores": [1, 2]}, "equal_sides"),
    ],
)  # fmt: skip
def test_unusable_preferences_have_a_reason(values: dict[str, Any], reason: str) -> None:
    (shape,) = preferences.fitting_formats(values)
    try:
        found = to_preferences(shape, values)
    except Unusable as error:
        found = [error.reason]
    assert found == [reason]


def test_a_ranking_of_k_gives_all_its_ordered_pairs_and_ties_are_counted(tmp_path: Path) -> None:
    row = {"prompt": "Q", "responses": ["c", "a", "b", "also b"], "scores": [1, 9, 5, 5]}
    rows, step, _ = load_pairs(write(tmp_path / "r.jsonl", [row, {"prompt": "Q", "responses": ["x"], "scores": [1]}]))
    assert {(pair["chosen"], pair["rejected"]) for pair in rows} == {
        ("a", "b"),
        ("a", "also b"),
        ("a", "c"),
        ("b", "c"),
        ("also b", "c"),
    }
    assert len({pair["id"] for pair in rows}) == 5
    assert step.entered.documents == 7  # 4 * 3 / 2 pairs, and a row of its own for what is no list
    assert dropped(step) == {"tie": 1, "one_response": 1}


def test_a_transcript_is_read_turn_by_turn() -> None:
    text = "\n\nHuman: one\n\nAssistant: two\n\nHuman: three\nlines\n\nAssistant: four"
    assert split_transcript(text) == [user("one"), assistant("two"), user("three\nlines"), assistant("four")]
    assert split_transcript("no transcript") == []


def weighted(role: str, text: str, weight: float) -> dict[str, Any]:
    return {"from": role, "value": text, "weight": weight}


def test_a_weight_of_zero_counts_only_where_a_turn_would_be_trained() -> None:
    turns = [weighted("system", "s", 0), weighted("human", "a", 0), weighted("gpt", "b", 1)]
    assert adapted({"conversations": turns}) == Conversation((system("s"), user("a"), assistant("b")))
    turns[-1]["weight"] = 0
    unweighted = {**assistant("b"), "weight": 0}
    assert adapted({"conversations": turns}) == Conversation((system("s"), user("a"), unweighted))


PREAMBLE = "You are a librarian.\n\nHuman: Q\n\nAssistant:"


@pytest.mark.parametrize(
    "values",
    [
        {"chosen": PREAMBLE + " good", "rejected": PREAMBLE + " bad"},
        {"prompt": PREAMBLE, "chosen": " good", "rejected": " bad"},
        {"prompt": "\n\n" + PREAMBLE + "\n", "chosen": "good", "rejected": "bad"},
    ],
)
def test_text_before_the_first_human_is_the_system_message(values: dict[str, Any]) -> None:
    (shape,) = preferences.fitting_formats(values)
    assert to_preferences(shape, values) == [Preference((system("You are a librarian."), user("Q")), "good", "bad")]


def test_different_preambles_are_different_prompts() -> None:
    values = {"chosen": PREAMBLE + " good", "rejected": PREAMBLE.replace("librarian", "cook") + " bad"}
    with pytest.raises(Unusable, match="prompts_differ"):
        to_preferences(PreferenceFormat.TRANSCRIPTS, values)


def test_a_preamble_before_an_answer_is_counted_and_a_quoted_transcript_stays_a_question() -> None:
    sides = {"chosen": "Hello.\n\nAssistant: good", "rejected": "Hello.\n\nAssistant: bad"}
    with pytest.raises(Unusable, match="no_prompt"):
        to_preferences(PreferenceFormat.TRANSCRIPTS, sides)
    quoted = "Who speaks here?\n\nHuman: hi\n\nAssistant: hello"
    values = {"prompt": quoted, "chosen": "good", "rejected": "bad"}
    assert to_preferences(PreferenceFormat.PAIR, values) == [Preference((user(quoted),), "good", "bad")]


@pytest.mark.parametrize(
    "values",
    [
        {"system": "s", "chosen": [user("Q"), assistant("good")], "rejected": [user("Q"), assistant("bad")]},
        {"system": "s", "prompt": "Q", "chosen": [user("Q"), assistant("good")],
         "rejected": [user("Q"), assistant("bad")]},
        {"system_prompt": "s", "chosen": "Human: Q\n\nAssistant: good", "rejected": "Human: Q\n\nAssistant: bad"},
        {"system": "", "system_prompt": "s", "prompt": "Q", "chosen": "good", "rejected": "bad"},
        {"system": "s", "prompt": "Q", "chosen": [system("s"), user("Q"), assistant("good")],
         "rejected": [system("s"), user("Q"), assistant("bad")]},
    ],
)  # fmt: skip
def test_a_rows_system_message_does_not_vanish_behind_the_sides_own_turns(values: dict[str, Any]) -> None:
    (shape,) = preferences.fitting_formats(values)
    assert to_preferences(shape, values) == [Preference((system("s"), user("Q")), "good", "bad")]


@pytest.mark.parametrize(
    "values",
    [
        {"system": "Be brief.", "chosen": [system("No jokes."), user("Q"), assistant("good")],
         "rejected": [system("No jokes."), user("Q"), assistant("bad")]},
        {"system": "Be brief.", "prompt": [system("No jokes."), user("Q")], "chosen": "good", "rejected": "bad"},
        {"system": "Be brief.", "chosen": "No jokes.\n\nHuman: Q\n\nAssistant: good",
         "rejected": "No jokes.\n\nHuman: Q\n\nAssistant: bad"},
    ],
)  # fmt: skip
def test_a_rows_system_message_and_another_one_of_its_turns_become_one(values: dict[str, Any]) -> None:
    (shape,) = preferences.fitting_formats(values)
    joined = system("Be brief.\n\nNo jokes.")
    assert to_preferences(shape, values) == [Preference((joined, user("Q")), "good", "bad")]
    turns = {"system": "Be brief.", "messages": [system("No jokes."), user("Q"), assistant("good")]}
    assert adapted(turns) == Conversation((joined, user("Q"), assistant("good")))
    turns = {"system": "Be brief.", "messages": [system(""), user("Q"), assistant("good")]}
    assert adapted(turns) == Conversation((system("Be brief."), user("Q"), assistant("good")))


@pytest.mark.parametrize("history", ["earlier", {"q": "a"}, 7])
def test_a_history_that_is_no_list_is_counted(history: object) -> None:
    row = {"instruction": "Add.", "output": "3", "history": history}
    assert adapted(row) == "malformed_turn"
    assert adapted({**row, "history": None}) == Conversation((user("Add."), assistant("3")))


def deep_tree(levels: int) -> dict[str, Any]:
    tree: dict[str, Any] = {"role": "assistant", "text": "x", "replies": []}
    for level in range(levels):
        tree = {"role": ("prompter", "assistant")[level % 2], "text": "x", "replies": [tree]}
    return tree


@pytest.mark.parametrize(
    "tree",
    [
        {"role": "prompter", "text": "x", "replies": 7},
        {"role": "prompter", "text": "x", "replies": {"a": 1}},
        deep_tree(5000),
    ],
    ids=["replies are a number", "replies are an object", "5000 levels"],
)
def test_a_tree_that_is_none_is_counted(tree: dict[str, Any]) -> None:
    with pytest.raises(Unusable, match="malformed_turn"):
        to_conversation(InstructionFormat.OASST_TREE, {"prompt": tree})


def test_a_parent_that_is_no_name_is_missing(tmp_path: Path) -> None:
    rows = [{"message_id": "a", "parent_id": ["b"], "role": "prompter", "text": "x"}]
    made, step, _ = load(write(tmp_path / "trees.jsonl", rows))
    assert made == []
    assert dropped(step) == {"parent_missing": 1}


@pytest.mark.parametrize(
    ("ranks", "reason"),
    [({"ranking": [0, "1"]}, "malformed_ranking"), ({"ranking": [0, None]}, "malformed_ranking")],
)
def test_a_ranking_of_no_numbers_is_counted(ranks: dict[str, Any], reason: str) -> None:
    with pytest.raises(Unusable, match=reason):
        to_preferences(PreferenceFormat.RANKED, {"prompt": "Q", "responses": ["a", "b"], **ranks})


def test_scores_may_be_larger_than_any_float() -> None:
    values = {"prompt": "Q", "responses": ["a", "b"], "scores": [1, 10**400]}
    assert to_preferences(PreferenceFormat.RANKED, values) == [Preference((user("Q"),), "b", "a")]


def test_conversations_that_start_alike_are_held_out_together(tmp_path: Path) -> None:
    openings = [f"question {number}" for number in range(40)]
    one = write(tmp_path / "1.jsonl", [{"prompt": text, "response": "x"} for text in openings])
    turns = [{"messages": [system("s"), user(text), assistant("a"), user("b"), assistant("c")]} for text in openings]
    config = CurateConfig(heldout_fraction=0.5)
    rows, _, _ = load(one, write(tmp_path / "2.jsonl", turns), config=config)
    halves = [row["heldout"] for row in rows]
    assert halves[:40] == halves[40:]
    assert 5 < sum(halves[:40]) < 35


def test_a_row_after_unreadable_ones_is_read_as_what_it_is(tmp_path: Path) -> None:
    source = tmp_path / "damaged.jsonl"
    source.write_text("x\n" * 100 + json.dumps({"instruction": "a", "response": "b"}) + "\n")
    rows, step, _ = load(str(source), config=CurateConfig(heldout_fraction=0.0, max_bad_fraction=1.0))
    assert [row["messages"] for row in rows] == [[user("a"), assistant("b")]]
    assert dropped(step) == {"invalid_json": 100}
    with pytest.raises(DataError, match="100 of 101 records"):
        load(str(source))


@pytest.mark.skipif(not DATA.exists(), reason="../shared/data is not there")
def test_real_preference_transcripts_are_understood() -> None:
    rows, step, accounts = load_pairs(str(DATA / "preference" / "hh_harmless_base_test.jsonl.gz"))
    assert step.entered.documents == 2312
    assert len(rows) == 2299
    assert dropped(step) == {"side_missing": 4, "wrong_alternation": 4, "prompts_differ": 5}
    assert all(row["prompt"][-1]["role"] == "user" for row in rows)
    assert max(len(row["prompt"]) for row in rows) > 5
    assert next(iter(accounts.values()))["formats"] == {"transcripts": 2312}


@pytest.mark.skipif(not DATA.exists(), reason="../shared/data is not there")
@pytest.mark.parametrize(
    ("name", "shape", "total"),
    [
        ("gpteacher_codegen.json.gz", InstructionFormat.INSTRUCTION, 4535),
        ("gpteacher_roleplay.json.gz", InstructionFormat.INSTRUCTION, 1923),
        ("dolly_hhrlhf_small.jsonl.gz", InstructionFormat.PROMPT, 1000),
    ],
)
def test_real_instructions_are_understood(name: str, shape: InstructionFormat, total: int) -> None:
    rows, step, accounts = load(str(DATA / "sft" / name))
    assert next(iter(accounts.values()))["formats"] == {shape: total}
    assert step.entered.documents == total
    assert len(rows) > 0.98 * total
