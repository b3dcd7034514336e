"""The whole of curation on small real and made-up sources: what is published, what is counted, what is refused."""

import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from stages.config.curate import CurateConfig
from stages.config.errors import ConfigError, DataError
from stages.data.curation import acts
from stages.data.curation.findings import Curation
from stages.data.curation.pool import Pool
from stages.data.curation.workbench import Workbench
from stages.data.pairs.build import fair_shares
from stages.job.context import StageOutcome
from tests.curating import PLAIN, curated, digests, prose, rows_of, write_jsonl
from tests.places import SHARED

DATA = SHARED / "data"
_TINY = {"packages": ("click", "jinja2"), "heldout_packages": ("click",), "planted": 2}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[StageOutcome, Path]:
    return curated(tmp_path_factory.mktemp("tiny"), **_TINY)


def test_packages_are_held_out_whole(tiny: tuple[StageOutcome, Path]) -> None:
    _, output = tiny
    for kind in ("documents", "instructions", "preferences"):
        suffix = "" if kind == "documents" else ".jsonl.gz"
        train = {row["group"].split("==")[0] for row in rows_of(output / kind / f"train{suffix}")}
        heldout = {row["group"].split("==")[0] for row in rows_of(output / kind / f"heldout{suffix}")}
        assert (train, heldout) == ({"jinja2"}, {"click"}), kind


def test_rows_have_the_agreed_shape(tiny: tuple[StageOutcome, Path]) -> None:
    _, output = tiny
    document = rows_of(output / "documents" / "train")[0]
    assert list(document) == ["id", "text", "source", "group", "path", "symbol"]
    assert document["id"].startswith(document["group"] + "/" + document["path"])
    instruction = rows_of(output / "instructions" / "train.jsonl.gz")[0]
    assert set(instruction) == {"id", "messages", "group", "origin"}
    preference = rows_of(output / "preferences" / "train.jsonl.gz")[0]
    assert set(preference) == {"id", "prompt", "chosen", "rejected", "kind", "group", "origin"}
    assert preference["prompt"][0]["role"] == "user"


def test_the_ledger_conserves_and_agrees_with_the_files(tiny: tuple[StageOutcome, Path]) -> None:
    outcome, output = tiny
    ledger = json.loads((output / "ledger.json").read_text())
    assert ledger == outcome.ledger
    steps = ledger["documents"]["steps"]
    for step in steps:
        dropped = step["dropped"].values()
        assert step["in"]["documents"] == step["kept"]["documents"] + sum(entry["documents"] for entry in dropped)
        size = step["kept"]["bytes"] + step["rewritten_bytes"] + sum(entry["bytes"] for entry in dropped)
        assert step["in"]["bytes"] == size
    rows = rows_of(output / "documents" / "train") + rows_of(output / "documents" / "heldout")
    assert steps[-1]["kept"] == {"documents": len(rows), "bytes": sum(len(row["text"].encode()) for row in rows)}
    assert steps[0]["in"]["documents"] == sum(
        source["in"]["documents"] for source in ledger["documents"]["sources"].values()
    )
    assert ledger["published_pairs"]["instructions/train"] == len(rows_of(output / "instructions" / "train.jsonl.gz"))


def test_planted_documents_are_found_and_never_published(tiny: tuple[StageOutcome, Path]) -> None:
    _, output = tiny
    found = json.loads((output / "planted.json").read_text())
    kinds = {"email", "ipv4", "ipv6", "phone", "credit_card", "iban", "ssn", "login", "secret", "private_key"}
    assert {f"pii_{kind}" for kind in kinds} | {"toxic", "near_duplicate"} <= set(found)
    for kind, entry in found.items():
        assert entry["planted"] == entry["found"] + entry["missed"] + entry["dropped_elsewhere"] == 2
        if kind != "near_duplicate":
            assert entry["found"] == 2, kind
    published = rows_of(output / "documents" / "train") + rows_of(output / "documents" / "heldout")
    assert not [row["id"] for row in published if "planted" in row["id"] or row["source"] == "planted"]


def test_a_filter_that_is_off_misses_what_was_planted(tmp_path: Path) -> None:
    outcome, _ = curated(tmp_path, **_TINY, toxicity="none", scrub_pii=False, near_duplicates=False)
    found = outcome.ledger["planted"]
    assert found["toxic"]["missed"] == 2
    assert found["pii_email"]["missed"] == 2
    assert found["near_duplicate"]["found"] == 0


