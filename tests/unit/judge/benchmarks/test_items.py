"""Rows of every format as items, and rows that are none."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stages.artifacts.addresses import open_store
from stages.config.benchmarks import parse_benchmark
from stages.config.errors import ConfigError, DataError
from stages.data.sources.benchmarks import benchmark_rows, snapshot_benchmark
from stages.data.sources.records import Row
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
        ({**CHOICE, "gold": "AB"}, "gold_is_no_choice"),
        ({**CHOICE, "gold": "inf"}, "gold_is_no_choice"),
        ({**CHOICE, "gold": "1e999"}, "gold_is_no_choice"),
        ({**CHOICE, "gold": float("inf")}, "gold_is_no_choice"),
        ({**CHOICE, "gold": {"place": 1}}, "gold_is_no_choice"),
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


ODD: tuple[Any, ...] = (
    *(None, "", " ", "AB", "ABCD", "inf", "-inf", "nan", "1e999", "[", "[[]]", "[1e999]", '{"a": 1}', "half \ud800"),
    *(True, -1, 0.5, 10**400, 1e308, float("inf"), float("nan"), [], [None], [[]], ["a", 1], [float("inf")], {}),
    *({"text": "x"}, {"text": ["x"], "label": ["A", "B"]}, {"text": [None, 1], "label": [1, 2]}, {"aliases": {}}),
)
SOUND: dict[str, dict[str, Any]] = {
    "choices": {**CHOICE, "choices": ["1", "2", "3", "4"], "id": "x", "cluster": "c"},
    "truthfulqa": {"Question": "q", "Best Answer": "a", "Incorrect Answers": "b; c", "id": "x", "cluster": "c"},
    "continuation": {"context": "a", "continuation": " b", "id": "x", "cluster": "c"},
    "answers": {"question": "q", "answer": "a", "id": "x", "cluster": "c"},
    "refusals": {"prompt": "p", "harmful": True, "id": "x", "cluster": "c"},
}


@pytest.mark.parametrize("form", SOUND)
def test_whatever_a_field_holds_a_row_is_an_item_or_counted(form: str) -> None:
    sound = SOUND[form]
    rows = [{**sound, "id": f"sound {number}"} for number in range(4000)]  # so many that the odd ones are few enough
    without = [{name: value for name, value in sound.items() if name != gone} for gone in sound]
    odd = [{**sound, "id": f"{field} {place}", field: value} for field in sound for place, value in enumerate(ODD)]
    odd += [*without, {}]
    assert len(odd) < 200
    made = [(str(number), Row(number, values, 0)) for number, values in enumerate([*rows, *odd])]
    found = read_items(parse_benchmark(f"/x#format={form}"), (("", row) for _, row in made))
    assert len(found.items) + sum(found.bad.values()) == len(rows) + len(odd)
    assert len({item.id for item in found.items}) == len(found.items)


def test_a_named_format_whose_fields_are_missing_names_rows_and_fields(tmp_path: Path) -> None:
    path = written(tmp_path / "b.jsonl", [{"prompt": "p"}])
    with pytest.raises(DataError, match=r"1 of 1 rows are no items \(row 1: missing_harmful\)") as error:
        read(path, "#format=refusals")
    assert "harmful (true or false)" in error.value.advice


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


def test_items_of_the_hub_are_identified_by_the_commit_that_they_are_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits = {"org/set": "a" * 40, "org/other": "b" * 40}
    asked = []

    def info(self: object, name: str, *, revision: str | None = None) -> SimpleNamespace:
        asked.append((name, revision))
        return SimpleNamespace(sha=commits[name])

    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: False)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", info)
    monkeypatch.setattr("stages.data.sources.benchmarks.harness_version", lambda: "0.4.13")
    (tmp_path / "t.yaml").write_text("task: t\ndataset_path: org/other\n")
    pinned = f"hf://org/set?revision={'c' * 40}"
    addresses = ["hf://org/set?split=test", pinned, str(tmp_path / "t.yaml")]
    before = [snapshot_benchmark(address) for address in addresses]
    assert asked == [("org/set", None), ("org/other", None)]
    commits |= {"org/set": "d" * 40, "org/other": "e" * 40}
    after = [snapshot_benchmark(address) for address in addresses]
    assert [one != other for one, other in zip(before, after, strict=True)] == [True, False, True]


def test_a_benchmark_in_a_bucket_is_read_and_identified_by_its_content(tmp_path: Path, s3_store: str) -> None:
    store = open_store(s3_store)
    address = f"{s3_store}/benchmarks/b.jsonl.gz"
    for gold in (1, 0):
        local = written(tmp_path / "b.jsonl", [{**CHOICE, "gold": gold}])
        store.write_bytes("benchmarks/b.jsonl.gz", gzip.compress(local.read_bytes(), mtime=0))
        benchmark = parse_benchmark(f"{address}#name=mine")
        found = read_items(benchmark, benchmark_rows(benchmark.uri))
        assert found.items == read(local).items
        if gold:
            before = snapshot_benchmark(address)
    assert snapshot_benchmark(address) != before
    with pytest.raises(ConfigError, match="holds no object"):
        snapshot_benchmark(f"{s3_store}/benchmarks/none.jsonl")
