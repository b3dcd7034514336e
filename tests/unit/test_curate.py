"""The whole of curation on small real and made-up sources: what is published, what is counted, what is refused."""

import gzip
import hashlib
import json
import random
import tarfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from stages import curate
from stages.config.curate import CurateConfig
from stages.config.errors import ConfigError, DataError
from stages.config.execution import ExecutionConfig
from stages.data.curation import acts
from stages.data.curation.findings import Curation
from stages.data.curation.pool import Pool
from stages.data.curation.workbench import Workbench
from stages.data.pairs.build import fair_shares
from stages.job.context import StageOutcome
from tests.places import SHARED

DATA = SHARED / "data"
_PLAIN: dict[str, Any] = {"planted": 0, "toxicity": "none", "instructions": (), "preferences": ()}
_TINY = {"packages": ("click", "jinja2"), "heldout_packages": ("click",), "planted": 2}


def _run(
    tmp_path: Path, name: str = "out", workers: int = 1, previous: Path | None = None, **settings: Any
) -> tuple[StageOutcome, Path]:
    output, work = tmp_path / name, tmp_path / f"{name}.work"
    output.mkdir()
    context = SimpleNamespace(
        config=CurateConfig.model_validate(settings),
        execution=ExecutionConfig(cpus_per_worker=workers),
        work_dir=work,
        output_dir=output,
        inputs={"previous": SimpleNamespace(fingerprint="earlier")} if previous else {},
        input_dir=lambda role: previous,
        progress=lambda done, total, unit="", **numbers: None,
    )
    return curate.run(cast(Any, context)), output


def _rows(path: Path) -> list[dict[str, Any]]:
    files = [path] if path.suffix == ".gz" else sorted(path.glob("*.jsonl.gz"))
    return [json.loads(line) for file in files for line in gzip.open(file, "rt", encoding="utf-8")]


def _digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


_VOCABULARY = """
river mill letter city house hill winter summer harbour sailor teacher garden window kitchen village bridge market
horse wagon forest church doctor lawyer brother sister mother father captain soldier farmer widow orphan candle
lantern mirror curtain chimney stable barn meadow valley mountain storm thunder shadow silence promise secret journey
supper breakfast morning evening midnight holiday wedding funeral fortune bargain quarrel friend stranger neighbour
carpenter butcher painter singer poet banker clerk servant beggar prince palace prison castle tower island ocean beach
anchor ladder hammer needle button pocket basket bottle barrel saddle feather leather copper silver marble timber
orchard cherry apple potato onion pepper butter cheese honey coffee tobacco pillow blanket jacket collar slipper
"""
_WORDS = _VOCABULARY.split()


def _prose(seed: int, sentences: int = 6) -> str:
    """English that no two seeds share and that repeats nothing."""
    rng = random.Random(seed)
    shapes = (
        "The {} of the {} was taken to the {} before anybody in the {} had heard of that {}.",
        "With a {} and some {} they have crossed the {} to be near the {}.",
        "Nobody believes that the {} can be seen from the {} when the {} is closed.",
        "It was her {} who had brought the {} to us, and that is why we never sold the {}.",
    )
    lines = [rng.choice(shapes) for _ in range(sentences)]
    return " ".join(line.format(*rng.sample(_WORDS, line.count("{}"))) for line in lines)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[StageOutcome, Path]:
    return _run(tmp_path_factory.mktemp("tiny"), **_TINY)


def test_packages_are_held_out_whole(tiny: tuple[StageOutcome, Path]) -> None:
    _, output = tiny
    for kind in ("documents", "instructions", "preferences"):
        suffix = "" if kind == "documents" else ".jsonl.gz"
        train = {row["group"].split("==")[0] for row in _rows(output / kind / f"train{suffix}")}
        heldout = {row["group"].split("==")[0] for row in _rows(output / kind / f"heldout{suffix}")}
        assert (train, heldout) == ({"jinja2"}, {"click"}), kind