def test_two_processes_give_the_same_bytes_as_one(tmp_path: Path) -> None:
    _, one = curated(tmp_path, "one", workers=1, **_TINY, toxicity="none")
    _, two = curated(tmp_path, "two", workers=2, **_TINY, toxicity="none")
    assert digests(one) == digests(two)


def test_another_seed_gives_other_questions(tiny: tuple[StageOutcome, Path], tmp_path: Path) -> None:
    _, other = curated(tmp_path, **_TINY, seed=1, toxicity="none")
    first = digests(tiny[1])["instructions/train.jsonl.gz"]
    assert digests(other)["instructions/train.jsonl.gz"] != first


def test_max_bytes_caps_what_goes_into_the_filters(tmp_path: Path) -> None:
    outcome, _ = curated(tmp_path, **_TINY, max_bytes=100_000, toxicity="none")
    cap = outcome.ledger["documents"]["steps"][1]
    assert cap["step"] == "cap"
    planted = outcome.ledger["documents"]["sources"]["planted"]["in"]["bytes"]
    assert 90_000 < cap["kept"]["bytes"] - planted <= 100_000


def _given(tmp_path: Path, documents: list[dict[str, Any]], **settings: Any) -> tuple[StageOutcome, Path]:
    source = write_jsonl(tmp_path / "documents.jsonl", documents)
    return curated(tmp_path, documents=(source,), **{**PLAIN, **settings})


def test_held_out_text_has_no_copy_in_training(tmp_path: Path) -> None:
    originals = [prose(number, 12) for number in range(40)]
    near = [text + " So it was." for text in originals]
    rows = [{"text": text} for text in [*originals, *originals, *near]]
    outcome, output = _given(tmp_path, rows, heldout_fraction=0.3)
    train, heldout = rows_of(output / "documents" / "train"), rows_of(output / "documents" / "heldout")
    assert outcome.ledger["documents"]["dropped"]["exact_duplicates/exact_duplicate"]["documents"] == 40
    assert len(train) + len(heldout) == 40
    assert heldout
    # The copy that stays is the held-out one wherever any copy of a text was drawn for it.
    assert not {row["text"][:200] for row in train} & {row["text"][:200] for row in heldout}


def test_bad_records_are_counted_and_the_run_goes_on(tmp_path: Path) -> None:
    rows = [{"text": prose(number)} for number in range(30)] + [{"body": "x"}]
    outcome, _ = _given(tmp_path, rows)
    read = outcome.ledger["documents"]["steps"][0]
    assert read["dropped"]["missing_text"]["documents"] == 1
    assert read["samples"]["missing_text"][0]["id"] == "0/documents.jsonl:31"


def test_too_many_bad_records_stop_the_run(tmp_path: Path) -> None:
    rows = [{"text": prose(number)} for number in range(10)] + [{"body": "x"}] * 5
    with pytest.raises(
        DataError, match=r"5 of 15 records \(33.3%\) are unreadable .*missing_text.*max_bad_fraction=5.0%"
    ):
        _given(tmp_path, rows)


def test_an_empty_corpus_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing could be read"):
        _given(tmp_path, [])


def test_a_corpus_of_which_nothing_is_left_says_what_took_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no training document is left.*quality/gopher_short_doc"):
        _given(tmp_path, [{"text": " ".join(prose(number).split()[:25]) + "."} for number in range(5)])


def test_a_missing_source_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no-such-folder"):
        curated(tmp_path, documents=(str(tmp_path / "no-such-folder"),))


