"""Seed tasks, prompts and passages from rows of several forms; what cannot be used is counted."""

import json
from pathlib import Path
from typing import Any

import pytest

from stages.config.errors import DataError
from stages.config.synthesis import Synthesis, SynthesizeConfig
from stages.data.synthesis.account import Step
from stages.data.synthesis.sources import Prompt, passage_of, read_passages, read_prompts, read_seed_tasks


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def config(*sources: str, **settings: Any) -> SynthesizeConfig:
    return SynthesizeConfig(**{"sources": sources, **settings})


def test_seed_tasks_of_every_form_are_tasks_with_their_parts(tmp_path: Path) -> None:
    path = write(
        tmp_path / "seeds.jsonl",
        [
            {"instruction": "Sum up.", "input": "A text.", "output": "Short."},
            {"id": "seed_1", "instruction": "Sort.", "instances": [{"input": "b a", "output": "a b"}, {"input": "z"}]},
            {"messages": [{"role": "user", "content": "Joke?"}, {"role": "assistant", "content": "No."}]},
            {"prompt": "Why?", "response": "So."},
            {"instruction": "  "},
            {"instruction": "Sum up.", "input": "A text.", "output": "Other."},
            {"instruction": "\ud800 x"},
            "not json",
            {"weather": "fine"},
        ],
    )
    step = Step()
    tasks = read_seed_tasks(config(path), step)
    assert [(task.id, task.instruction, task.input, task.response) for task in tasks] == [
        ("seeds.jsonl:1", "Sum up.", "A text.", "Short."),
        ("seeds.jsonl:2", "Sort.", "b a", "a b"),
        ("seeds.jsonl:3", "Joke?", "", "No."),
        ("seeds.jsonl:4", "Why?", "", "So."),
    ]
    assert step.to_dict() == {
        "in": 9,
        "kept": 4,
        "dropped": {"duplicate": 1, "invalid_json": 1, "invalid_utf8": 1, "no_instruction": 1, "no_prompt": 1},
    }
    assert tasks[0].prompt == "Sum up.\n\nA text."


def test_prompts_are_the_turns_before_the_last_answer_and_bare_ones(tmp_path: Path) -> None:
    talk = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Bye?"},
    ]
    path = write(
        tmp_path / "prompts.jsonl",
        [
            {"messages": [*talk, {"role": "assistant", "content": "Bye."}]},
            {"messages": talk},
            {"prompt": "Why?", "response": "So."},
            {"prompt": "What?"},
            {"instruction": "Sort", "input": "b a"},
            {"question": "Who?"},
            {"prompt": ""},
        ],
    )
    step = Step()
    found = read_prompts(config(path), step)
    contents = sorted([turn["content"] for turn in prompt.messages] for prompt in found)
    assert contents == [["Be kind.", "Hi", "Hello.", "Bye?"], ["Sort\n\nb a"], ["What?"], ["Who?"], ["Why?"]]
    assert step.to_dict()["dropped"] == {"duplicate": 1, "no_prompt": 1}


def test_prompts_are_drawn_by_content_and_seed_whatever_the_order_of_rows(tmp_path: Path) -> None:
    rows = [{"prompt": f"Question {number}?"} for number in range(20)]

    def drawn(rows: list[Any], seed: int) -> list[str]:
        step = Step()
        found: list[Prompt] = read_prompts(config(write(tmp_path / "p.jsonl", rows), num_rows=5, seed=seed), step)
        assert step.to_dict() == {"in": 20, "kept": 5, "dropped": {"over_num_rows": 15}}
        return [prompt.messages[0]["content"] for prompt in found]

    assert drawn(rows, 0) == drawn(rows[::-1], 0) != drawn(rows, 1)


def test_a_passage_is_whole_paragraphs_up_to_its_longest(tmp_path: Path) -> None:
    text = "one two three\n\n" + "word " * 30 + "\n\nfour five\n\nsix"
    settings = config(max_text_words=20, method=Synthesis.GROUNDED)
    found = {passage_of(text, f"doc {number}", settings) for number in range(30)}
    assert found == {"one two three", "four five\n\nsix", "six"}
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text("word " * 30)
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe")
    write(tmp_path / "d.jsonl", [{"body": "A sentence."}, {"body": "A sentence."}, {"text": "no"}, {"body": " "}])
    step = Step()
    passages = read_passages(settings.model_copy(update={"sources": (str(tmp_path),), "text_field": "body"}), step)
    assert {passage.id for passage in passages} == {"a.txt", "d.jsonl:1"}
    assert step.to_dict()["dropped"] == {
        "duplicate": 1,
        "empty_text": 1,
        "invalid_utf8": 1,
        "missing_text": 1,
        "no_paragraph_short_enough": 1,
    }


def test_sources_that_hold_nothing_are_told(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", [{"weather": "fine"}])
    with pytest.raises(DataError, match=r"hold no seed task; dropped: \{'no_prompt': 1\}"):
        read_seed_tasks(config(path), Step())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"scorer": {"kind": "exact"}}, "compares with the reference of a row"),
        ({"scorer": {"kind": "regex", "pattern": "("}}, "is no regular expression"),
        ({"min_score": 1.0}, "min_score=1 has no effect"),
        ({"num_responses": 4, "response_temperature": 0}, "asks for one response many times"),
        (
            {"method": "grounded", "num_responses": 4},
            "has no effect with method='grounded', only with self_instruct and",
        ),
        ({"method": "distillation", "max_rounds": 4}, "has no effect with method='distillation', only with self_instr"),
        ({"method": "self_instruct", "with_text": False}, "only with grounded"),
        ({"min_instruction_words": 9, "max_instruction_words": 8}, "is more than"),
        ({"sources": ["a.jsonl#weight=0.3"]}, "has a weight"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SynthesizeConfig(**settings)
