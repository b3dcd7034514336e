"""What is asked, and how answers of many forms are read."""

import pytest

from stages.data.synthesis.asking import (
    Task,
    ask_about,
    ask_for_input,
    ask_for_tasks,
    read_input,
    read_question,
    read_tasks,
)


def test_new_tasks_are_asked_for_after_numbered_examples() -> None:
    (turn,) = ask_for_tasks(["Name three\n colours.", "Sort a list."], 3)
    assert "1. Name three colours.\n2. Sort a list.\n" in turn["content"]
    assert "tasks 3 to 5" in turn["content"]


@pytest.mark.parametrize(
    ("answer", "is_cut", "tasks", "cut"),
    [
        ("9. Write a poem.\n10. Sort names.", False, ["Write a poem.", "Sort names."], 0),
        (
            "Sure! Here you go:\n\n9) Write a poem\n   about rain.\n\n10) Sort.",
            False,
            ["Write a poem about rain.", "Sort."],
            0,
        ),
        ('**Task 9:** Write a poem.\nTask 10: "Sort."', False, ["Write a poem.", "Sort."], 0),
        ("9. Task: Write a poem.", False, ["Write a poem."], 0),
        ("9. Write a poem.\n10. Sort na", True, ["Write a poem."], 1),
        ("9. Write a po", True, [], 1),
        ("I cannot do that.", False, [], 0),
        ("9.\n10. Sort.", False, ["Sort."], 0),
        ("", False, [], 0),
    ],
)
def test_tasks_are_read_from_numbered_lines(answer: str, is_cut: bool, tasks: list[str], cut: int) -> None:
    assert read_tasks(answer, is_cut=is_cut) == (tasks, cut)


def test_an_input_is_asked_for_after_examples_with_and_without() -> None:
    turns = ask_for_input("Translate it.", [Task("a", "Sum up.", "A long text."), Task("b", "Tell a joke.")])
    assert [turn["role"] for turn in turns] == ["user", "assistant", "user", "assistant", "user"]
    assert [turns[1]["content"], turns[3]["content"]] == ["A long text.", "none"]
    assert turns[4]["content"].startswith("Task: Translate it.")


@pytest.mark.parametrize(
    ("answer", "given"),
    [
        ("none", ""),
        (" None. ", ""),
        ("No input needed", ""),
        ("N/A", ""),
        ("Input: The cat sat.", "The cat sat."),
        ("**Example input:** 3, 5", "3, 5"),
        ("None of the cats sat.", "None of the cats sat."),
        ("", ""),
    ],
)
def test_an_input_is_read_without_its_label(answer: str, given: str) -> None:
    assert read_input(answer) == given


def test_questions_about_a_text_name_the_earlier_ones() -> None:
    (turn,) = ask_about("The sea is deep.", ["How deep is it?"])
    assert "The sea is deep." in turn["content"]
    assert "- How deep is it?" in turn["content"]
    assert "something else" not in ask_about("The sea is deep.")[0]["content"]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Question: How deep?\nAnswer: Very deep.", ("How deep?", "Very deep.")),
        ("Here:\n**Question:** How\ndeep?\n\n**Answer:** Very.\nIndeed.", ("How deep?", "Very.\nIndeed.")),
        ("Question: A?\nAnswer: B.\n\nQuestion: C?\nAnswer: D.", ("A?", "B.")),
        ("Question: How deep?", None),
        ("Answer: Very.", None),
        ("", None),
    ],
)
def test_question_and_answer_are_read(answer: str, expected: tuple[str, str] | None) -> None:
    found = read_question(answer)
    assert (None if found is None else (found.instruction, found.response)) == expected
