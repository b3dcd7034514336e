"""From the addresses of `evaluate.benchmarks` to suites that can measure a model."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from stages.config.benchmarks import TAKEN, Benchmark, BenchmarkFormat, BuiltIn
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
from stages.judge.failures import costs_its_suite, reason_of
from stages.judge.pairwise import Judge
from stages.judge.suite import Suite

logger = logging.getLogger(__name__)

_NO_JUDGE = "Give the run a judge (field `judge` of the form), or leave judge=true out: then phrases tell."


@dataclass
class MadeSuites:
    """What the benchmarks of an evaluation became."""

    suites: list[tuple[Suite, str]] = field(default_factory=list)
    """Each with the group of those that share a pass over their items."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Benchmarks and suites that cannot be measured, each with the reason."""


def grouped_suites(
    config: EvaluateConfig,
    context: StageContext,
    sampler: Sampler | None = None,
    *,
    sampled: str = "answers",
    judge: Judge | None = None,
) -> MadeSuites:
    """Make the suites of all benchmarks; with a sampler also those that read its answers, in the group `sampled`.
    `judge` says which responses decline, for benchmarks with `judge=true`.

    A benchmark of the run's own data of which there is none becomes a suite without items, which says so. One that
    cannot be read any more is left out: the look read it before hours of training, and they must not be lost over it.
    """
    made = MadeSuites()
    beat = context.progress.watchdog.beat
    for benchmark in config.parsed_benchmarks:
        reads_answers = benchmark.built_in is BuiltIn.TOXICITY
        if reads_answers and sampler is None:
            continue
        try:
            found = _suites_of(benchmark, context, sampler, judge, beat)
        except Exception as error:
            if not costs_its_suite(error):
                raise
            logger.exception("benchmark %s is left out", benchmark.uri)
            made.left_out[f"benchmark {benchmark.uri}"] = reason_of(error)
            continue
        known = {suite.name for suite, _ in made.suites}
        for suite in found:
            if why := _why_no_name(suite.name, known):
                made.left_out[f"suite {suite.name} of {benchmark.uri}"] = why
            else:
                made.suites.append((suite, sampled if reads_answers else benchmark.suite))
                known.add(suite.name)
    return made


def require_own_names(suites: Iterable[tuple[str, str]]) -> None:
    """Raise ConfigError unless every suite has a name of its own; `suites` are addresses and names."""
    known: set[str] = set()
    for uri, name in suites:
        if why := _why_no_name(name, known):
            raise ConfigError(
                f"benchmarks: {uri!r} makes a suite {name!r}, and {why}",
                advice="Give the benchmark another name, #name=..., or its task file another `task:`.",
            )
        known.add(name)


def require_judge(benchmarks: Iterable[Benchmark], *, has_judge: bool) -> None:
    """Raise ConfigError for a benchmark that asks the judge of a run without one."""
    for benchmark in benchmarks:
        if benchmark.judge and not has_judge:
            raise ConfigError(
                f"benchmarks: {benchmark.uri!r} has judge=true, and the run has no judge", advice=_NO_JUDGE
            )


def _why_no_name(name: str, known: set[str]) -> str:
    if name in TAKEN:
        return "every evaluation has a suite of that name"
    return "another benchmark makes a suite of that name" if name in known else ""


def _suites_of(
    benchmark: Benchmark,
    context: StageContext,
    sampler: Sampler | None,
    judge: Judge | None,
    beat: Callable[[], None],
) -> list[Suite]:
    require_judge([benchmark], has_judge=judge is not None)
    if benchmark.built_in is BuiltIn.TOXICITY:
        if sampler is None or not len(sampler):
            return [Unavailable(benchmark.suite, "toxicity", "no_heldout_prompts", better="lower")]
        return [Toxicity(sampler, name=benchmark.suite)]
    if benchmark.built_in in (BuiltIn.HELDOUT_CONTINUATION, BuiltIn.HELDOUT_QUESTION):
        return _of_heldout(benchmark, context, beat)
    return list(suites_from_outside(benchmark, context.work_dir / "tasks" / benchmark.suite, judge=judge, beat=beat))


def suites_from_outside(
    benchmark: Benchmark, scratch: Path, *, judge: Judge | None = None, beat: Callable[[], None] = silent
) -> list[Facet]:
    """The suites of rows or of a task of lm-evaluation-harness, which is copied to `scratch`; all items are read."""
    if benchmark.is_task:
        from stages.judge.benchmarks.harness import task_suites  # the harness takes seconds to import

        return task_suites(benchmark, scratch, beat=beat)
    return suites_of_rows(benchmark, judge=judge, beat=beat)


def suites_of_rows(
    benchmark: Benchmark, *, judge: Judge | None = None, beat: Callable[[], None] = silent
) -> list[Facet]:
    """The suites of a benchmark whose items are rows."""
    own = benchmark.built_in is BuiltIn.REFUSALS
    items = read_items(benchmark, own_rows() if own else benchmark_rows(benchmark.uri))
    if benchmark.rule and items.format is not BenchmarkFormat.ANSWERS:
        raise ConfigError(
            f"benchmarks: rule={benchmark.rule.value} of {benchmark.uri!r} judges responses, and its items are "
            f"{items.format.value}",
            advice="Leave the rule out, or name the format of items with answers: #format=answers.",
        )
    if benchmark.judge and items.format is not BenchmarkFormat.REFUSALS:
        raise ConfigError(
            f"benchmarks: judge=true of {benchmark.uri!r} is for refusals, and its items are {items.format.value}",
            advice="Leave judge out, or name the format of items with prompt and harmful: #format=refusals.",
        )
    match items.format:
        case BenchmarkFormat.CHOICES | BenchmarkFormat.TRUTHFULQA:
            return choice_suites(benchmark.suite, items, chat=benchmark.chat, beat=beat)
        case BenchmarkFormat.CONTINUATION:
            return continuation_suites(benchmark.suite, items, chat=benchmark.chat, beat=beat)
        case BenchmarkFormat.ANSWERS:
            return answer_suites(benchmark.suite, items, benchmark, beat=beat)
        case BenchmarkFormat.REFUSALS:
            asked = judge if benchmark.judge else None
            return refusal_suites(benchmark.suite, items, benchmark, judge=asked, beat=beat)


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
