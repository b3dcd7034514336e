"""Measurements are kept: an evaluation that was killed continues, workers share the work, damage costs time only."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stages import evaluate
from stages.artifacts.lease import LeaseLostError
from stages.config.request import ArtifactRef
from stages.config.tokens import PLAIN
from stages.job.context import StageContext
from stages.judge.bench import measure_units, open_bench, share
from stages.judge.kept import Measurements
from stages.judge.scores import ScoreTable
from tests.judging import SMALL, TINY, World, evaluated, evaluation, make_world

FILES = ("metrics.json", "samples.json", "scores.parquet", "responses.parquet")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("run"))


@pytest.fixture
def fresh(world: World, tmp_path: Path) -> World:
    """The same run with a store of its own, where nothing was measured yet."""
    return World(tmp_path, world.inputs)


def kept_files(world: World) -> list[Path]:
    return sorted((world.home / "store" / "measurements").rglob("*.parquet"))


def published_files(context: StageContext) -> list[bytes]:
    return [(context.output_dir / name).read_bytes() for name in FILES]


def test_a_second_evaluation_measures_nothing_and_says_the_same(fresh: World) -> None:
    _, first = evaluated(fresh)
    before = published_files(evaluation(fresh))
    _, second = evaluated(fresh)
    assert published_files(evaluation(fresh)) == before
    # SFT and DPO are the same model here, so what is not relative to the start is measured for one of them.
    assert first.ledger["units"]["measured"] == len(kept_files(fresh))
    assert second.ledger["units"] == {"measured": 0, "kept": sum(first.ledger["units"].values())}


def test_an_evaluation_that_was_killed_continues_with_what_is_missing(fresh: World) -> None:
    evaluated(fresh)
    before = published_files(evaluation(fresh))
    for path in kept_files(fresh)[::2]:
        path.unlink()
    left = len(kept_files(fresh))
    _, outcome = evaluated(fresh)
    assert outcome.ledger["units"]["measured"] == len(kept_files(fresh)) - left > 0
    assert published_files(evaluation(fresh)) == before


@pytest.mark.parametrize("damage", [b"", b"PAR1 no parquet", None])
def test_a_damaged_measurement_is_named_and_measured_again(
    fresh: World, damage: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    evaluated(fresh)
    before = published_files(evaluation(fresh))
    first, second, *_ = kept_files(fresh)
    first.write_bytes(second.read_bytes() if damage is None else damage)  # of another suite, or of none
    _, outcome = evaluated(fresh)
    assert outcome.ledger["units"]["measured"] == 1
    assert first.name in caplog.text
    assert published_files(evaluation(fresh)) == before


def test_other_settings_are_measured_again(fresh: World) -> None:
    evaluated(fresh)
    _, outcome = evaluated(fresh, SMALL.model_copy(update={"temperature": 0.5}))
    # The sampled answers changed, and with them length, repetition, score and KL; the greedy ones did not.
    assert outcome.ledger["units"]["measured"] == 4


def test_two_workers_find_what_one_finds(fresh: World, tmp_path: Path) -> None:
    context = evaluation(fresh)
    second = open_bench(context)
    shared = measure_units(second, context, rank=1, world_size=2)
    first = open_bench(context)
    both = measure_units(first, context, rank=0, world_size=2)
    alone_context = evaluation(World(tmp_path / "alone", fresh.inputs))
    alone = measure_units(open_bench(alone_context), alone_context, rank=0, world_size=1)
    assert 0 < len(shared) < len(both)
    assert both.keys() == alone.keys()
    assert all(both[key].scores == alone[key].scores for key in both)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 50])
def test_every_unit_is_one_workers(fresh: World, world_size: int) -> None:
    units = open_bench(evaluation(fresh)).units
    shares = [share(units, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert sorted(unit.key for part in shares for unit in part) == sorted(unit.key for unit in units)
    for part in shares:  # what shares sampled answers stays together
        groups = {(unit.role, unit.group) for unit in part}
        assert all(unit in part for unit in units if (unit.role, unit.group) in groups)


def test_who_lost_the_lease_keeps_nothing(fresh: World) -> None:
    def lost() -> None:
        raise LeaseLostError("another process builds it")

    context = evaluation(fresh)
    bench = open_bench(context)
    unit = bench.units[0]
    subject = bench.subjects.open(unit.role)
    with pytest.raises(LeaseLostError):
        Measurements(context.store, lost).write(subject.identity, unit.suite, unit.suite.measure(subject))
    assert kept_files(fresh) == []


def test_the_result_of_a_champion_is_found_by_the_run_that_measures_it_again(fresh: World) -> None:
    evaluated(fresh)
    champion: ArtifactRef = fresh.inputs["dpo"]
    report, outcome = evaluated(fresh, champion=champion)
    assert outcome.ledger["units"]["measured"] == 0
    assert report["models"]["champion"]["eval/loss"] == report["models"]["dpo"]["eval/loss"]


def test_a_model_that_reads_another_chat_template_is_another_one(fresh: World, tmp_path: Path) -> None:
    """A given model whose run sets `tokenize.chat_template` is the same files, and says something else."""
    plain = make_world(tmp_path / "plain", TINY.model_copy(update={"chat_template": PLAIN}))
    ours = open_bench(evaluation(fresh)).subjects
    theirs = open_bench(evaluation(World(fresh.home, {**fresh.inputs, "tokens": plain.inputs["tokens"]}))).subjects
    assert ours.identity("sft") != theirs.identity("sft")
    assert ours.identity("sft") == ours.identity("dpo")


def test_nothing_published_is_null_or_no_number(fresh: World) -> None:
    context = evaluation(fresh)
    evaluate.measure_models(context)

    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is not JSON")

    for name in ("metrics.json", "samples.json"):
        found = json.loads((context.output_dir / name).read_text(), parse_constant=refuse)
        assert {path.rpartition("/")[2] for path in nulls(found)} <= MAY_BE_NULL, list(nulls(found))
    assert list(nulls({"a": [{"b": None}], "chance": 1})) == ["/a/0/b"]


def test_every_number_of_a_model_has_the_scores_that_it_is_made_of(fresh: World) -> None:
    report, outcome = evaluated(fresh)
    table = ScoreTable(evaluation(fresh).output_dir / "scores.parquet")
    margins = table.column("preference_margins", "dpo").values
    assert outcome.metrics["dpo/eval/preference_margin"] == pytest.approx(float(margins.mean()))
    assert outcome.metrics["reward/margin"] == pytest.approx(
        float(table.column("reward_margins", "reward").values.mean())
    )
    assert len(table.column("rows", "sft").values) > 0
    assert not {"rows", "preference_margins", "reward_margins", "shown"} & report["suites"].keys()


MAY_BE_NULL = {"chance", "needed_items"}
"""Of suites where guessing gives nothing, and of comparisons where there is nothing to find: docs/EVALUATION.md."""


def nulls(value: Any, path: str = "") -> Iterator[str]:
    match value:
        case None:
            yield path
        case dict():
            for key, one in value.items():
                yield from nulls(one, f"{path}/{key}")
        case list():
            for place, one in enumerate(value):
                yield from nulls(one, f"{path}/{place}")
