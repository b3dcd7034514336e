"""Rows of every shape, from the file to the tokens: through the real `curate` and `tokenize`, counted one by one."""

import csv
import gzip
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather as feather
import pytest

from stages import curate, tokenize
from stages.config.curate import CurateConfig
from stages.config.errors import DataError
from stages.config.graph import Stage
from stages.config.tokens import TokenizeConfig
from stages.data.tokens.views import Split, TokensArtifact
from stages.job.context import StageOutcome
from tests.curating import PLAIN, curated, prose, rows_of, write_jsonl
from tests.places import SHARED
from tests.small_world import make_context, published

DATA = SHARED / "data"
SETTINGS = TokenizeConfig(vocab_size=400, sequence_length=1024, max_prompt_length=512, bpe_train_bytes=100_000)


def asked(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def through(tmp_path: Path, **sources: Any) -> tuple[StageOutcome, Path, TokensArtifact]:
    """Curate sources together with some documents, tokenize what was published."""
    documents = write_jsonl(tmp_path / "documents.jsonl", [{"text": prose(number)} for number in range(30)])
    config = CurateConfig.model_validate({**PLAIN, "documents": (documents,), "heldout_fraction": 0.1, **sources})
    curating = make_context(tmp_path / "world", Stage.CURATE, config)
    outcome = curate.run(curating)
    tokenizing = make_context(tmp_path / "world", Stage.TOKENIZE, SETTINGS, {"curated": published(curating)})
    tokenize.run(tokenizing)
    return outcome, curating.output_dir, TokensArtifact(tokenizing.output_dir)


def everything(output: Path, part: str) -> list[dict[str, Any]]:
    return [row for split in Split for row in rows_of(output / part / f"{split}.jsonl.gz")]


def conserved(outcome: StageOutcome, part: str, rows: int) -> Counter[str]:
    """What was dropped of `rows` rows, by reason; every other one was published."""
    ledger = outcome.ledger[part]
    dropped: Counter[str] = Counter()
    for step in ledger["steps"]:
        dropped.update({reason: amount["documents"] for reason, amount in step["dropped"].items()})
    published_rows = sum(count for name, count in outcome.ledger["published_pairs"].items() if name.startswith(part))
    assert ledger["steps"][0]["in"]["documents"] == rows == published_rows + dropped.total()
    return dropped


def shaped(shape: str, question: str, answer: str) -> dict[str, Any]:
    """One exchange as a row of a shape."""
    match shape:
        case "messages":
            return {"messages": [asked(question), said(answer)]}
        case "sharegpt":
            return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
        case "alpaca":
            return {"instruction": question, "input": "", "output": answer}
        case "dolly":
            return {"instruction": question, "context": "", "response": answer, "category": "qa"}
        case "instruction":
            return {"instruction": question, "completion": answer}
        case "flan":
            return {"inputs": question, "targets": answer}
        case "prompt":
            return {"question": question, "answer": answer}
        case "oasst_tree":
            reply = {"role": "assistant", "text": answer, "replies": []}
            return {"message_tree_id": question, "prompt": {"role": "prompter", "text": question, "replies": [reply]}}
        case "instances":
            return {"instruction": question, "instances": [{"input": "", "output": answer}]}
        case "turns":
            return {"data": [question, answer]}
    raise AssertionError(shape)


SHAPES = (
    "messages",
    "sharegpt",
    "alpaca",
    "dolly",
    "instruction",
    "flan",
    "prompt",
    "oasst_tree",
    "instances",
    "turns",
)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    """Rows as a file of the kind that its name says; a table has a column for every field of any row."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = [{name: row.get(name) for name in names} for row in rows]
    match path.suffix:
        case ".csv" | ".tsv":
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, names, delimiter="\t" if path.suffix == ".tsv" else ",")
                writer.writeheader()
                for row in rows:
                    writer.writerow({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()})
        case ".feather":
            feather.write_feather(pa.Table.from_pylist(table), path)
        case ".arrow":
            columns = pa.Table.from_pylist(table)
            with pa.ipc.new_stream(str(path), columns.schema) as writer:
                writer.write_table(columns)
        case _:  # JSON lines, also under .json
            write_jsonl(path, rows)
    return str(path)


KINDS = ("jsonl", "json", "csv", "tsv", "arrow", "feather")


def test_conversations_of_every_shape_and_kind_of_file_reach_the_tokens(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    numbers, wanted = itertools.count(), set()
    for shape, kind in itertools.product(SHAPES, KINDS):
        texts = [(f"Question {next(numbers)}?", f"Answer, of a {shape} in {kind}\nline {n}.") for n in range(3)]
        write_rows(folder / f"{shape}.{kind}", [shaped(shape, *exchange) for exchange in texts])
        wanted |= set(texts)
    outcome, output, tokens = through(tmp_path, instructions=(str(folder),))
    assert conserved(outcome, "instructions", len(wanted)) == {}
    assert {tuple(turn["content"] for turn in row["messages"]) for row in everything(output, "instructions")} == wanted
    (account,) = outcome.ledger["instructions"]["sources"].values()
    # A cell that is empty does not show that a table has contexts, so they are the seed form or Dolly's: both are one.
    assert account["formats"].pop("dolly", 0) + account["formats"].pop("instruction") == 2 * 3 * len(KINDS)
    assert account["formats"] == {s: 3 * len(KINDS) for s in SHAPES if s not in ("dolly", "instruction")}
    assert sum(len(tokens.conversations(split)) for split in Split) == len(wanted)


def preference(shape: str, prompt: str, chosen: str, rejected: str) -> list[dict[str, Any]]:
    """One preference as a row of a shape, or as the two rows of a labelled pair."""
    head = {"prompt": prompt}
    match shape:
        case "pair":
            return [{**head, "chosen": chosen, "rejected": rejected}]
        case "transcripts":
            start = f"\n\nHuman: {prompt}\n\nAssistant: "
            return [{"chosen": start + chosen, "rejected": start + rejected}]
        case "dialogues":
            return [{"chosen": [asked(prompt), said(chosen)], "rejected": [asked(prompt), said(rejected)]}]
        case "ranked":
            return [{**head, "responses": [rejected, chosen], "scores": [1, 2]}]
        case "ultrafeedback":
            ratings = [{"honesty": {"Rating": rating, "Rationale": "r"}} for rating in ("2", "4")]
            texts = zip((rejected, chosen), ratings, strict=True)
            return [{"instruction": prompt, "completions": [{"response": t, "annotations": r} for t, r in texts]}]
        case "nectar":
            ranks = [{"answer": chosen, "rank": 1.0}, {"answer": rejected, "rank": 2.0}]
            return [{"prompt": f"\n\nHuman: {prompt}\n\nAssistant: ", "answers": ranks, "num_responses": 2}]
        case "pairwise":
            return [{**head, "response_a": rejected, "response_b": chosen, "label": "b"}]
        case "annotators":
            return [{**head, "response_0": chosen, "response_1": rejected, "labels": [0, 1, 0]}]
        case "labelled":
            return [{**head, "completion": chosen, "label": True}, {**head, "completion": rejected, "label": False}]
    raise AssertionError(shape)


PREFERENCES = (
    "pair", "transcripts", "dialogues", "ranked", "ultrafeedback", "nectar", "pairwise", "annotators", "labelled",
)  # fmt: skip


def test_preferences_of_every_shape_and_kind_of_file_reach_the_tokens(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    numbers, wanted, given = itertools.count(), set(), 0
    for shape, kind in itertools.product(PREFERENCES, KINDS):
        judged = [(f"Question {next(numbers)}?", f"Good, {shape}.", f"Bad, {kind}.") for _ in range(2)]
        rows = [row for texts in judged for row in preference(shape, *texts)]
        write_rows(folder / f"{shape}.{kind}", rows)
        wanted |= set(judged)
        given += len(rows)
    outcome, output, tokens = through(tmp_path, preferences=(str(folder),))
    assert conserved(outcome, "preferences", given) == {"joined": 2 * len(KINDS)}
    found = {(row["prompt"][0]["content"], row["chosen"], row["rejected"]) for row in everything(output, "preferences")}
    assert found == wanted
    (account,) = outcome.ledger["preferences"]["sources"].values()
    assert account["changed"] == {"annotators_disagreed": 2 * len(KINDS)}
    assert sum(len(tokens.pairs(split)) for split in Split) == len(wanted)


def test_a_folder_of_mixed_tables_conserves_row_by_row(tmp_path: Path) -> None:
    """Tables of one shape for a hundred rows and more, with every other shape and with rows of none behind them."""
    folder = tmp_path / "rows"
    folder.mkdir()
    numbers, wanted = itertools.count(), set()
    for name, shape in (("a.jsonl", "alpaca"), ("b.csv", "messages"), ("c.arrow", "flan")):
        rows = []
        for place in range(130):
            question, answer = f"Question {next(numbers)}?", f"Answer {name}."
            rows.append(shaped(shape if place < 110 else SHAPES[place % len(SHAPES)], question, answer))
            wanted.add((question, answer))
        rows.insert(115, {"headline": "of no shape", "body": name})
        write_rows(folder / name, rows)
    outcome, output, _ = through(tmp_path, instructions=(str(folder),))
    assert conserved(outcome, "instructions", len(wanted) + 3) == {"unknown_shape": 3}
    assert {tuple(turn["content"] for turn in row["messages"]) for row in everything(output, "instructions")} == wanted
    shown = outcome.ledger["instructions"]["steps"][0]["samples"]["unknown_shape"]
    assert [sample["text"] for sample in shown] == [
        "row 116: fields: body, headline",
        "row 117: fields: body, headline",  # in a CSV a row is named by its line, and the header is one
        "row 116: fields: body, headline",
    ]


@pytest.mark.skipif(not DATA.exists(), reason="../shared/data is not there")
def test_real_rows_of_six_files_in_one_folder_are_all_accounted_for(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()

    def first(name: str, count: int) -> list[dict[str, Any]]:
        data = gzip.decompress((DATA / name).read_bytes())
        return (json.loads(data) if name.endswith(".json.gz") else [*map(json.loads, data.splitlines())])[:count]

    files = {
        "codegen.jsonl": first("sft/gpteacher_codegen.json.gz", 150),
        "roleplay.csv": first("sft/gpteacher_roleplay.json.gz", 150),
        "dolly.feather": first("sft/dolly_hhrlhf_small.jsonl.gz", 150),
        "gsm8k.arrow": first("eval/gsm8k_test.jsonl.gz", 150),
        # No shape of conversations: a task, its tests and a solution under a name of its own.
        "humaneval.json": [{"task": row["prompt"], "code": row["canonical_solution"]}
                           for row in first("eval/HumanEval.jsonl.gz", 10)],
    }  # fmt: skip
    mixed = [row for rows in zip(*(files[name][100:] for name in list(files)[:4]), strict=True) for row in rows]
    files = {name: rows[:100] for name, rows in files.items()} | {"mixed.jsonl": mixed}
    for name, rows in files.items():
        write_rows(folder / name, rows)
    outcome, _, _ = through(tmp_path, instructions=(str(folder),))
    total = sum(map(len, files.values()))
    (account,) = outcome.ledger["instructions"]["sources"].values()
    assert account["formats"] == {"instruction": 300, "prompt": 300}
    dropped = conserved(outcome, "instructions", total)
    assert dropped["unknown_shape"] == 10
    assert dropped.keys() <= {"unknown_shape", "duplicate", "empty_response"}


@pytest.mark.skipif(not DATA.exists(), reason="../shared/data is not there")
def test_real_transcripts_give_the_same_pairs_in_every_shape(tmp_path: Path) -> None:
    lines = gzip.decompress((DATA / "preference" / "hh_harmless_base_test.jsonl.gz").read_bytes()).splitlines()
    _, output = curated(tmp_path, "one", **_only(tmp_path, write_jsonl(tmp_path / "a.jsonl", [
        json.loads(line) for line in lines[:60]])))  # fmt: skip
    expected = everything(output, "preferences")
    assert len(expected) > 50
    labelled = []
    for place, row in enumerate(expected):
        sides = [row["chosen"], row["rejected"]] if place % 2 else [row["rejected"], row["chosen"]]
        marks = dict(zip(("response_a", "response_b"), sides, strict=True))
        labelled.append({"prompt": row["prompt"], **marks, "label": "a" if place % 2 else "b"})
    _, output = curated(tmp_path, "two", **_only(tmp_path, write_rows(tmp_path / "b.csv", labelled)))
    sides = ("prompt", "chosen", "rejected")
    found = [[row[name] for name in sides] for row in everything(output, "preferences")]
    assert sorted(found, key=str) == sorted(([row[name] for name in sides] for row in expected), key=str)


def _only(tmp_path: Path, preferences: str) -> dict[str, Any]:
    documents = write_jsonl(tmp_path / "documents.jsonl", [{"text": prose(number)} for number in range(20)])
    return {**PLAIN, "documents": (documents,), "preferences": (preferences,), "heldout_fraction": 0.0}


MODULE = '''
"""Tools that {name} needs to do its daily work in the house and in the garden of the family."""

{functions}
'''
FUNCTION = '''
def {name}_{number}():
    """{summary}

    {more}
    """
'''


def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An installed distribution with 40 documented functions."""
    home, name = tmp_path / "site", "gardening"
    (home / name).mkdir(parents=True)
    summaries = [prose(1000 + number, sentences=1) for number in range(40)]
    functions = "".join(
        FUNCTION.format(name="plant", number=number, summary=summary, more=prose(2000 + number))
        for number, summary in enumerate(summaries)
    )
    (home / name / "__init__.py").write_text(MODULE.format(name=name, functions=functions))
    info = home / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "RECORD").write_text(f"{name}/__init__.py,,\n{name}-1.0.dist-info/METADATA,,\n")
    (info / "top_level.txt").write_text(f"{name}\n")
    monkeypatch.syspath_prepend(str(home))
    return name


