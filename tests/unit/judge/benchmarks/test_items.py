"""Rows of every format as items, and rows that are none."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from stages.config.benchmarks import parse_benchmark
from stages.config.errors import ConfigError, DataError
from stages.data.sources.benchmarks import benchmark_rows, snapshot_benchmark
from stages.judge.benchmarks.items import (
    AnswerItem,
    ChoiceItem,
    ContinuationItem,
    Items,
    Option,
    PromptItem,
    evenly_spaced,
    read_items,
)

CHOICE = {"query": "2 + 2 =", "choices": ["3", "4"], "gold": 1}


def written(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path, options: str = "") -> Items:
    benchmark = parse_benchmark(f"{path}{options}")
    return read_items(benchmark, benchmark_rows(benchmark.uri))


def many(row: dict[str, Any], *bad: dict[str, Any], count: int = 60) -> list[dict[str, Any]]:
    return [*({**row, "id": f"item {number}"} for number in range(count)), *bad]


@pytest.mark.parametrize(
    ("row", "item"),
    [
        (CHOICE, ChoiceItem("1", (Option("2 + 2 =", "3"), Option("2 + 2 =", "4")), (1,))),
        ({**CHOICE, "gold": "4"}, ChoiceItem("1", (Option("2 + 2 =", "3"), Option("2 + 2 =", "4")), (1,))),
        (
            {"question": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B", "id": "arc-7"},
            ChoiceItem("arc-7", (Option("q", "x"), Option("q", "y")), (1,)),
        ),
        (
            {"ctx": "c", "endings": ["x", "y", "z"], "label": "2", "cluster": "p"},
            ChoiceItem("1", (Option("c", "x"), Option("c", "y"), Option("c", "z")), (2,), "p"),
        ),
        ({"context": "Once", "continuation": " upon"}, ContinuationItem("1", "Once", " upon")),
        ({"question": "6 x 7?", "answer": 42}, AnswerItem("1", "6 x 7?", ("42",))),
        ({"question": "q", "answers": ["a", "b "]}, AnswerItem("1", "q", ("a", "b"))),
        ({"prompt": "p", "harmful": True}, PromptItem("1", "p", True)),
    ],
)
def test_the_fields_of_a_row_say_what_it_is(tmp_path: Path, row: dict[str, Any], item: object) -> None:
    assert read(written(tmp_path / "b.jsonl", [row])).items == (item,)


def test_truthfulqa_is_its_best_answer_among_the_incorrect_ones(tmp_path: Path) -> None:
    head = "Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source\n"
    line = 'Adversarial,Myths,"Is it, then?",No,No; Not at all,Yes; Maybe so; Yes,http://x\n'
    (tmp_path / "t.csv").write_text(head + line)
    (item,) = read(tmp_path / "t.csv").items
    options = tuple(Option("Q: Is it, then?\nA:", text) for text in ("No", "Yes", "Maybe so"))
    assert item == ChoiceItem("2", options, (0,))


def test_a_table_spells_lists_as_json(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text('query,choices,gold\nq,"[""x"", ""y""]",B\n')
    (item,) = read(tmp_path / "c.csv").items
    assert isinstance(item, ChoiceItem)
    assert [option.text for option in item.options] == ["x", "y"]
    assert item.gold == (1,)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**CHOICE, "gold": None}, "missing_gold"),
        ({**CHOICE, "gold": ""}, "missing_gold"),
        ({**CHOICE, "gold": []}, "missing_gold"),
        ({**CHOICE, "gold": 2}, "gold_out_of_range"),
        ({**CHOICE, "gold": -1}, "gold_out_of_range"),
        ({**CHOICE, "gold": 0.5}, "gold_is_no_choice"),
        ({**CHOICE, "gold": "neither"}, "gold_is_no_choice"),
        ({**CHOICE, "choices": ["4"]}, "one_choice"),
        ({**CHOICE, "choices": []}, "missing_choices"),
        ({**CHOICE, "choices": [["4"], ["3"]]}, "missing_choices"),
        ({**CHOICE, "choices": ["4", "4"]}, "repeated_choice"),
        ({**CHOICE, "choices": ["4", " "]}, "empty_choice"),
        ({**CHOICE, "query": ""}, "missing_query"),
        ({**CHOICE, "query": "half \ud800"}, "invalid_utf8"),
        ({**CHOICE, "id": "item 7"}, "duplicate_id"),
    ],
)
def test_a_row_that_is_no_item_is_counted_with_its_reason(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    found = read(written(tmp_path / "b.jsonl", many(CHOICE, row)))
    assert found.bad == {reason: 1}
    assert len(found.items) == 60


def test_too_many_such_rows_are_an_error_that_names_them(tmp_path: Path) -> None:
    path = written(tmp_path / "b.jsonl", [CHOICE, {**CHOICE, "gold": 5}, CHOICE])
    with pytest.raises(DataError, match=r"1 of 3 rows are no items \(row 2: gold_out_of_range\)"):
        read(path)


def test_rows_without_an_id_have_that_of_their_line(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    written(tmp_path / "set" / "a.jsonl", [CHOICE])
    written(tmp_path / "set" / "b.jsonl", [CHOICE, {**CHOICE, "gold": 0}])
    assert [item.id for item in read(tmp_path / "set").items] == ["a.jsonl:1", "b.jsonl:1", "b.jsonl:2"]


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "holds no row"),
        (b'{"text": "x"}\n', "has the fields ['text'], which are those of no format"),
        (json.dumps(CHOICE).encode("utf-16"), "invalid_utf8"),
        ('{"query": "é", "choices": ["a", "b"], "gold": 0}\n'.encode("latin-1"), "invalid_utf8"),
        (gzip.compress(b"x" * 10_000, mtime=0)[:-9], "holds no row"),
    ],
)
def test_a_file_that_is_no_benchmark_is_an_error(tmp_path: Path, data: bytes, told: str) -> None:
    name = "b.jsonl.gz" if data[:2] == b"\x1f\x8b" else "b.jsonl"
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError) as error:
        read(tmp_path / name)
    assert told in error.value.message or "is damaged" in error.value.message


def test_a_named_format_decides_where_fields_fit_several(tmp_path: Path) -> None:
    path = written(tmp_path / "b.jsonl", [{"question": "q", "choices": ["x", "y"], "answer": "x"}])
    assert isinstance(read(path).items[0], ChoiceItem)
    assert read(path, "#format=answers").items == (AnswerItem("1", "q", ("x",)),)


def test_a_limit_takes_items_from_everywhere() -> None:
    assert evenly_spaced(list(range(10)), 4) == [0, 3, 6, 9]
    assert evenly_spaced(list(range(3)), 0) == [0, 1, 2]


def test_the_digest_is_that_of_the_content(tmp_path: Path) -> None:
    path = written(tmp_path / "b.jsonl", [CHOICE])
    before = snapshot_benchmark(str(path))
    assert snapshot_benchmark(str(path)) == before
    written(path, [{**CHOICE, "gold": 0}])
    assert snapshot_benchmark(str(path)) != before
    with pytest.raises(ConfigError, match=r"benchmarks .*does not exist"):
        snapshot_benchmark(str(tmp_path / "none.jsonl"))