def test_rows_have_the_agreed_shape(tiny: tuple[StageOutcome, Path]) -> None:
    _, output = tiny
    document = _rows(output / "documents" / "train")[0]
    assert list(document) == ["id", "text", "source", "group", "path", "symbol"]
    assert document["id"].startswith(document["group"] + "/" + document["path"])
    instruction = _rows(output / "instructions" / "train.jsonl.gz")[0]
    assert set(instruction) == {"id", "messages", "group", "origin"}
    preference = _rows(output / "preferences" / "train.jsonl.gz")[0]
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
    rows = _rows(output / "documents" / "train") + _rows(output / "documents" / "heldout")
    assert steps[-1]["kept"] == {"documents": len(rows), "bytes": sum(len(row["text"].encode()) for row in rows)}
    assert steps[0]["in"]["documents"] == sum(
        source["in"]["documents"] for source in ledger["documents"]["sources"].values()
    )
    assert ledger["published_pairs"]["instructions/train"] == len(_rows(output / "instructions" / "train.jsonl.gz"))


def test_planted_documents_are_found_and_never_published(tiny: tuple[StageOutcome, Path]) -> None:
    _, output = tiny
    found = json.loads((output / "planted.json").read_text())
    kinds = {"email", "ipv4", "ipv6", "phone", "credit_card", "iban", "ssn"}
    assert {f"pii_{kind}" for kind in kinds} | {"toxic", "near_duplicate"} <= set(found)
    for kind, entry in found.items():
        assert entry["planted"] == entry["found"] + entry["missed"] + entry["dropped_elsewhere"] == 2
        if kind != "near_duplicate":
            assert entry["found"] == 2, kind
    published = _rows(output / "documents" / "train") + _rows(output / "documents" / "heldout")
    assert not [row["id"] for row in published if "planted" in row["id"] or row["source"] == "planted"]


def test_a_filter_that_is_off_misses_what_was_planted(tmp_path: Path) -> None:
    outcome, _ = _run(tmp_path, **_TINY, toxicity="none", scrub_pii=False, near_duplicates=False)
    found = outcome.ledger["planted"]
    assert found["toxic"]["missed"] == 2
    assert found["pii_email"]["missed"] == 2
    assert found["near_duplicate"]["found"] == 0


def test_two_processes_give_the_same_bytes_as_one(tmp_path: Path) -> None:
    _, one = _run(tmp_path, "one", workers=1, **_TINY, toxicity="none")
    _, two = _run(tmp_path, "two", workers=2, **_TINY, toxicity="none")
    assert _digests(one) == _digests(two)


def test_another_seed_gives_other_questions(tiny: tuple[StageOutcome, Path], tmp_path: Path) -> None:
    _, other = _run(tmp_path, **_TINY, seed=1, toxicity="none")
    first = _digests(tiny[1])["instructions/train.jsonl.gz"]
    assert _digests(other)["instructions/train.jsonl.gz"] != first


def test_max_bytes_caps_what_goes_into_the_filters(tmp_path: Path) -> None:
    outcome, _ = _run(tmp_path, **_TINY, max_bytes=100_000, toxicity="none")
    cap = outcome.ledger["documents"]["steps"][1]
    assert cap["step"] == "cap"
    planted = outcome.ledger["documents"]["sources"]["planted"]["in"]["bytes"]
    assert 90_000 < cap["kept"]["bytes"] - planted <= 100_000


def _given(tmp_path: Path, documents: list[dict[str, Any]], **settings: Any) -> tuple[StageOutcome, Path]:
    source = _write_jsonl(tmp_path / "documents.jsonl", documents)
    return _run(tmp_path, documents=(source,), **{**_PLAIN, **settings})


def test_held_out_text_has_no_copy_in_training(tmp_path: Path) -> None:
    originals = [_prose(number, 12) for number in range(40)]
    near = [text + " So it was." for text in originals]
    rows = [{"text": text} for text in [*originals, *originals, *near]]
    outcome, output = _given(tmp_path, rows, heldout_fraction=0.3)
    train, heldout = _rows(output / "documents" / "train"), _rows(output / "documents" / "heldout")
    assert outcome.ledger["documents"]["dropped"]["exact_duplicates/exact_duplicate"]["documents"] == 40
    assert len(train) + len(heldout) == 40
    assert heldout
    # The copy that stays is the held-out one wherever any copy of a text was drawn for it.
    assert not {row["text"][:200] for row in train} & {row["text"][:200] for row in heldout}


