"""The whole of curation on small real and made-up sources: what is published, what is counted, what is refused."""

import gzip
import hashlib
import json
import random
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from stages import curate
from stages.config.curate import CurateConfig
from stages.config.errors import ConfigError, DataError
from stages.context import StageOutcome

SHARED = Path(__file__).parents[3] / "shared" / "data"
_TINY = {"packages": ("click", "jinja2"), "heldout_packages": ("click",), "planted": 2}


def _run(tmp_path: Path, name: str = "out", workers: int = 1, **settings: Any) -> tuple[StageOutcome, Path]:
    output, work = tmp_path / name, tmp_path / f"{name}.work"
    output.mkdir()
    context = SimpleNamespace(
        config=CurateConfig.model_validate(settings),
        execution=SimpleNamespace(cpus_per_worker=workers),
        work_dir=work,
        output_dir=output,
        progress=lambda done, total, unit="", **numbers: None,
    )
    return curate.run(cast(Any, context)), output


def _rows(path: Path) -> list[dict[str, Any]]:
    files = sorted(path.glob("*.jsonl.gz")) if path.is_dir() else [path]
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
    plain = {"planted": 0, "toxicity": "none", "instructions": (), "preferences": ()}
    return _run(tmp_path, documents=(source,), **{**plain, **settings})


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
    assert steps["read"]["no_response"]["documents"] == 1
    assert steps["duplicates"]["duplicate"]["documents"] == 1
    assert outcome.ledger["preferences"]["steps"][0]["dropped"]["equal_sides"]["documents"] == 1
    rows = _rows(output / "instructions" / "train.jsonl.gz")
    assert sorted(row["messages"][1]["content"] for row in rows) == [f"It is {n}, <EMAIL>." for n in range(9)]
    assert len(_rows(output / "preferences" / "train.jsonl.gz")) == 9


def test_given_rows_of_which_none_is_left_are_an_error(tmp_path: Path) -> None:
    source = _write_jsonl(tmp_path / "i.jsonl", [{"instruction": "Silent."}])
    with pytest.raises(DataError, match=r"no row is left.*no_response"):
        _given(tmp_path, [{"text": _prose(number)} for number in range(5)], instructions=(source,))


@pytest.mark.skipif(not SHARED.exists(), reason="../shared/data is not there")
def test_novels_pass_as_books(tmp_path: Path) -> None:
    folder = tmp_path / "novels"
    folder.mkdir()
    with tarfile.open(SHARED / "corpus" / "novels.tar.gz") as archive:
        for member in [member for member in archive.getmembers() if "Chesterton" in member.name][:3]:
            file = archive.extractfile(member)
            assert file is not None
            chapters = file.read().decode("utf-8", "replace").replace("\r\n", "\n").split("\n\n")
            (folder / f"{Path(member.name).stem}.txt").write_text("\n\n".join(chapters[40:160]))
    outcome, _ = _run(
        tmp_path, documents=(str(folder),), profile="books", instructions=(), preferences=(), planted=0, toxicity="none"
    )
    assert outcome.metrics["curate/documents_kept"] == 3
