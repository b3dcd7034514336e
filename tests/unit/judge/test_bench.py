"""What one suite, one model or one worker can cost: never the evaluation, and never for ever."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stages import evaluate
from stages.config.errors import DataError, StageError
from stages.data.sources.benchmarks import identify_benchmark
from stages.data.tokens.views import TokensArtifact
from stages.judge import bench as benches
from stages.judge.bench import Bench, measure_units, open_bench
from stages.judge.builtin.replies import Pairs, Responses
from stages.judge.heldout import Skipped
from stages.judge.suite import Measurement, Subject
from tests.judging import SMALL, World, evaluated, evaluation, make_world, published_copy

CHOICE = {"query": "The function sort_array will", "choices": ["count", "queue"], "gold": 1}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("run"))


@pytest.fixture
def fresh(world: World, tmp_path: Path) -> World:
    return World(tmp_path, world.inputs)


def benchmark_file(folder: Path, *rows: dict[str, Any]) -> str:
    path = folder / "b.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows or (CHOICE,)))
    return str(path)


def with_benchmarks(*addresses: str) -> Any:
    return SMALL.model_copy(update={"benchmarks": addresses})


def test_a_suite_that_raises_costs_itself_and_says_why(fresh: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Pairs, subject: Subject) -> Measurement:
        raise KeyError("no such column")

    monkeypatch.setattr(Pairs, "measure", broken)
    report, _ = evaluated(fresh)
    assert report["left_out"]["suite pairs of sft"] == "KeyError: 'no such column'"
    assert "pairs" not in report["suites"]
    assert report["suites"]["language"]["roles"].keys() == {"sft", "dpo"}


@pytest.mark.parametrize("error", [OSError("the disk does not answer"), MemoryError(), StageError("an outage")])
def test_what_a_retry_may_mend_ends_the_attempt(
    fresh: World, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def broken(self: Pairs, subject: Subject) -> Measurement:
        raise error

    monkeypatch.setattr(Pairs, "measure", broken)
    with pytest.raises(type(error)):
        evaluated(fresh)


def test_an_evaluation_that_measured_nothing_fails(fresh: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def complete(found: Measurement, unit: Any) -> Measurement:
        raise RuntimeError("everything is broken")

    monkeypatch.setattr(benches, "_complete", complete)
    with pytest.raises(StageError, match="no suite could be measured: RuntimeError: everything is broken"):
        evaluated(fresh)


def test_what_the_champion_breaks_costs_the_comparison_alone(fresh: World, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = Responses.measure

    def broken(self: Responses, subject: Subject) -> Measurement:
        if subject.role == "champion":
            raise MemoryError("its vocabulary is too large")
        return measure(self, subject)

    monkeypatch.setattr(Responses, "measure", broken)
    template = TokensArtifact(Path(fresh.inputs["tokens"].uri.removeprefix("file://"))).tokenizer_dir
    spelled = "{# the same #}" + (template / "chat_template.jinja").read_text(encoding="utf-8")
    champion = published_copy(fresh.home, fresh.inputs["sft"], chat_template__jinja=spelled)
    report, _ = evaluated(fresh, champion=champion)
    assert report["left_out"]["suite responses of champion"] == "MemoryError: its vocabulary is too large"
    assert report["suites"]["responses"]["roles"].keys() == {"sft", "dpo"}
    assert "champion" in report["suites"]["language"]["roles"]


def test_a_champion_that_raises_when_it_is_opened_is_missing(fresh: World, monkeypatch: pytest.MonkeyPatch) -> None:
    champion = published_copy(fresh.home, fresh.inputs["sft"], note__json="{}")
    context = evaluation(fresh, champion=champion)
    bench = open_bench(context)
    opened = bench.subjects.open

    def broken(role: str) -> Subject:
        if role == "champion":
            raise RuntimeError("its layers have other shapes")
        return opened(role)

    monkeypatch.setattr(bench.subjects, "open", broken)
    shutil.rmtree(fresh.home / "store" / "measurements", ignore_errors=True)
    monkeypatch.setattr(bench.subjects, "identity", lambda role: f"{role}-identity")
    measured = measure_units(bench, context, rank=0, world_size=1)
    assert bench.subjects.missing_champion == "RuntimeError: its layers have other shapes"
    assert {role for role, _ in measured} == {"sft", "dpo", "reward"}


def test_a_benchmark_that_is_gone_since_the_look_costs_its_suites(fresh: World, tmp_path: Path) -> None:
    address = benchmark_file(tmp_path)
    before = identify_benchmark(address)
    Path(address).unlink()
    assert identify_benchmark(address) != before
    report, _ = evaluated(fresh, with_benchmarks(address, "refusals#max_tokens=2"))
    assert "does not exist" in report["left_out"][f"benchmark {address}"]
    assert {"refusals", "over-refusals", "language"} <= report["suites"].keys()


def test_what_does_not_fit_the_context_is_counted_in_the_report(fresh: World, tmp_path: Path) -> None:
    long = "array " * 200
    address = benchmark_file(tmp_path, CHOICE, {**CHOICE, "query": long})
    report, _ = evaluated(fresh, with_benchmarks(address))
    result = report["suites"]["b"]["roles"]["sft"]
    assert (result["items"], result["skipped"]) == (1, {"longer_than_context": 1})
    address = benchmark_file(tmp_path, {**CHOICE, "query": long})
    report, _ = evaluated(fresh, with_benchmarks(address))
    assert report["suites"]["b"]["roles"]["sft"] == {"items": 0, "skipped": {"longer_than_context": 1}}
    told = "no model could be measured on any of its 1 items: longer_than_context"
    assert report["left_out"]["suite b"] == told


def test_two_suites_of_one_name_cost_the_second(fresh: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The look refuses them; this is for a task file that changed since."""
    from stages.judge.benchmarks import suites

    made = suites.suites_of_rows
    monkeypatch.setattr(
        suites, "suites_of_rows", lambda *all, **more: [replace(one, name="kl") for one in made(*all, **more)[:1]]
    )
    report, _ = evaluated(fresh, with_benchmarks(address := benchmark_file(tmp_path)))
    assert report["left_out"][f"suite kl of {address}"] == "every evaluation has a suite of that name"