def test_bad_records_are_counted_and_the_run_goes_on(tmp_path: Path) -> None:
    rows = [{"text": _prose(number)} for number in range(30)] + [{"body": "x"}]
    outcome, _ = _given(tmp_path, rows)
    read = outcome.ledger["documents"]["steps"][0]
    assert read["dropped"]["missing_text"]["documents"] == 1
    assert read["samples"]["missing_text"][0]["id"] == "0/documents.jsonl:31"


def test_too_many_bad_records_stop_the_run(tmp_path: Path) -> None:
    rows = [{"text": _prose(number)} for number in range(10)] + [{"body": "x"}] * 5
    with pytest.raises(
        DataError, match=r"5 of 15 records \(33.3%\) are unreadable .*missing_text.*max_bad_fraction=5.0%"
    ):
        _given(tmp_path, rows)


def test_an_empty_corpus_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing could be read"):
        _given(tmp_path, [])


def test_a_corpus_of_which_nothing_is_left_says_what_took_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no training document is left.*quality/gopher_short_doc"):
        _given(tmp_path, [{"text": " ".join(_prose(number).split()[:25]) + "."} for number in range(5)])


def test_a_missing_source_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no-such-folder"):
        _run(tmp_path, documents=(str(tmp_path / "no-such-folder"),))


def test_given_rows_replace_derived_ones_and_bad_ones_are_counted(tmp_path: Path) -> None:
    instructions = [{"instruction": f"Name {n}.", "response": f"It is {n}, jane.doe@example.com."} for n in range(9)]
    instructions += [{"instruction": "Silent."}, instructions[0]]
    preferences = [{"prompt": f"Name {n}.", "chosen": f"{n}", "rejected": "None."} for n in range(9)]
    preferences += [{"prompt": "Tie.", "chosen": "x", "rejected": "x"}]
    outcome, output = _given(
        tmp_path,
        [{"text": _prose(number)} for number in range(10)],
        instructions=(_write_jsonl(tmp_path / "i.jsonl", instructions),),
        preferences=(_write_jsonl(tmp_path / "p.jsonl", preferences),),
        heldout_fraction=0.0,
        toxicity="classifier",
    )
    steps = {step["step"]: step["dropped"] for step in outcome.ledger["instructions"]["steps"]}
    assert steps["read"]["empty_response"]["documents"] == 1
    assert steps["duplicates"]["duplicate"]["documents"] == 1
    assert outcome.ledger["preferences"]["steps"][0]["dropped"]["equal_sides"]["documents"] == 1
    rows = _rows(output / "instructions" / "train.jsonl.gz")
    assert sorted(row["messages"][1]["content"] for row in rows) == [f"It is {n}, <EMAIL>." for n in range(9)]
    assert len(_rows(output / "preferences" / "train.jsonl.gz")) == 9


def test_given_rows_of_which_none_is_left_are_an_error(tmp_path: Path) -> None:
    source = _write_jsonl(tmp_path / "i.jsonl", [{"instruction": "Silent.", "response": ""}])
    with pytest.raises(DataError, match=r"no row is left.*empty_response"):
        _given(tmp_path, [{"text": _prose(number)} for number in range(5)], instructions=(source,))


