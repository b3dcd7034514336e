"""The shapes in which people keep conversations and judgements, row by row, and tables that mix them."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from stages.config.curate import CurateConfig
from stages.config.errors import DataError
from stages.config.sources import PreferenceFormat, parse_source
from stages.data.curation.ledger import Step
from stages.data.pairs import instructions, preferences
from stages.data.pairs.given import given_instructions, given_preferences
from stages.data.pairs.instructions import to_conversations
from stages.data.pairs.labels import Coding
from stages.data.pairs.preferences import to_preferences
from stages.data.pairs.turns import Conversation, Unusable
from tests.curating import write_jsonl

EVERYTHING = CurateConfig(heldout_fraction=0.0, max_bad_fraction=1.0)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


class Loaded:
    """What became of the rows of some sources."""

    def __init__(self, adapt: Any, *lines: str, config: CurateConfig = EVERYTHING) -> None:
        steps: list[Step] = []
        self.accounts: dict[str, Any] = {}
        self.rows = adapt([parse_source(line) for line in lines], config, steps, self.accounts)
        steps[0].verify()
        self.step = steps[0]
        self.dropped = {reason: amount.documents for reason, amount in steps[0].dropped.items()}
        (self.account, *_) = self.accounts.values()


def conversations(*lines: str, config: CurateConfig = EVERYTHING) -> Loaded:
    return Loaded(given_instructions, *lines, config=config)


def pairs(*lines: str, config: CurateConfig = EVERYTHING) -> Loaded:
    return Loaded(given_preferences, *lines, config=config)


def as_csv(path: Path, rows: list[dict[str, Any]], *, spell: Any = json.dumps) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for row in rows:
            cells = {name: value if isinstance(value, str | int) else spell(value) for name, value in row.items()}
            writer.writerow(cells)
    return str(path)


@pytest.mark.parametrize(
    ("shape", "values", "expected"),
    [
        ("instances", {"id": "t", "instruction": "Add.", "instances": [{"input": "1 2", "output": "3"}]},
         [[user("Add.\n\n1 2"), assistant("3")]]),
        ("instances", {"instruction": "Add.", "instances": [{"input": "1", "output": "1"},
                                                             {"input": "", "output": "0"}]},
         [[user("Add.\n\n1"), assistant("1")], [user("Add."), assistant("0")]]),
        ("instances", {"Definition": ["Add.", "Sum up."], "Categories": ["Math"],
                       "Instances": [{"id": "i", "input": "1 2", "output": ["3", "three"]}]},
         [[user("Add.\n\n1 2"), assistant("3")]]),
        ("instances", {"instruction": "Add.", "instances": [{"instruction_with_input": "Add 1 and 2.", "input": "1 2",
                                                             "constraints": "None.", "output": "3"}]},
         [[user("Add 1 and 2."), assistant("3")]]),
        ("turns", {"id": "0", "data": ["a", "b", "c", "d"]},
         [[user("a"), assistant("b"), user("c"), assistant("d")]]),
        ("turns", {"source": "x", "conversation": [{"input": "a", "output": "b"}, {"input": "c", "output": "d"}]},
         [[user("a"), assistant("b"), user("c"), assistant("d")]]),
        ("messages", {"conversation": [user("a"), assistant("b")], "model": "m"}, [[user("a"), assistant("b")]]),
        ("prompt", {"query": "Add.", "response": "3"}, [[user("Add."), assistant("3")]]),
        ("prompt", {"problem": "Add.", "solution": "3"}, [[user("Add."), assistant("3")]]),
        ("prompt", {"input": "Add.", "output": "3"}, [[user("Add."), assistant("3")]]),
        ("prompt", {"input": "1 2", "target": "3", "prompt": "Add."}, [[user("Add.\n\n1 2"), assistant("3")]]),
        # A field that would make another format does not count while it is empty.
        ("instruction", {"instruction": "Add.", "output": None, "response": "3"}, [[user("Add."), assistant("3")]]),
        ("sharegpt", {"messages": [], "conversations": [{"from": "human", "value": "a"},
                                                       {"from": "gpt", "value": "b"}]},
         [[user("a"), assistant("b")]]),
    ],
)  # fmt: skip
def test_conversations_of_every_shape(shape: str, values: dict[str, Any], expected: list[Any]) -> None:
    (found,) = instructions.fitting_formats(values)
    assert found == shape
    made = to_conversations(found, values)
    assert [list(one.messages) for one in made if isinstance(one, Conversation)] == expected
    assert len(made) == len(expected)


def test_each_instance_is_a_conversation_or_has_a_reason_and_shares_the_size(tmp_path: Path) -> None:
    instances = [
        {"input": "1", "output": "one"},
        {"input": "2", "output": " "},
        "three",
        {"input": "4", "output": "four"},
    ]
    source = write_jsonl(tmp_path / "a.jsonl", [{"instruction": "Spell.", "instances": instances},
                                                {"instruction": "Spell.", "instances": ["five"]}])  # fmt: skip
    loaded = conversations(source + "#format=instances")
    assert [row["messages"][1]["content"] for row in loaded.rows] == ["one", "four"]
    assert loaded.dropped == {"empty_response": 1, "malformed_instance": 2}
    assert loaded.step.entered.documents == 5
    assert loaded.step.entered.bytes == (tmp_path / "a.jsonl").stat().st_size
    assert [row["id"] for row in loaded.rows] == ["0/a.jsonl:1/0", "0/a.jsonl:1/3"]
    other = {"Definition": "Add.", "Instances": [{"input": "1", "output": ["1", "one"]}]}
    loaded = conversations(write_jsonl(tmp_path / "b.jsonl", [other]))
    assert loaded.account["changed"] == {"other_answers_left_out": 1}


A_B = {"prompt": "Q", "response_a": "good", "response_b": "bad"}


@pytest.mark.parametrize(
    "values",
    [
        {**A_B, "label": "a"},
        {**A_B, "label": "A"},
        {**A_B, "winner": "model_a"},
        {**A_B, "preference": "response_a"},
        {**A_B, "winner": "gpt", "model_a": "GPT", "model_b": "other"},
        {**A_B, "verdict": "[[A]]"},
        {**A_B, "judgment": "A>>B"},
        {**A_B, "label": 0},
        {**A_B, "winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0},
        {**A_B, "score_a": 7.5, "score_b": "3"},
        {**A_B, "labels": ["a", "b", "a"]},
        {**A_B, "labels": {"ann": "a", "bob": "tie", "cy": "a"}},
        {**A_B, "annotations": [{"label": "a", "by": "x"}, {"label": "a", "by": "y"}]},
        {**A_B, "label_1": "a", "label_2": "a", "label_3": "b"},
        {"prompt": "Q", "response_0": "good", "response_1": "bad", "better_response_id": 0, "safer_response_id": 1},
        {"prompt": "Q", "response_0": "bad", "response_1": "good", "better_response_id": 1},
        {"instruction": "Q", "output_1": "good", "output_2": "bad", "preference": 1},
        {"instruction": "Q", "output_1": "bad", "output_2": "good", "preference": 1.9},
        {"question": "Q", "answer_a": "bad", "answer_b": "good", "label": "B"},
        {"prompt": "Q", "response_1": "good", "response_2": "bad", "preference_strength": -2},
        {"context": [user("Q")], "response1": "bad", "response2": "good", "overall_preference": 1},
        {"history": "Q", "human_ref_A": "good", "human_ref_B": "bad", "labels": 1, "score_A": 2, "score_B": 9},
        {"question": {"full_text": "Q", "id": "x"}, "answer_0": "bad", "answer_1": "good", "score_0": -1, "score_1": 1},
        {"conversation_a": [user("Q"), assistant("good")], "conversation_b": [user("Q"), assistant("bad")],
         "winner": "model_a", "model_a": "m", "model_b": "n"},
        {"prompt": ["Q"], "response_a": ["good"], "response_b": ["bad"], "winner_model_a": 1, "winner_model_b": 0},
    ],
)  # fmt: skip
def test_two_responses_and_a_label_are_a_pair(values: dict[str, Any]) -> None:
    assert preferences.fitting_formats(values) == ["pairwise"]
    (made,) = to_preferences(PreferenceFormat.PAIRWISE, values)
    assert not isinstance(made, str)
    assert (made.prompt, made.chosen, made.rejected) == ((user("Q"),), "good", "bad")


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        ({"label": "tie"}, "tie"),
        ({"winner": "tie (bothbad)"}, "tie"),
        ({"label": "C"}, "tie"),
        ({"labels": ["a", "b"]}, "tie"),
        ({"labels": ["a", "tie", "tie"]}, "tie"),
        ({"winner_model_a": 0, "winner_model_b": 0, "winner_tie": 1}, "tie"),
        ({"score_a": 3, "score_b": 3}, "tie"),
        ({"label": "banana"}, "unknown_label"),
        ({"labels": ["a", "banana"]}, "unknown_label"),
        ({"label": None}, "no_label"),
        ({"labels": [None, ""]}, "no_label"),
        ({"label": 7}, "unknown_label"),
        ({"label": 1}, "unclear_label"),
        ({"label": True}, "unclear_label"),
    ],
)
def test_labels_that_prefer_nothing_have_a_reason(label: dict[str, Any], reason: str) -> None:
    try:
        (found,) = to_preferences(PreferenceFormat.PAIRWISE, {**A_B, **label})
    except Unusable as error:
        found = error.reason
    assert found == reason


@pytest.mark.parametrize(
    ("numbers", "label", "chosen"),
    [({0, 1}, 1, "bad"), ({0, 1}, 0, "good"), ({1, 2}, 1, "good"), ({1, 2}, 2, "bad")],
)
def test_numbers_are_places_counted_as_the_table_shows(numbers: set[float], label: int, chosen: str) -> None:
    (made,) = to_preferences(PreferenceFormat.PAIRWISE, {**A_B, "label": label}, Coding(numbers=frozenset(numbers)))
    assert not isinstance(made, str)
    assert made.chosen == chosen


def test_a_label_that_may_mean_either_response_is_refused_until_the_source_says_it(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{**A_B, "label": 1}])
    with pytest.raises(DataError, match=r"label 1 of row 1 of a.jsonl may mean response_a or response_b") as refused:
        pairs(source)
    assert "#first=0&second=1" in refused.value.advice
    assert pairs(f"{source}#first=1&second=0").rows[0]["chosen"] == "good"
    assert pairs(f"{source}#first=0&second=1").rows[0]["chosen"] == "bad"
    assert pairs(f"{source}#first=x&second=y").dropped == {"unknown_label": 1}
    words = write_jsonl(tmp_path / "b.jsonl", [{**A_B, "label": label} for label in ("B", "draw", "yes", "no", 1)])
    loaded = pairs(f"{words}#first=yes&second=no")
    assert [row["chosen"] for row in loaded.rows] == ["bad", "good", "bad"]
    assert loaded.dropped == {"tie": 1, "unknown_label": 1}


def test_a_majority_that_was_contradicted_is_counted_and_so_is_a_draw(tmp_path: Path) -> None:
    labels = [["a", "a"], ["a", "b", "a"], ["a", "b"], ["b", "b", "tie"]]
    rows = [{**A_B, "prompt": f"Q{number}", "labels": votes} for number, votes in enumerate(labels)]
    loaded = pairs(write_jsonl(tmp_path / "a.jsonl", rows))
    assert [row["chosen"] for row in loaded.rows] == ["good", "good", "bad"]
    assert loaded.dropped == {"tie": 1}
    assert loaded.account["changed"] == {"annotators_disagreed": 2}


def rated(response: str, *ratings: str, **more: Any) -> dict[str, Any]:
    aspects = ("helpfulness", "honesty")
    annotations = {
        aspect: {"Rating": rating, "Rationale": "r"} for aspect, rating in zip(aspects, ratings, strict=True)
    }
    return {"model": "m", "response": response, "annotations": annotations, **more}


@pytest.mark.parametrize(
    "values",
    [
        {"instruction": "Q", "models": ["m", "n"], "completions": [rated("bad", "1", "3"), rated("good", "4", "N/A")]},
        {"instruction": "Q", "completions": [rated("bad", "5", "5", overall_score=2.0), rated("good", "1", "1",
                                                                                         overall_score="7.5")]},
        {"instruction": "Q", "completions": [rated("bad", "N/A", "N/A", **{"fine-grained_score": 1.0}),
                                             rated("good", "5", "5", **{"fine-grained_score": 4.5})]},
        {"prompt": "\n\nHuman: Q\n\nAssistant: ", "turns": 1, "num_responses": 2, "source": ["x"],
         "answers": [{"answer": "bad", "model": "m", "rank": 2.0}, {"answer": "good", "model": "n", "rank": 1.0}]},
        {"prompt": "Q", "responses": ["bad", "good"], "ratings": ["1", "5"]},
    ],
)  # fmt: skip
def test_lists_of_rated_responses(values: dict[str, Any]) -> None:
    assert preferences.fitting_formats(values) == ["ranked"]
    (made,) = to_preferences(PreferenceFormat.RANKED, values)
    assert not isinstance(made, str)
    assert (made.prompt, made.chosen, made.rejected) == ((user("Q"),), "good", "bad")


def test_what_a_question_is_about_stands_below_it() -> None:
    values = {"instruction": "Add.", "input": "1 2", "output_1": "3", "output_2": "4", "preference": 1}
    (made,) = to_preferences(PreferenceFormat.PAIRWISE, values)
    assert not isinstance(made, str)
    assert made.prompt == (user("Add.\n\n1 2"),)
    sides = {"chosen": [user("Q"), assistant("good")], "rejected": [user("Q"), assistant("bad")]}
    (made,) = to_preferences(PreferenceFormat.PAIR, {"prompt": "Q", "context": "c", **sides})
    assert not isinstance(made, str)
    assert made.prompt == (user("Q"),), "the dialogues have their own turns"
    sides = {"chosen": "Human: Q\n\nAssistant: good", "rejected": "Human: Q\n\nAssistant: bad", "context": "c"}
    assert preferences.fitting_formats(sides) == ["transcripts"]


def kto(prompt: str, completion: str, label: Any, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, "label": label, **more}


def test_labelled_responses_to_one_prompt_become_pairs_and_every_row_is_counted_once(tmp_path: Path) -> None:
    one = [kto("P", "good 1", True), kto("Q", "alone", True), kto("P", "bad 1", "False"), kto("P", "bad 2", 0),
           kto("R", "also alone", False), kto("S", "x", None), kto("S", "x", "perhaps"),
           kto("P", "", True)]  # fmt: skip
    other = [kto("P", "bad 3", "undesirable"), kto("T", "same", 1), kto("T", "same", 0)]
    write_jsonl(tmp_path / "1.jsonl", one)
    write_jsonl(tmp_path / "2.jsonl", other)
    loaded = pairs(str(tmp_path))
    assert [(row["chosen"], row["rejected"]) for row in loaded.rows] == [
        ("good 1", "bad 1"),
        ("good 1", "bad 2"),
        ("good 1", "bad 3"),
    ]
    assert loaded.dropped == {
        "joined": 2,
        "unpaired_label": 2,
        "no_label": 1,
        "unknown_label": 1,
        "side_missing": 1,
        "equal_sides": 1,
    }
    assert loaded.step.entered.documents == len(one) + len(other)
    assert loaded.account["formats"] == {"labelled": 11}
    assert [sample["text"] for sample in loaded.step.samples["unpaired_label"]] == ["alone", "also alone"]


def test_the_smaller_group_of_labelled_responses_takes_turns(tmp_path: Path) -> None:
    rows = [kto("P", f"good {number}", True) for number in range(2)]
    rows += [kto("P", f"bad {number}", False) for number in range(3)]
    loaded = pairs(write_jsonl(tmp_path / "a.jsonl", rows))
    assert [(row["chosen"], row["rejected"]) for row in loaded.rows] == [
        ("good 0", "bad 0"),
        ("good 1", "bad 1"),
        ("good 0", "bad 2"),
    ]


def test_labelled_dialogues_are_understood(tmp_path: Path) -> None:
    rows = [kto("", "", label) | {"prompt": [user("P")], "completion": [assistant(text)]}
            for label, text in ((True, "good"), (False, "bad"))]  # fmt: skip
    loaded = pairs(write_jsonl(tmp_path / "a.jsonl", rows))
    assert [(row["prompt"], row["chosen"], row["rejected"]) for row in loaded.rows] == [([user("P")], "good", "bad")]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"reason": " It is right. "}, "It is right."),
        ({"reasons": ["helpful", "honest"], "comment": "The second one is made up."},
         "helpful, honest\nThe second one is made up."),
        ({"rationale": "It is right.", "critique": ""}, "It is right."),
        ({"feedback": ["The first one answers it.", "The second one does not."]},
         "The first one answers it.\nThe second one does not."),
        ({"reason": "It is right.", "explanation": "It is right."}, "It is right."),
        ({"reason": None, "comment": 7, "by": "ada"}, ""),
    ],
)  # fmt: skip
def test_why_a_pair_was_preferred_goes_with_it(fields: dict[str, Any], reason: str, tmp_path: Path) -> None:
    for values in ({"prompt": "Q", "chosen": "good", "rejected": "bad"}, {**A_B, "label": "a"}):
        (row,) = pairs(write_jsonl(tmp_path / "a.jsonl", [{**values, **fields}])).rows
        assert row.get("reason", "") == reason


def test_critiques_of_single_responses_and_annotators_go_with_their_pairs(tmp_path: Path) -> None:
    responses = [{"text": "a", "score": 3, "critique": "fine"}, {"text": "b", "score": 2},
                 {"text": "c", "score": 1, "critique": "wrong"}]  # fmt: skip
    loaded = pairs(write_jsonl(tmp_path / "a.jsonl", [{"prompt": "Q", "responses": responses}]))
    assert [row.get("reason", "") for row in loaded.rows] == [
        "chosen: fine",
        "chosen: fine\nrejected: wrong",
        "rejected: wrong",
    ]
    judged = {"context": [user("Q")], "response1": "good", "response2": "bad", "overall_preference": -2}
    judged["individual_preferences"] = [{"score": -2, "reasoning": "One."}, {"score": -1, "reasoning": "Two."}]
    assert pairs(write_jsonl(tmp_path / "b.jsonl", [judged])).rows[0]["reason"] == "One.\nTwo."
    labelled = [kto("P", "good", True, comment="yes"), kto("P", "bad", False, comment="no")]
    assert pairs(write_jsonl(tmp_path / "c.jsonl", labelled)).rows[0]["reason"] == "chosen: yes\nrejected: no"


@pytest.mark.parametrize("spell", [json.dumps, str])
def test_lists_in_cells_are_read_where_a_format_needs_them(tmp_path: Path, spell: Any) -> None:
    turns = [user("a, b"), assistant('it\'s "so"')]
    loaded = conversations(as_csv(tmp_path / "a.csv", [{"messages": turns}], spell=spell))
    assert loaded.rows[0]["messages"] == turns
    instances = [{"instruction": "Add.", "instances": [{"input": "1", "output": "1"}]}]
    assert len(conversations(as_csv(tmp_path / "b.csv", instances, spell=spell)).rows) == 1
    ranked = [{"prompt": "Q", "responses": ["bad", "good"], "scores": [1, 2]}]
    assert pairs(as_csv(tmp_path / "c.csv", ranked, spell=spell)).rows[0]["chosen"] == "good"
    sides = {"prompt": [user("Q")], "chosen": [assistant("good")], "rejected": [assistant("bad")]}
    assert pairs(as_csv(tmp_path / "d.csv", [sides], spell=spell)).rows[0]["prompt"] == [user("Q")]
    voted = [{**A_B, "labels": ["a", "a", "b"]}]
    assert pairs(as_csv(tmp_path / "e.csv", voted, spell=spell)).rows[0]["chosen"] == "good"


def test_lists_of_prompts_and_answers_are_read_together(tmp_path: Path) -> None:
    arena = {"prompt": ["Q"], "response_a": ["good"], "response_b": ["bad"], "winner_model_a": 1, "winner_model_b": 0}
    (row,) = pairs(as_csv(tmp_path / "a.csv", [arena])).rows
    assert (row["prompt"], row["chosen"]) == ([user("Q")], "good")
    listed = {"prompt": "Q", "response_a": '["x"]', "response_b": '["y"]', "label": "a"}
    assert pairs(as_csv(tmp_path / "b.csv", [listed])).rows[0]["chosen"] == '["x"]'


def test_an_answer_that_is_json_stays_a_text(tmp_path: Path) -> None:
    rows = [{"prompt": "As JSON?", "response": '["a", "b"]'}, {"prompt": "[1]", "response": '{"a": 1}'}]
    loaded = conversations(as_csv(tmp_path / "a.csv", rows))
    assert [turn["content"] for row in loaded.rows for turn in row["messages"]] == [
        "As JSON?",
        '["a", "b"]',
        "[1]",
        '{"a": 1}',
    ]


@pytest.mark.parametrize("cell", ["[" * 3000, "[" * 90 + "]" * 90, '[{"role":', "[1, {2, 3}]", "[b'x']", "{'a': 1j}"])
def test_a_cell_that_only_looks_like_a_list_is_counted(tmp_path: Path, cell: str) -> None:
    loaded = conversations(as_csv(tmp_path / "a.csv", [{"messages": cell}, {"messages": [user("a"), assistant("b")]}]))
    assert len(loaded.rows) == 1
    assert sum(loaded.dropped.values()) == 1


MIXED = [
    ({"instruction": "alpaca", "input": "", "output": "x"}, "alpaca"),
    ({"instruction": "dolly", "context": "c", "response": "x"}, "dolly"),
    ({"messages": [user("messages"), assistant("x")]}, "messages"),
    ({"conversations": [{"from": "human", "value": "sharegpt"}, {"from": "gpt", "value": "x"}]}, "sharegpt"),
    ({"inputs": "flan", "targets": "x"}, "flan"),
    ({"prompt": "prompt", "completion": "x"}, "prompt"),
    ({"instruction": "instances", "instances": [{"input": "", "output": "x"}]}, "instances"),
    ({"data": ["turns", "x"]}, "turns"),
]


def test_a_row_of_another_shape_than_the_first_hundred_is_read_as_what_it_is(tmp_path: Path) -> None:
    first = [{"instruction": f"q{number}", "output": "x"} for number in range(150)]
    odd = [{"headline": "no", "body": "shape"}, {"instruction": "q", "answer": "of another name"}]
    rows = [*first, *(row for row, _ in MIXED), *odd, {"instruction": "only"}]
    loaded = conversations(write_jsonl(tmp_path / "a.jsonl", rows))
    assert [row["messages"][0]["content"].partition("\n")[0] for row in loaded.rows[150:]] == [
        name for _, name in MIXED
    ]
    assert loaded.account["formats"] == {name: 1 for _, name in MIXED} | {"alpaca": 152}
    assert loaded.dropped == {"unknown_shape": 2, "empty_response": 1}
    assert loaded.account["in"] == len(rows) == loaded.account["kept"] + sum(loaded.dropped.values())
    assert loaded.step.samples["unknown_shape"] == [
        {"id": "0/a.jsonl:159", "text": "row 159: fields: body, headline"},
        {"id": "0/a.jsonl:160", "text": "row 160: fields: answer, instruction"},
    ]


@pytest.mark.parametrize("write", [write_jsonl, as_csv])
def test_a_table_that_is_mixed_from_its_first_row_loses_nothing(tmp_path: Path, write: Any) -> None:
    rows = [row for row, _ in MIXED] * 40
    loaded = conversations(write(tmp_path / ("a.csv" if write is as_csv else "a.jsonl"), rows))
    assert loaded.dropped == {}
    assert loaded.account["formats"] == {name: 40 for _, name in MIXED}
    assert len(loaded.rows) == len(rows)


def test_rows_of_trees_are_joined_wherever_they_stand(tmp_path: Path) -> None:
    tree = [{"message_id": "a", "parent_id": None, "role": "prompter", "text": "tree"},
            {"message_id": "b", "parent_id": "a", "role": "assistant", "text": "x"}]  # fmt: skip
    first = [{"inputs": f"q{number}", "targets": "x"} for number in range(120)]
    loaded = conversations(write_jsonl(tmp_path / "a.jsonl", [*first, tree[1], first[0], tree[0]]))
    assert loaded.rows[-1]["messages"] == [user("tree"), assistant("x")]
    assert loaded.dropped == {"joined": 1}
    assert loaded.account["formats"] == {"flan": 121, "oasst": 2}


def test_preferences_of_all_shapes_in_one_table(tmp_path: Path) -> None:
    shapes: list[dict[str, Any]] = [
        {"prompt": "pair", "chosen": "good", "rejected": "bad"},
        {"chosen": "Human: transcripts\n\nAssistant: good", "rejected": "Human: transcripts\n\nAssistant: bad"},
        {"chosen": [user("dialogues"), assistant("good")], "rejected": [user("dialogues"), assistant("bad")]},
        {"prompt": "ranked", "responses": ["good", "bad"], "scores": [2, 1]},
        {"prompt": "pairwise", "response_a": "good", "response_b": "bad", "label": "a"},
        {"prompt": "labelled", "completion": "good", "label": True},
        {"prompt": "labelled", "completion": "bad", "label": False},
    ]
    for name, rows in (("mixed.jsonl", shapes * 30), ("late.jsonl", [shapes[0]] * 120 + shapes)):
        loaded = pairs(write_jsonl(tmp_path / name, rows))
        assert loaded.account["in"] == len(rows) == len(loaded.rows) + loaded.dropped["joined"]
        assert loaded.dropped.keys() == {"joined"}
        assert {(row["chosen"], row["rejected"]) for row in loaded.rows} == {("good", "bad")}
        detected = {shape.value for shape in PreferenceFormat if shape is not PreferenceFormat.UNPAIRED}
        assert loaded.account["formats"].keys() == detected


def test_rows_of_no_shape_count_as_bad_ones(tmp_path: Path) -> None:
    rows = [{"inputs": f"q{number}", "targets": "x"} for number in range(90)]
    source = write_jsonl(tmp_path / "a.jsonl", [*rows, *({"headline": "x"} for _ in range(10))])
    strict = CurateConfig(heldout_fraction=0.0, max_bad_fraction=0.05)
    with pytest.raises(DataError, match=r"10 of 100 records .*unknown_shape.*a.jsonl:91 \(fields: headline\)"):
        conversations(source, config=strict)
    assert conversations(source, config=strict.model_copy(update={"max_bad_fraction": 0.1})).dropped == {
        "unknown_shape": 10
    }


def test_a_file_of_no_shape_does_not_hide_the_others_and_a_source_of_none_is_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"headline": "x"}])
    write_jsonl(tmp_path / "b.jsonl", [{"inputs": "q", "targets": "x"}])
    loaded = conversations(str(tmp_path))
    assert (len(loaded.rows), loaded.dropped) == (1, {"unknown_shape": 1})
    write_jsonl(tmp_path / "b.jsonl", [{"topic": "x"}])
    with pytest.raises(DataError, match=r"the fields of a.jsonl fit none of the formats .*; found: headline"):
        conversations(str(tmp_path))


def test_a_row_between_two_formats_of_its_table_is_ambiguous_and_a_stated_format_decides(tmp_path: Path) -> None:
    both = {"instruction": "q", "output": "b", "response": "c"}
    rows = [{"instruction": "q", "output": "x"}, {"instruction": "q", "response": "x"}, both]
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    loaded = conversations(source)
    assert loaded.dropped == {"ambiguous_shape": 1}
    assert "fits alpaca and instruction" in loaded.step.samples["ambiguous_shape"][0]["text"]
    stated = conversations(f"{source}#format=alpaca")
    assert [row["messages"][1]["content"] for row in stated.rows] == ["x", "x", "b"]
    assert stated.account["formats"] == {"alpaca": 2, "instruction": 1}
    settled = conversations(write_jsonl(tmp_path / "b.jsonl", [rows[0], both]))
    assert [row["messages"][1]["content"] for row in settled.rows] == ["x", "b"], "the table's own format decides"


def test_rows_of_the_hub_have_the_same_shapes(tmp_path: Path) -> None:
    """A local folder is a data set to the library, which gives every row a column for every field."""
    rows = [{**A_B, "label": "a", "reason": "right"}, {"prompt": "R", "chosen": "good", "rejected": "bad"}]
    write_jsonl(tmp_path / "train.jsonl", rows)
    loaded = pairs(f"hf://{tmp_path}")
    assert [row["chosen"] for row in loaded.rows] == ["good", "good"]
    assert loaded.rows[0]["reason"] == "right"
    assert loaded.account["formats"] == {"pair": 1, "pairwise": 1}


def test_half_a_character_costs_a_row_its_place_and_a_reason_nothing_else(tmp_path: Path) -> None:
    pair = {"prompt": "Q", "chosen": "good", "rejected": "bad"}
    rows = [{**pair, "reason": "so \ud800"}, {**pair, "prompt": "R \ud800"}, {**pair, "rejected": "\udc00"}]
    loaded = pairs(write_jsonl(tmp_path / "a.jsonl", rows))
    assert [row["reason"] for row in loaded.rows] == ["so ?"]
    assert loaded.dropped == {"invalid_utf8": 2}
    turns = [{"messages": [user("a"), assistant("\ud800")]}, {"messages": [user("a"), assistant("b")]}]
    assert conversations(write_jsonl(tmp_path / "b.jsonl", turns)).dropped == {"invalid_utf8": 1}


HUGE = 10**400


@pytest.mark.parametrize(
    "values",
    [
        {**A_B, "label": HUGE},
        {**A_B, "label": "1e999"},
        {**A_B, "score_a": HUGE, "score_b": -HUGE},
        {**A_B, "labels": {"a": {"b": {}}, "c": [[]]}},
        {**A_B, "winner_model_a": HUGE, "winner_model_b": [], "winner": {}},
        {"instruction": "Q", "completions": [{"response": "a", "annotations": {"x": {"Rating": HUGE}}},
                                             {"response": "b", "annotations": [1]}]},
        {"prompt": "Q", "completion": "x", "label": HUGE},
        {"prompt": {"full_text": ["x"]}, "completion": "x", "label": 1},
        {"prompt": ["Q", 1], "response_a": ["x"], "response_b": 7, "label": "a"},
        {"prompt": [], "responses": [[], {}], "scores": [{}, []]},
    ],
)  # fmt: skip
def test_odd_values_are_counted_and_never_end_the_stage(values: dict[str, Any], tmp_path: Path) -> None:
    loaded = pairs(
        write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}, values]) + "#format=pair"
    )
    assert loaded.account["in"] == 2 == loaded.account["kept"] + sum(loaded.dropped.values())


def test_odd_conversations_are_counted_and_never_end_the_stage(tmp_path: Path) -> None:
    odd: list[dict[str, Any]] = [
        {"instruction": "q", "instances": {"output": "x"}},
        {"instruction": ["q", 1], "instances": [{"output": "x"}]},
        {"instruction": "q", "instances": [{"output": [1]}, {"output": {}}]},
        {"data": ["a", 1]},
        {"turns": [{"input": 1, "output": []}]},
        {"conversation": [["a", "b"]]},
        {"input": {"a": 1}, "output": "x"},
        {"query": "a", "solution": ["x"]},
    ]
    loaded = conversations(write_jsonl(tmp_path / "a.jsonl", [{"inputs": "q", "targets": "x"}, *odd]))
    assert loaded.account["in"] == len(odd) + 2 == loaded.account["kept"] + sum(loaded.dropped.values())