def test_given_rows_replace_derived_ones_and_bad_ones_are_counted(tmp_path: Path) -> None:
    instructions = [{"instruction": f"Name {n}.", "response": f"It is {n}, jane.doe@example.com."} for n in range(9)]
    instructions += [{"instruction": "Silent."}, instructions[0]]
    preferences = [{"prompt": f"Name {n}.", "chosen": f"{n}", "rejected": "None."} for n in range(9)]
    preferences += [{"prompt": "Tie.", "chosen": "x", "rejected": "x"}]
    outcome, output = _given(
        tmp_path,
        [{"text": prose(number)} for number in range(10)],
        instructions=(write_jsonl(tmp_path / "i.jsonl", instructions),),
        preferences=(write_jsonl(tmp_path / "p.jsonl", preferences),),
        heldout_fraction=0.0,
        toxicity="classifier",
    )
    steps = {step["step"]: step["dropped"] for step in outcome.ledger["instructions"]["steps"]}
    assert steps["read"]["empty_response"]["documents"] == 1
    assert steps["duplicates"]["duplicate"]["documents"] == 1
    assert outcome.ledger["preferences"]["steps"][0]["dropped"]["equal_sides"]["documents"] == 1
    rows = rows_of(output / "instructions" / "train.jsonl.gz")
    assert sorted(row["messages"][1]["content"] for row in rows) == [f"It is {n}, <EMAIL>." for n in range(9)]
    assert len(rows_of(output / "preferences" / "train.jsonl.gz")) == 9


def test_given_rows_of_which_none_is_left_are_an_error(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "i.jsonl", [{"instruction": "Silent.", "response": ""}])
    with pytest.raises(DataError, match=r"no row is left.*empty_response"):
        _given(tmp_path, [{"text": prose(number)} for number in range(5)], instructions=(source,))


def test_published_files_that_do_not_hold_what_the_ledger_says_fail_the_stage(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "documents.jsonl", [{"text": prose(number)} for number in range(10)])
    config = CurateConfig(documents=(source,), heldout_fraction=0.0, **PLAIN)
    curation = Curation(Workbench(config, tmp_path / "work", tmp_path / "out"), Pool(None), lambda *_, **__: None)
    for act in (acts.recall, acts.read, acts.mark, acts.filter_documents, acts.finish):
        act(curation)
    acts.verify(curation)
    assert curation.published["train"].documents == 10
    name = curation.bench.published_documents("train")[0].removesuffix(".jsonl.gz")
    curation.bench.publish(name, [{"text": prose(number)} for number in range(9)])
    with pytest.raises(DataError, match=r"the published files hold \{'documents': 9, .* the ledger says .*: 10,"):
        acts.verify(curation)


@pytest.mark.skipif(not DATA.exists(), reason="../shared/data is not there")
def test_novels_pass_as_books(tmp_path: Path) -> None:
    folder = tmp_path / "novels"
    folder.mkdir()
    with tarfile.open(DATA / "corpus" / "novels.tar.gz") as archive:
        for member in [member for member in archive.getmembers() if "Chesterton" in member.name][:3]:
            file = archive.extractfile(member)
            assert file is not None
            chapters = file.read().decode("utf-8", "replace").replace("\r\n", "\n").split("\n\n")
            (folder / f"{Path(member.name).stem}.txt").write_text("\n\n".join(chapters[40:160]))
    outcome, _ = curated(
        tmp_path, documents=(str(folder),), profile="books", instructions=(), preferences=(), planted=0, toxicity="none"
    )
    assert outcome.metrics["curate/documents_kept"] == 3


def test_a_cap_is_shared_equally_so_that_a_large_source_does_not_crowd_out_a_small_one(tmp_path: Path) -> None:
    sources = [
        write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": f"{name} {n}?", "response": "yes"} for n in range(count)])
        for name, count in (("large", 300), ("middle", 60), ("small", 10))
    ]
    documents = write_jsonl(tmp_path / "text.jsonl", [{"text": prose(seed)} for seed in range(8)])
    outcome, output = curated(
        tmp_path,
        documents=[documents],
        instructions=sources,
        preferences=[],
        max_instructions=120,
        heldout_fraction=0.0,
        planted=0,
        toxicity="none",
    )
    counts = Counter(Path(row["group"]).stem for row in rows_of(output / "instructions" / "train.jsonl.gz"))
    assert counts == {"large": 55, "middle": 55, "small": 10}
    accounts = outcome.ledger["instructions"]["sources"]
    assert {Path(name).stem: account["in"] for name, account in accounts.items()} == {
        "large": 300,
        "middle": 60,
        "small": 10,
    }


def test_shares_of_a_cap_use_all_of_it() -> None:
    assert fair_shares({"a": 1, "b": 100, "c": 100}, 10) == {"a": 1, "b": 4, "c": 5}
    assert fair_shares({"a": 3, "b": 4}, 100) == {"a": 3, "b": 4}
    assert fair_shares({}, 5) == {}
