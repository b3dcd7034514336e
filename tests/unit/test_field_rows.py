"""Rows and documents as they come from the field: each is kept with its right value, or dropped and counted."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from stages.config.curate import CurateConfig
from stages.config.sources import parse_source
from stages.data.curation.ledger import Step
from stages.data.pairs.given import given_instructions, given_preferences
from stages.data.sources.readers import plan, read
from stages.data.sources.records import SourceDocument

CONFIG = CurateConfig(heldout_fraction=0.0, max_bad_fraction=1.0)


def turns(*pairs: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in pairs]


def dialogue(question: Any, answer: Any) -> dict[str, Any]:
    return {"messages": turns(("user", question), ("assistant", answer))}


def given(adapt: Any, path: Path, rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """What becomes of rows, and how many were dropped by reason."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    steps: list[Step] = []
    kept = adapt([parse_source(str(path))], CONFIG, steps, {})
    steps[0].verify()
    return kept, {reason: amount.documents for reason, amount in steps[0].dropped.items()}


def test_weights_on_questions_do_not_matter(tmp_path: Path) -> None:
    values = [("system", "Be brief.", 0), ("human", "What is 0+1?", 0), ("gpt", "1", 1)]
    row = {"conversations": [{"from": who, "value": text, "weight": weight} for who, text, weight in values]}
    kept, dropped = given(given_instructions, tmp_path / "rows.jsonl", [row])
    assert [turn["content"] for turn in kept[0]["messages"]] == ["Be brief.", "What is 0+1?", "1"]
    assert dropped == {}


PREAMBLE = "You are a polite librarian.\n\nHuman: Where is shelf 3?\n\nAssistant:"


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": f"{PREAMBLE} Left of the door.", "rejected": f"{PREAMBLE} No idea."},
        {"prompt": PREAMBLE, "chosen": " Left of the door.", "rejected": " No idea."},
    ],
)
def test_a_preamble_becomes_the_system_message(row: dict[str, Any], tmp_path: Path) -> None:
    ((kept,), dropped) = given(given_preferences, tmp_path / "pairs.jsonl", [row])
    assert kept["prompt"] == turns(("system", "You are a polite librarian."), ("user", "Where is shelf 3?"))
    assert dropped == {}


def test_the_structs_of_a_table_are_read_without_the_fields_that_only_other_rows_have(tmp_path: Path) -> None:
    call = {"id": "1", "function": {"name": "f", "arguments": "{}"}}
    called = [
        {"role": "user", "content": "call it"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "4", "name": "f"},
        {"role": "assistant", "content": "4"},
    ]
    empty_system = {"messages": turns(("system", ""), ("user", "Q"), ("assistant", "A"))}
    kept, dropped = given(given_instructions, tmp_path / "rows.parquet", [{"messages": called}, empty_system])
    assert kept[1]["messages"] == turns(("user", "Q"), ("assistant", "A"))
    made = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {}}}
    assert kept[0]["messages"] == [
        {"role": "user", "content": "call it"},
        {"role": "assistant", "content": "", "tool_calls": [made]},
        {"role": "tool", "content": "4", "name": "f"},
        {"role": "assistant", "content": "4"},
    ]
    assert dropped == {}


def test_contents_that_are_no_text_are_dropped_and_counted(tmp_path: Path) -> None:
    odd = [
        dialogue("How many?", 42),
        dialogue("x", None),
        dialogue(["a", "b"], "c"),
        dialogue("x", {"text": "b"}),
        dialogue("x", True),
        {"messages": [turns(("user", "x"), ("assistant", "y"))]},
        {"messages": None},
        {"messages": []},
    ]
    parts = dialogue([{"type": "text", "text": "a"}], [{"type": "text", "text": "b"}])
    kept, dropped = given(given_instructions, tmp_path / "rows.jsonl", [*odd, parts, dialogue("ok", "fine")])
    assert [row["messages"][1]["content"] for row in kept] == ["b", "fine"]
    assert sum(dropped.values()) == len(odd)


def test_an_answer_that_begins_like_the_other_is_a_pair(tmp_path: Path) -> None:
    def answered(answer: str) -> list[dict[str, Any]]:
        return turns(("user", "Describe the sky"), ("assistant", answer))

    longer = {"chosen": answered("The sky is blue"), "rejected": answered("The sky is blue and vast")}
    early = turns(("user", "a"), ("assistant", "b"))
    kept, dropped = given(
        given_preferences,
        tmp_path / "pairs.jsonl",
        [longer, {"chosen": early + turns(("user", "c"), ("assistant", "d")), "rejected": early}],
    )
    assert (len(kept), dropped) == (1, {"prompts_differ": 1})


def documents(path: Path) -> list[str]:
    config = CurateConfig(documents=(str(path),), planted=0)
    records = [record for unit in plan(config) for record in read(unit, config)]
    assert [type(record) for record in records] == [SourceDocument] * len(records)
    return [record.text for record in records if isinstance(record, SourceDocument)]


def test_separators_inside_a_line_end_no_document(tmp_path: Path) -> None:
    separated = "one\u2028two\u2029three\u0085four\u000bfive\u001csix"
    line = json.dumps({"text": separated}, ensure_ascii=False)
    (tmp_path / "documents.jsonl").write_bytes(f'{line}\r\n{line}\r\n{{"text":"last"}}\n'.encode())
    assert documents(tmp_path / "documents.jsonl") == [separated, separated, "last"]


def test_every_frame_of_a_stream_is_read(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"document {number}"}).encode() + b"\n" for number in range(30)]
    frames = [zstandard.compress(b"".join(lines[start : start + 10])) for start in (0, 10, 20)]
    (tmp_path / "documents.jsonl.zst").write_bytes(b"".join(frames))
    assert documents(tmp_path / "documents.jsonl.zst") == [f"document {number}" for number in range(30)]
