"""Long benchmarks are measured in shards: a kill costs one of them, workers share them, and the scores are the same."""

import json
from pathlib import Path

import pytest

from stages.config.closing import EvaluateConfig
from stages.judge.bench import Bench, measure_units, open_bench, pieces, share
from stages.judge.benchmarks import facets
from stages.judge.benchmarks.choices import ChoicePass
from stages.judge.suite import Measurement, Subject
from tests.judging import SMALL, World, evaluated, evaluation, make_world

ITEMS, SHARD = 8, 3
SHARDS = 3


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("run"))


@pytest.fixture
def fresh(world: World, tmp_path: Path) -> World:
    return World(tmp_path / "fresh", world.inputs)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EvaluateConfig:
    monkeypatch.setattr(facets, "SHARD", SHARD)
    rows = [{"query": f"array {n}", "choices": ["sort " * n, "queue", "a tree"], "gold": n % 3} for n in range(1, 9)]
    path = tmp_path / "known.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SMALL.model_copy(update={"benchmarks": (str(path),)})


def of_benchmark(bench: Bench) -> list[str]:
    return [
        unit.suite.name for unit in pieces(bench.units) if unit.role == "sft" and unit.suite.name.startswith("known")
    ]


def test_the_shards_of_suites_that_share_a_pass_are_one_workers(fresh: World, config: EvaluateConfig) -> None:
    bench = open_bench(evaluation(fresh, config))
    expected = [f"{name}/{number}" for number in range(SHARDS) for name in ("known", "known-raw")]
    assert of_benchmark(bench) == expected
    shares = [share(pieces(bench.units), rank=rank, world_size=50) for rank in range(50)]
    found = [{unit.suite.name for unit in mine if unit.role == "sft"} & set(expected) for mine in shares]
    assert sum(bool(names) for names in found) > 1
    assert all({"known/1", "known-raw/1"} <= names or not names & {"known/1", "known-raw/1"} for names in found)


def test_the_scores_are_those_of_the_whole(
    fresh: World, config: EvaluateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, _ = evaluated(fresh, config)
    monkeypatch.setattr(facets, "SHARD", ITEMS)
    whole, _ = evaluated(World(fresh.home / "whole", fresh.inputs), config)
    assert not [unit for unit in open_bench(evaluation(fresh, config)).units if getattr(unit.suite, "shards", ())]
    for name in ("known", "known-raw"):
        assert report["suites"][name] == whole["suites"][name]
        assert report["suites"][name]["roles"]["sft"]["items"] == ITEMS


def test_a_kill_costs_one_shard(fresh: World, config: EvaluateConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    run, ran = ChoicePass.run, []

    def killed_in_the_third(self: ChoicePass, subject: Subject) -> dict[str, Measurement]:
        if len(ran) == SHARDS - 1:
            raise KeyboardInterrupt
        ran.append(self.items)
        return run(self, subject)

    monkeypatch.setattr(ChoicePass, "run", killed_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        evaluated(fresh, config)
    monkeypatch.setattr(ChoicePass, "run", lambda self, subject: ran.append(self.items) or run(self, subject))
    report, _ = evaluated(fresh, config)
    # SFT and DPO are one model here, so each shard is run once.
    assert [len(items) for items in ran] == [SHARD, SHARD, ITEMS - 2 * SHARD]
    alone, _ = evaluated(World(fresh.home / "alone", fresh.inputs), config)
    assert report["suites"] == alone["suites"]


def test_a_shard_that_cannot_be_measured_costs_its_suite(
    fresh: World, config: EvaluateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ChoicePass.run

    def broken(self: ChoicePass, subject: Subject) -> dict[str, Measurement]:
        if len(self.items) < SHARD:
            raise ValueError("the last one is broken")
        return run(self, subject)

    monkeypatch.setattr(ChoicePass, "run", broken)
    report, _ = evaluated(fresh, config)
    assert report["left_out"]["suite known of sft"] == "ValueError: the last one is broken"
    assert not [name for name in report["left_out"] if "/" in name]
    assert "known" not in report["suites"]
    assert "language" in report["suites"]


def test_workers_share_the_shards(fresh: World, config: EvaluateConfig) -> None:
    context = evaluation(fresh, config)
    second, first = open_bench(context), open_bench(context)
    measure_units(second, context, rank=1, world_size=2)
    both = measure_units(first, context, rank=0, world_size=2)
    context = evaluation(World(fresh.home / "alone", fresh.inputs), config)
    alone = measure_units(open_bench(context), context, rank=0, world_size=1)
    assert both.keys() == alone.keys()
    assert all(both[key].scores == alone[key].scores for key in both)
    assert not [name for _, name in both if name.startswith("known/")]
