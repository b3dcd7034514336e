"""From the addresses of `evaluate.benchmarks` to suites that can measure a model."""

from collections.abc import Iterable
from pathlib import Path

from stages.artifacts.manifests import fetch, read_manifest
from stages.config.benchmarks import Benchmark, BenchmarkFormat, BuiltIn
from stages.config.closing import EvaluateConfig
from stages.config.errors import ConfigError, StageError
from stages.config.graph import GRAPH, Stage
from stages.data.sources.benchmarks import benchmark_rows
from stages.job.context import StageContext
from stages.judge.benchmarks.answers import answer_suites
from stages.judge.benchmarks.choices import choice_suites
from stages.judge.benchmarks.continuation import continuation_suites
from stages.judge.benchmarks.facets import Facet, Unavailable
from stages.judge.benchmarks.heldout import NUM_OPTIONS, heldout_items
from stages.judge.benchmarks.heldout_rows import HeldoutRows
from stages.judge.benchmarks.items import Items, evenly_spaced, read_items
from stages.judge.benchmarks.refusals import own_rows, refusal_suites
from stages.judge.benchmarks.responses import KINDS, response_suites
from stages.judge.suite import Suite


def benchmark_suites(config: EvaluateConfig, context: StageContext) -> list[Suite]:
    """Return the suites of all benchmarks, in their order; raises ConfigError or DataError for one that cannot be read.

    A benchmark of the run's own data of which there is none becomes a suite without items, which says so.
    """
    suites: list[Suite] = []
    for benchmark in config.parsed_benchmarks:
        if benchmark.built_in in KINDS:
            continue
        if benchmark.built_in in (BuiltIn.HELDOUT_CONTINUATION, BuiltIn.HELDOUT_QUESTION):
            suites += _of_heldout(benchmark, context)
        elif benchmark.is_task:
            from stages.judge.benchmarks.harness import task_suites  # the harness takes seconds to import

            suites += task_suites(benchmark, context.work_dir / "tasks" / benchmark.suite)
        else:
            suites += suites_of_rows(benchmark)
    suites += _of_responses(config, context)
    _refuse_repeated(suites)
    return suites


def suites_of_rows(benchmark: Benchmark) -> list[Facet]:
    """The suites of a benchmark whose items are rows."""
    own = benchmark.built_in is BuiltIn.REFUSALS
    items = read_items(benchmark, own_rows() if own else benchmark_rows(benchmark.uri))
    match items.format:
        case BenchmarkFormat.CHOICES | BenchmarkFormat.TRUTHFULQA:
            made = choice_suites(benchmark.suite, items, chat=benchmark.chat)
        case BenchmarkFormat.CONTINUATION:
            made = continuation_suites(benchmark.suite, items, chat=benchmark.chat)
        case BenchmarkFormat.ANSWERS:
            made = answer_suites(benchmark.suite, items, benchmark)
        case BenchmarkFormat.REFUSALS:
            made = refusal_suites(benchmark.suite, items, benchmark)
    if benchmark.rule and items.format is not BenchmarkFormat.ANSWERS:
        raise ConfigError(
            f"benchmarks: rule={benchmark.rule.value} of {benchmark.uri!r} judges responses, and its items are "
            f"{items.format.value}",
            advice="Leave the rule out, or name the format of items with answers: #format=answers.",
        )
    return made


def _of_heldout(benchmark: Benchmark, context: StageContext) -> list[Suite]:
    kind = benchmark.built_in
    assert kind is not None
    rows = heldout_rows(context)
    if isinstance(rows, str):
        return [Unavailable(benchmark.suite, "accuracy", rows, better="higher")]
    drawn = heldout_items(kind, rows.documents(), rows.conversations())
    if not drawn:
        what = "documents" if kind is BuiltIn.HELDOUT_CONTINUATION else "conversations"
        reason = f"fewer_than_{NUM_OPTIONS}_heldout_{what}"
        return [Unavailable(benchmark.suite, "accuracy", reason, better="higher")]
    items = Items(BenchmarkFormat.CHOICES, tuple(evenly_spaced(drawn, benchmark.limit)), {})
    # The raw suite would be the same: all options of an item have the same text.
    chat = benchmark.chat or kind is BuiltIn.HELDOUT_QUESTION
    return list(choice_suites(benchmark.suite, items, chat=chat)[:1])


def _of_responses(config: EvaluateConfig, context: StageContext) -> list[Suite]:
    """Those that share their responses, together."""
    chosen = [
        (made.built_in, made)
        for made in config.parsed_benchmarks
        if made.built_in in KINDS and made.built_in is not None
    ]
    if not chosen:
        return []
    rows = heldout_rows(context)
    found = [] if isinstance(rows, str) else [one for one in rows.conversations() if not one.has_tools]
    if not found:
        reason = rows if isinstance(rows, str) else "no_heldout_conversations"
        return [Unavailable(made.suite, KINDS[kind][0], reason, better=KINDS[kind][1]) for kind, made in chosen]
    limit = min((made.limit for _, made in chosen if made.limit), default=config.max_prompts)
    prompts = evenly_spaced(found, min(limit, config.max_prompts))
    return list(response_suites([(kind, made.suite) for kind, made in chosen], prompts, config))


def heldout_rows(context: StageContext) -> HeldoutRows | str:
    """The curated data behind this evaluation, or the reason why there is none.

    A model that is measured again outside its run comes with tokens alone; their manifest says which data they are of.
    """
    role = GRAPH[Stage.CURATE].role
    if role in context.inputs:
        return HeldoutRows(context.input_dir(role))
    try:
        entries = read_manifest(context.inputs[GRAPH[Stage.TOKENIZE].role]).inputs
        curated = next(entry.ref() for entry in entries if entry.kind == GRAPH[Stage.CURATE].kind)
        return HeldoutRows(fetch(curated, _cache(context)))
    except (StageError, StopIteration, KeyError):
        return "no_curated_data"


def _cache(context: StageContext) -> Path:
    return context.work_dir.parent / "cache"


def _refuse_repeated(suites: Iterable[Suite]) -> None:
    names = [suite.name for suite in suites]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(
            f"benchmarks: {', '.join(repeated)} would be the name of more than one suite",
            advice="Give one of the benchmarks another name: #name=...",
        )