def test_published_files_that_do_not_hold_what_the_ledger_says_fail_the_stage(tmp_path: Path) -> None:
    source = _write_jsonl(tmp_path / "documents.jsonl", [{"text": _prose(number)} for number in range(10)])
    config = CurateConfig(documents=(source,), heldout_fraction=0.0, **_PLAIN)
    curation = Curation(Workbench(config, tmp_path / "work", tmp_path / "out"), Pool(None), lambda *_, **__: None)
    for act in (acts.recall, acts.read, acts.mark, acts.filter_documents, acts.finish):
        act(curation)
    acts.verify(curation)
    assert curation.published["train"].documents == 10
    name = curation.bench.published_documents("train")[0].removesuffix(".jsonl.gz")
    curation.bench.publish(name, [{"text": _prose(number)} for number in range(9)])
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
    outcome, _ = _run(
        tmp_path, documents=(str(folder),), profile="books", instructions=(), preferences=(), planted=0, toxicity="none"
    )
    assert outcome.metrics["curate/documents_kept"] == 3


def _increment(tmp_path: Path, name: str, texts: list[str], **settings: Any) -> tuple[StageOutcome, Path]:
    folder = tmp_path / f"{name}.raw"
    folder.mkdir()
    source = _write_jsonl(folder / "documents.jsonl", [{"text": text} for text in texts])
    return _run(tmp_path, name, documents=(source,), **{**_PLAIN, **settings})


def _texts(output: Path, split: str = "train") -> set[str]:
    return {row["text"] for row in _rows(output / "documents" / split)}


def test_an_increment_holds_what_no_earlier_one_has_seen(tmp_path: Path) -> None:
    old, later, new = ([_prose(number, 12) for number in range(start, start + 10)] for start in (0, 100, 200))
    too_short = "This was too short."
    _, first = _increment(tmp_path, "first", [*old, too_short], heldout_fraction=0.3)
    _, second = _increment(tmp_path, "second", [*old, *later], heldout_fraction=0.3, previous=first)
    near = [text + " So it was." for text in (old[0], later[0])]
    outcome, third = _increment(
        tmp_path, "third", [*new, *old, *later, *near, too_short, new[0]], heldout_fraction=0.3, previous=second
    )
    assert _texts(second) | _texts(second, "heldout") == set(later) | _texts(first, "heldout")
    assert _texts(third) | _texts(third, "heldout") == set(new) | _texts(second, "heldout")
    assert not _texts(third) & _texts(third, "heldout")
    ledger = outcome.ledger
    dropped = {reason: amount["documents"] for reason, amount in ledger["documents"]["dropped"].items()}
    assert dropped == {
        "exact_duplicates/exact_duplicate": 1,
        "exact_duplicates/seen_before": 21,
        "near_duplicates/near_duplicate_of_seen": 2,
    }
    carried = len(_texts(second, "heldout"))
    assert carried
    assert ledger["carried"]["documents/heldout"]["documents"] == carried
    published = sum(part["documents"] for part in ledger["documents"]["published"].values())
    assert published == ledger["documents"]["steps"][-1]["kept"]["documents"] + carried
    assert outcome.metrics["curate/documents_new"] == 10
    assert outcome.metrics["curate/bytes_new"] == sum(len(text) for text in _texts(third))


def test_a_chain_of_copies_of_seen_text_goes_as_a_whole_and_planted_documents_are_nobodys_copies(
    tmp_path: Path,
) -> None:
    settings = {"planted": 2, "heldout_fraction": 0.0, "toxicity": "classifier"}
    old = [_prose(number, 14) for number in range(6)]
    _, first = _increment(tmp_path, "first", old, **settings)
    outcome, _ = _increment(
        tmp_path,
        "second",
        [_prose(100), _prose(101), *(text + " So it was." for text in old)],
        previous=first,
        **settings,
    )
    assert outcome.ledger["documents"]["dropped"]["near_duplicates/near_duplicate_of_seen"]["documents"] == 6
    assert outcome.metrics["curate/documents_new"] == 2
    for kind, entry in outcome.ledger["planted"].items():
        if kind != "near_duplicate":
            assert entry["found"] == 2, kind


