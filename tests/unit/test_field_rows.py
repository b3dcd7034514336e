"""Rows, documents and tokenizers from the field, where they lie next to the checkout: each with its right value."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages.config.curate import CurateConfig
from stages.config.sources import parse_source
from stages.data.curation.ledger import Step
from stages.data.pairs.given import given_instructions, given_preferences
from stages.data.sources.readers import plan, read
from stages.data.sources.records import SourceDocument
from stages.data.tokens.tokenizer import LoadedTokenizer
from stages.models.given_tokenizer import given_tokenizer
from tests.places import SHARED

CASES = SHARED / "cases" / "world"
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason=f"there are no cases in {CASES}")

CONFIG = CurateConfig(heldout_fraction=0.0, max_bad_fraction=1.0)


def given(adapt: Any, name: str) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Rows of a case, and how many were dropped by reason."""
    steps: list[Step] = []
    rows = adapt([parse_source(str(CASES / name))], CONFIG, steps, {})
    steps[0].verify()
    return rows, {reason: amount.documents for reason, amount in steps[0].dropped.items()}


def test_weights_on_questions_do_not_matter() -> None:
    rows, dropped = given(given_instructions, "07_weight_on_questions.jsonl")
    assert len(rows) == 10
    assert dropped == {}


@pytest.mark.parametrize("name", ["08_preamble.jsonl", "08_preamble_prompt.jsonl"])
def test_a_preamble_becomes_the_system_message(name: str) -> None:
    ((row,), dropped) = given(given_preferences, name)
    assert row["prompt"] == [
        {"role": "system", "content": "You are a polite librarian."},
        {"role": "user", "content": "Where is shelf 3?"},
    ]
    assert dropped == {}


def test_a_struct_of_messages_and_odd_contents_are_kept_or_counted() -> None:
    rows, dropped = given(given_instructions, "p2_struct.parquet")
    assert (len(rows), dropped) == (5, {"tool_call": 1})
    rows, dropped = given(given_instructions, "p3_odd_contents.jsonl")
    assert (len(rows), sum(dropped.values())) == (2, 8)


def test_an_answer_that_begins_like_the_other_is_a_pair() -> None:
    rows, dropped = given(given_preferences, "p4_prefix_pair.jsonl")
    assert (len(rows), dropped) == (1, {"prompts_differ": 1})


@pytest.mark.parametrize(("name", "documents"), [("p1_separators.jsonl", 3), ("p5_three_frames.jsonl.zst", 30)])
def test_separators_in_lines_and_frames_of_a_stream_lose_no_document(name: str, documents: int) -> None:
    config = CurateConfig(documents=(str(CASES / name),), planted=0)
    records = [record for unit in plan(config) for record in read(unit, config)]
    assert [type(record) for record in records] == [SourceDocument] * documents


def tokenizer(name: str, tmp_path: Path) -> LoadedTokenizer:
    """The case as a model's folder: it has no weights, and none are read for its tokenizer."""
    folder = tmp_path / name
    folder.mkdir()
    for path in (CASES / name).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "model.safetensors").touch()
    return given_tokenizer(folder, chat_template="infer")


SENTENCE = "The quick brown fox jumps over the lazy dog. "


def test_truncation_inside_tokenizer_json_changes_no_id(tmp_path: Path) -> None:
    plain, limited = (tokenizer(f"09_tokenizer_{kind}", tmp_path) for kind in ("plain", "truncation"))
    turns = [{"role": "user", "content": SENTENCE * 10}, {"role": "assistant", "content": SENTENCE * 30}]
    (expected,), (ids,) = (made.encode_texts([SENTENCE * 40]) for made in (plain, limited))
    assert len(ids) > 256
    assert np.array_equal(ids, expected)
    whole, chat = (made.chat().encode(turns) for made in (plain, limited))
    assert np.array_equal(chat.ids, whole.ids)
    assert np.array_equal(chat.loss_mask, whole.loss_mask)


def test_an_id_above_16_bits_is_stored_whole(tmp_path: Path) -> None:
    assert tokenizer("10_tokenizer_hole", tmp_path).vocab_size == 70_001


def test_unmarked_control_tokens_are_text_in_documents(tmp_path: Path) -> None:
    made = tokenizer("11_tokenizer_unmarked_control_tokens", tmp_path)
    controls = sorted(made.backend.get_added_tokens_decoder())
    names = [made.backend.id_to_token(number) for number in controls]
    (ids,) = made.encode_texts([" ".join(str(name) for name in names)])
    assert not set(controls) & set(ids[:-1].tolist())