def test_derived_rows_and_given_ones_stand_next_to_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = package(tmp_path, monkeypatch)
    one = [shaped("alpaca", f"Question {number}?", f"Answer {number}.") for number in range(100)]
    two = [shaped("flan", f"Other question {number}?", f"Answer {number}.") for number in range(5)]
    judged = [row for n in range(60) for row in preference("pair", f"Why {n}?", f"Good {n}.", f"Bad {n}.")]
    settings = {**PLAIN, "documents": ("installed-docs",), "packages": (name,), "heldout_fraction": 0.0}
    settings |= {"max_instructions": 50, "max_preferences": 40}
    first, second = write_jsonl(tmp_path / "1.jsonl", one), write_jsonl(tmp_path / "2.jsonl", [*two, {"inputs": "x"}])
    settings["instructions"] = (first, "derived", second)
    settings["preferences"] = ("derived", write_jsonl(tmp_path / "p.jsonl", judged))
    outcome, output = curated(tmp_path, **settings)
    derived = {"instructions": 40, "preferences": 40}
    for part, given in (("instructions", 106), ("preferences", 60)):
        dropped = conserved(outcome, part, derived[part] + given)
        rows = Counter(row["group"] if row["origin"] == "given" else "derived" for row in everything(output, part))
        if part == "instructions":  # 50 for three sources: all 5 of the small one, and half of the rest for the others
            assert (rows[second], rows[first]) == (5, 23)
            assert dropped["empty_response"] == 1
        assert abs(rows["derived"] - {"instructions": 22, "preferences": 20}[part]) <= 1
        assert sum(rows.values()) == {"instructions": 50, "preferences": 40}[part]
    assert outcome.ledger["preferences"]["kinds"]["given"] == 20