def test_nothing_new_is_no_failure_and_a_capped_document_may_come_again(tmp_path: Path) -> None:
    texts = [_prose(number, 12) for number in range(10)]
    size = sum(map(len, texts))
    _, first = _increment(tmp_path, "first", texts, max_bytes=size // 2, heldout_fraction=0.0)
    outcome, second = _increment(tmp_path, "second", texts, previous=first, heldout_fraction=0.0)
    assert _texts(second) == set(texts) - _texts(first)
    assert _texts(second)
    outcome, third = _increment(tmp_path, "third", texts, previous=second, heldout_fraction=0.0)
    assert outcome.metrics["curate/bytes_new"] == outcome.metrics["curate/pairs_new"] == 0
    assert _texts(third) == set()


def test_pairs_are_taken_over_and_only_new_ones_added(tmp_path: Path) -> None:
    def pairs(numbers: range) -> dict[str, Any]:
        instructions = [{"instruction": f"Name {n}.", "response": f"{n}, jane.doe@example.com."} for n in numbers]
        preferences = [{"prompt": f"Name {n}.", "chosen": f"{n}", "rejected": "None."} for n in numbers]
        return {
            "instructions": (_write_jsonl(tmp_path / f"i{numbers.stop}.jsonl", instructions),),
            "preferences": (_write_jsonl(tmp_path / f"p{numbers.stop}.jsonl", preferences),),
            "heldout_fraction": 0.2,
        }

    _, first = _increment(tmp_path, "first", [_prose(n) for n in range(10)], **pairs(range(20)))
    outcome, second = _increment(tmp_path, "second", [_prose(50)], previous=first, **pairs(range(25)))
    for name in ("instructions", "preferences"):
        before, after = (
            [_rows(out / name / f"{split}.jsonl.gz") for split in ("train", "heldout")] for out in (first, second)
        )
        assert [rows[: len(old)] for rows, old in zip(after, before, strict=True)] == before
        assert sum(map(len, after)) == 25
        steps = {step["step"]: step["dropped"] for step in outcome.ledger[name]["steps"]}
        assert steps["duplicates"]["seen_before"]["documents"] == 20
    assert outcome.metrics["curate/pairs_new"] == 10
    # Without sources of its own the increment still has pairs to train on.
    outcome, third = _increment(
        tmp_path, "third", [_prose(60)], previous=second, instructions=("derived",), preferences=("derived",)
    )
    assert _digests(third)["preferences/train.jsonl.gz"] == _digests(second)["preferences/train.jsonl.gz"]
    assert outcome.metrics["curate/pairs_new"] == 0


def test_signatures_that_do_not_compare_are_refused(tmp_path: Path) -> None:
    _, first = _increment(tmp_path, "first", [_prose(n) for n in range(5)])
    with pytest.raises(ConfigError, match=r"curate\.minhash_ngram=3, but previous_data was made with 5"):
        _increment(tmp_path, "second", [_prose(9)], previous=first, minhash_ngram=3)
    (first / "index" / "settings.json").unlink()
    with pytest.raises(ConfigError, match="has no index"):
        _increment(tmp_path, "third", [_prose(9)], previous=first)


def test_the_index_does_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    texts = [_prose(number, 12) for number in range(8)]
    digests = []
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        folder.mkdir()
        _, first = _increment(folder, "first", texts[:4], workers=workers)
        _, second = _increment(folder, "second", texts, workers=workers, previous=first)
        digests.append({name: value for name, value in _digests(second).items() if name.startswith("index/")})
    assert digests[0] == digests[1]
    assert len(digests[0]) == 16


def test_a_cap_is_shared_equally_so_that_a_large_source_does_not_crowd_out_a_small_one(tmp_path: Path) -> None:
    sources = [
        _write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": f"{name} {n}?", "response": "yes"} for n in range(count)])
        for name, count in (("large", 300), ("middle", 60), ("small", 10))
    ]
    documents = _write_jsonl(tmp_path / "text.jsonl", [{"text": _prose(seed)} for seed in range(8)])
    outcome, output = _run(
        tmp_path,
        documents=[documents],
        instructions=sources,
        preferences=[],
        max_instructions=120,
        heldout_fraction=0.0,
        planted=0,
        toxicity="none",
    )
    counts = Counter(Path(row["group"]).stem for row in _rows(output / "instructions" / "train.jsonl.gz"))
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
