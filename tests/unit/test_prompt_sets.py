"""Prompt sets from their files to the prompts of a training: each loss has a reason, references stay with prompts."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from stages import tokenize
from stages.config.curate import CurateConfig
from stages.config.errors import DataError
from stages.config.gate_records import Outcome
from stages.config.graph import Stage
from stages.config.tokens import TokenizeConfig
from stages.data.tokens.asked import asked_of
from stages.data.tokens.packing import all_targets, lay_out
from stages.data.tokens.views import Split, TokensArtifact
from stages.judge.gates.again import measured_again
from stages.judge.gates.computing import Computing
from stages.models.build import new_causal_lm
from stages.models.forward import next_token_loss_sum
from tests.curating import PLAIN, curated, rows_of, write_jsonl
from tests.places import REPOSITORY
from tests.small_world import MODEL, make_context, published, write_curated

GSM8K = REPOSITORY.parent / "shared" / "data" / "eval" / "gsm8k_test.jsonl.gz"
TOKENIZE = TokenizeConfig(vocab_size=300, sequence_length=64, max_prompt_length=40, bpe_train_bytes=10_000)
ROWS: list[dict[str, Any]] = [
    {"prompt": "What is 6 * 7?", "reference": 42},
    {"prompt": "Name a river.", "reference": ["Seine", "Rhine"], "system": "Be brief."},
    {"messages": [{"role": "user", "content": "As JSON!"}], "schema": {"type": "object"}},
    {"prompt": "Write f.", "tests": ["assert f(1) == 1", "assert f(2) == 4"]},
    {"question": "Two and two?", "answer": "2 + 2 = 4\n#### 4"},
    {"prompt": "Name a river.", "reference": ["Seine", "Rhine"], "system": "Be brief."},
    {"prompt": "  ", "reference": "x"},
    {"prompt": "Who?", "schema": {"$ref": "https://example.org/x"}},
    {"prompt": "Who?", "reference": {"name": "x"}},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "reference": "c"},
    {"question": "And?", "answer": "####"},
    {"prompt": "Whose is it?", "reference": "jane.roe@mail.example.com"},
]
SETTINGS = {**PLAIN, "documents": (), "heldout_fraction": 0.0, "max_bad_fraction": 1.0}


def test_every_row_is_published_or_dropped_by_a_reason_and_references_stay_with_their_prompts(tmp_path: Path) -> None:
    outcome, folder = curated(tmp_path, prompts=(write_jsonl(tmp_path / "set.jsonl", ROWS),), **SETTINGS)
    rows = {row["messages"][-1]["content"]: row for row in rows_of(folder / "prompts" / "train.jsonl.gz")}
    assert {question: row["reference"] for question, row in rows.items()} == {
        "What is 6 * 7?": ["42"],
        "Name a river.": ["Seine", "Rhine"],
        "As JSON!": [],
        "Write f.": [],
        "Two and two?": ["4"],
    }
    assert rows["Name a river."]["messages"][0] == {"role": "system", "content": "Be brief."}
    assert json.loads(rows["As JSON!"]["schema"]) == {"type": "object"}
    assert rows["Write f."]["tests"] == ["assert f(1) == 1", "assert f(2) == 4"]
    steps = {step["step"]: step for step in outcome.ledger["prompts"]["steps"]}
    assert {reason: lost["documents"] for step in steps.values() for reason, lost in step["dropped"].items()} == {
        "empty_prompt": 1,
        "invalid_schema": 1,
        "malformed_reference": 1,
        "ends_without_question": 1,
        "empty_reference": 1,
        "duplicate": 1,
        "personal_reference": 1,
    }
    assert steps["read"]["in"]["documents"] == len(ROWS)
    assert outcome.ledger["published_pairs"]["prompts/train"] == 5
    assert "jane" not in json.dumps(outcome.ledger)


def test_curation_without_prompt_sets_says_nothing_of_them(tmp_path: Path) -> None:
    pairs = [{"prompt": "Why?", "response": f"Because {number}."} for number in range(3)]
    settings = {**SETTINGS, "instructions": (write_jsonl(tmp_path / "pairs.jsonl", pairs),)}
    outcome, folder = curated(tmp_path, **settings)
    assert "prompts" not in outcome.ledger
    assert not (folder / "prompts").exists()
    assert set(outcome.ledger["published_pairs"]) == {
        f"{kind}/{split}" for kind in ("instructions", "preferences") for split in ("train", "heldout")
    }


def tokenized(home: Path, rows: list[dict[str, Any]]) -> tuple[dict[str, Any], TokensArtifact]:
    """The small world with prompt sets of these rows."""
    curate = make_context(home, Stage.CURATE, CurateConfig())
    write_curated(curate.output_dir)
    for split, chosen in (("train", rows), ("heldout", rows[:1])):
        path = curate.output_dir / "prompts" / f"{split}.jsonl.gz"
        path.parent.mkdir(exist_ok=True)
        with gzip.open(path, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in chosen)
    context = make_context(home, Stage.TOKENIZE, TOKENIZE, {"curated": published(curate)})
    return tokenize.run(context).ledger, TokensArtifact(context.output_dir)


def row(question: str, *reference: str) -> dict[str, Any]:
    empty = {"tests": [], "schema": "", "id": "x", "group": "set", "origin": "given"}
    return {"messages": [{"role": "user", "content": question}], "reference": list(reference), **empty}


def test_prompts_are_tokenized_with_their_rows_and_their_ledger_conserves(tmp_path: Path) -> None:
    rows = [row("2 + 2?", "4"), row("why " * 60, "x"), row("3 + 3?", "6"), row("2 + 2?", "5")]
    ledger, tokens = tokenized(tmp_path, rows)
    account = ledger["train"]["prompt_sets"]
    assert (account["in"], account["kept"]) == (4, 2)
    assert (account["dropped.prompt_too_long"], account["dropped.repeated"]) == (1, 1)
    lost = account["dropped_tokens.prompt_too_long"] + account["dropped_tokens.repeated"]
    assert account["tokens_in"] == account["masked_tokens"] + lost
    asked = asked_of(("prompts",), tokens, Split.TRAIN, needs=("reference",))
    assert [one.reference for one in asked.rows] == [("4",), ("6",)]
    decoded = [tokens.tokenizer().decode(asked.prompts[number].tolist()) for number in range(len(asked.prompts))]
    assert ["2 + 2?" in decoded[0], "3 + 3?" in decoded[1]] == [True, True]
    joined = asked_of(("instructions", "prompts"), tokens, Split.TRAIN)
    assert joined.counts == {"prompts": len(tokens.prompts(Split.TRAIN)), "prompt_sets": 2}
    assert joined.prompts[len(joined.prompts) - 1].tolist() == asked.prompts[1].tolist()
    with_texts = asked_of(("instructions",), tokens, Split.TRAIN, needs=())
    assert with_texts.rows[0].prompt.startswith("What does `")


def test_the_gate_measures_the_held_out_prompts_that_training_asked(tmp_path: Path) -> None:
    _, tokens = tokenized(tmp_path, [row("2 + 2?", "4"), row("3 + 3?", "6")])
    model = new_causal_lm(MODEL, tokens, seed=3).eval()
    asked = tokens.prompts(Split.HELDOUT), asked_of(("prompts",), tokens, Split.HELDOUT).prompts
    computing = Computing(torch.device("cpu"), row_length=64, max_rows=4, pad_id=tokens.pad_id)
    for field, prompts in zip(("instructions", "prompts"), asked, strict=True):
        packed = lay_out([all_targets(prompts[number]) for number in range(len(prompts))])
        with torch.no_grad():
            loss = float(next_token_loss_sum(model, packed)) / packed.num_targets
        manifest = SimpleNamespace(
            stage=Stage.PPO,
            config={"eval_items": 100, "prompts_from": field},
            metrics={"eval/prompt_loss": loss},
            execution={"compute_dtype": "float32"},
        )
        check = measured_again(cast(Any, manifest), model, tokens, computing, inputs={}, rows=cast(Any, []))
        assert check.outcome is Outcome.PASSED, (field, check)


def test_rows_that_lack_what_the_scorer_needs_are_counted_in_the_refusal(tmp_path: Path) -> None:
    _, tokens = tokenized(tmp_path, [row("2 + 2?", "4"), row("3 + 3?"), row("4 + 4?")])
    with pytest.raises(DataError, match=r"2 of 3 train prompts have no reference, which ppo\.scorer needs"):
        asked_of(("prompts",), tokens, Split.TRAIN, needs=("reference",))


@pytest.mark.skipif(not GSM8K.is_file(), reason="the shared data is not here")
def test_every_question_of_gsm8k_is_a_prompt_with_its_number(tmp_path: Path) -> None:
    outcome, folder = curated(tmp_path, prompts=(str(GSM8K),), **{**SETTINGS, "heldout_fraction": 0.1})
    sizes = outcome.ledger["published_pairs"]
    assert sizes["prompts/train"] + sizes["prompts/heldout"] == 1319
    assert 80 < sizes["prompts/heldout"] < 190
    given = [json.loads(line)["answer"] for line in gzip.decompress(GSM8K.read_bytes()).splitlines()]
    numbers = sorted(answer.rpartition("#### ")[2] for answer in given)
    found = [row for split in ("train", "heldout") for row in rows_of(folder / "prompts" / f"{split}.jsonl.gz")]
    assert sorted(row["reference"][0] for row in found) == numbers