def test_given_rows_that_come_to_nothing_are_not_hidden_by_derived_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**PLAIN, "documents": ("installed-docs",), "packages": (package(tmp_path, monkeypatch),)}
    source = write_jsonl(tmp_path / "i.jsonl", [{"inputs": "x", "targets": ""}])
    with pytest.raises(DataError, match=r"no row is left of the given sources.*empty_response"):
        curated(tmp_path, **{**settings, "instructions": ("derived", source)})


def test_reasons_are_published_without_personal_data_and_those_of_several_raters_together(tmp_path: Path) -> None:
    pair = {"prompt": "Why?", "chosen": "good", "rejected": "bad"}
    rows = [
        {**pair, "reasons": ["honest"], "comment": "Ask jane.doe@example.com.", "by": "ada", "at": "2026-01-01"},
        {**pair, "reasons": ["honest"], "comment": "It names its source.", "by": "bob", "at": "2026-01-02"},
        {"prompt": "How?", "chosen": "good", "rejected": "bad"},
    ]
    outcome, output = curated(tmp_path, **_only(tmp_path, write_jsonl(tmp_path / "p.jsonl", rows)))
    found = {row["prompt"][0]["content"]: row for row in everything(output, "preferences")}
    assert sorted(found["Why?"]["reason"].splitlines()) == ["Ask <EMAIL>.", "It names its source.", "honest"]
    assert "reason" not in found["How?"]
    assert not {"by", "at"} & found["Why?"].keys()
    assert outcome.ledger["pii"]["pairs"] == {"EMAIL": 1}
    assert conserved(outcome, "preferences", 3) == {"duplicate": 1}
