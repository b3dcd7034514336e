"""From the addresses of `evaluate.benchmarks` to suites that can measure a model."""

from collections.abc import Callable, Iterable
from pathlib import Path

from stages.config.benchmarks import Benchmark, BenchmarkFormat, BuiltIn
from stages.config.closing import EvaluateConfig
from stages.config.errors import ConfigError
from stages.data.sources.benchmarks import benchmark_rows
from stages.job.context import StageContext
from stages.judge.benchmarks.answers import answer_suites
from stages.judge.benchmarks.choices import choice_suites
from stages.judge.benchmarks.continuation import continuation_suites
from stages.judge.benchmarks.facets import Facet, Unavailable, silent
from stages.judge.benchmarks.heldout import NUM_OPTIONS, heldout_items
from stages.judge.benchmarks.heldout_rows import NO_DATA, heldout_rows
from stages.judge.benchmarks.items import Items, evenly_spaced, read_items
from stages.judge.benchmarks.refusals import own_rows, refusal_suites
from stages.judge.benchmarks.toxicity import Toxicity
from stages.judge.builtin.sampled import Sampler
from stages.judge.suite import Suite


def benchmark_suites(config: EvaluateConfig, context: StageContext) -> list[Suite]:
    """Return the suites of all benchmarks but those that read sampled answers; raises ConfigError or DataError for one
    that cannot be read.

    A benchmark of the run's own data of which there is none becomes a suite without items, which says so.
    """
    return [suite for suite, _ in grouped_suites(config, context)]


def grouped_suites(
    config: EvaluateConfig, context: StageContext, sampler: Sampler | None = None, *, sampled: str = "answers"
) -> list[tuple[Suite, str]]:
    """As `benchmark_suites`, each with the group of those that share a pass over their items; with a sampler also those
    that read its answers, in the group `sampled`."""
    found: list[tuple[Suite, str]] = []
    beat = context.progress.watchdog.beat
    for benchmark in config.parsed_benchmarks:
        if benchmark.built_in is BuiltIn.TOXICITY:
            if sampler is not None and len(sampler):
                found.append((Toxicity(sampler, name=benchmark.suite), sampled))
            elif sampler is not None:
                found.append((Unavailable(benchmark.suite, "toxicity", "no_heldout_prompts", better="lower"), sampled))
            continue
        made = _suites_of(benchmark, context, beat)
        found += [(suite, benchmark.suite) for suite in made]
    _refuse_repeated(suite for suite, _ in found)
    return found


def _suites_of(benchmark: Benchmark, context: StageContext, beat: Callable[[], None]) -> list[Suite]:
    if benchmark.built_in in (BuiltIn.HELDOUT_CONTINUATION, BuiltIn.HELDOUT_QUESTION):
        return _of_heldout(benchmark, context, beat)
    return list(suites_from_outside(benchmark, context.work_dir / "tasks" / benchmark.suite, beat=beat))


def suites_from_outside(benchmark: Benchmark, scratch: Path, *, beat: Callable[[], None] = silent) -> list[Facet]:
    """The suites of rows or of a task of lm-evaluation-harness, which is copied to `scratch`; all items are read."""
    if benchmark.is_task:
        from stages.judge.benchmarks.harness import task_suites  # the harness takes seconds to import

        return task_suites(benchmark, scratch, beat=beat)
    return suites_of_rows(benchmark, beat=beat)


def suites_of_rows(benchmark: Benchmark, *, beat: Callable[[], None] = silent) -> list[Facet]:
    """The suites of a benchmark whose items are rows."""
    own = benchmark.built_in is BuiltIn.REFUSALS
    items = read_items(benchmark, own_rows() if own else benchmark_rows(benchmark.uri))
    if benchmark.rule and items.format is not BenchmarkFormat.ANSWERS:
        raise ConfigError(
            f"benchmarks: rule={benchmark.rule.value} of {benchmark.uri!r} judges responses, and its items are "
            f"{items.format.value}",
            advice="Leave the rule out, or name the format of items with answers: #format=answers.",
        )
    match items.format:
        case BenchmarkFormat.CHOICES | BenchmarkFormat.TRUTHFULQA:
            return choice_suites(benchmark.suite, items, chat=benchmark.chat, beat=beat)
        case BenchmarkFormat.CONTINUATION:
            return continuation_suites(benchmark.suite, items, chat=benchmark.chat, beat=beat)
        case BenchmarkFormat.ANSWERS:
            return answer_suites(benchmark.suite, items, benchmark, beat=beat)
        case BenchmarkFormat.REFUSALS:
            return refusal_suites(benchmark.suite, items, benchmark, beat=beat)


def _of_heldout(benchmark: Benchmark, context: StageContext, beat: Callable[[], None]) -> list[Suite]:
    kind = benchmark.built_in
    assert kind is not None
    rows = heldout_rows(context)
    if rows is None:
        return [Unavailable(benchmark.suite, "accuracy", NO_DATA, better="higher")]
    drawn = heldout_items(kind, *rows)
    if not drawn:
        what = "documents" if kind is BuiltIn.HELDOUT_CONTINUATION else "conversations"
        reason = f"fewer_than_{NUM_OPTIONS}_heldout_{what}"
        return [Unavailable(benchmark.suite, "accuracy", reason, better="higher")]
    items = Items(BenchmarkFormat.CHOICES, tuple(evenly_spaced(drawn, benchmark.limit)), {})
    # The raw suite would be the same: all options of an item have the same text.
    chat = benchmark.chat or kind is BuiltIn.HELDOUT_QUESTION
    return list(choice_suites(benchmark.suite, items, chat=chat, beat=beat)[:1])


def _refuse_repeated(suites: Iterable[Suite]) -> None:
    names = [suite.name for suite in suites]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(
            f"benchmarks: {', '.join(repeated)} would be the name of more than one suite",
            advice="Give one of the benchmarks another name: #name=...",
        )