def test_a_benchmark_with_another_name_is_not_measured_again(fresh: World, tmp_path: Path) -> None:
    address = benchmark_file(tmp_path)
    first, _ = evaluated(fresh, with_benchmarks(f"{address}#name=one"))
    second, outcome = evaluated(fresh, with_benchmarks(f"{address}#name=two"))
    assert outcome.ledger["units"]["measured"] == 0
    assert second["suites"]["two"] == first["suites"]["one"]


def without_heldout(bench: Bench) -> Bench:
    heldout = bench.heldout
    heldout.row_numbers = heldout.row_numbers[:0]
    heldout.documents, heldout.conversations, heldout.pairs, heldout.prompts = [], [], [], []
    return bench


def test_without_held_out_data_benchmarks_are_enough(
    fresh: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "open_bench", lambda context: without_heldout(open_bench(context)))
    with pytest.raises(DataError, match="there is nothing to evaluate on"):
        evaluated(fresh)
    heldout = without_heldout(open_bench(evaluation(fresh))).heldout
    assert set(heldout.left_out(has_benchmarks=True)) == {"documents", "responses", "preferences", "prompts"}
    assert open_bench(evaluation(fresh, with_benchmarks(benchmark_file(tmp_path)))).has_benchmarks
    assert not open_bench(evaluation(fresh, with_benchmarks("heldout-continuation"))).has_benchmarks


@pytest.mark.timeout(120)
def test_rank_0_measures_what_no_other_worker_knows(fresh: World) -> None:
    """As when the modules of rules are set on one machine alone, or the other computes in another number format."""
    context = evaluation(fresh)
    other = open_bench(context)
    other.units = [unit for unit in other.units if unit.suite.name not in ("pairs", "kl", "score")]
    measure_units(other, context, rank=1, world_size=2)
    first = open_bench(context)
    measured = measure_units(first, context, rank=0, world_size=2)
    assert measured.keys() == {unit.key for unit in first.units}


def test_what_another_worker_is_still_to_measure_is_waited_for(fresh: World, monkeypatch: pytest.MonkeyPatch) -> None:
    context = evaluation(fresh)
    waits = []

    def meanwhile(seconds: float) -> None:
        waits.append(seconds)
        measure_units(open_bench(context), context, rank=1, world_size=2)

    monkeypatch.setattr(benches.time, "sleep", meanwhile)
    bench = open_bench(context)
    measured = measure_units(bench, context, rank=0, world_size=2)
    assert len(waits) == 1
    assert bench.counts["kept"] > 0
    assert measured.keys() == {unit.key for unit in bench.units}


def test_what_is_longer_than_a_models_context_is_skipped_though_it_has_the_runs_tokenizer(world: World) -> None:
    bench = open_bench(evaluation(world))
    prompt, reply = bench.heldout.prompts[0], bench.heldout.conversations[0]
    subject = bench.subjects.open("sft")
    short = replace(subject, context_length=len(prompt.ids) + 3)
    assert bench.heldout.prompt_ids(prompt, short, max_response_length=3).tolist() == prompt.ids.tolist()
    with pytest.raises(Skipped, match="longer_than_context"):
        bench.heldout.prompt_ids(prompt, short, max_response_length=4)
    with pytest.raises(Skipped, match="longer_than_context"):
        bench.heldout.sequence(reply, replace(subject, context_length=len(reply.tokens.ids) - 1))
