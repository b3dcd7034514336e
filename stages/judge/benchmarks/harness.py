"""lm-evaluation-harness runs its tasks on our models, as a library; what each item got becomes a score.

Requests, few-shot examples, filters and metrics are the harness's. Tokens and forward passes are ours: nothing is
truncated, an item that does not fit is counted and left out.
"""

import json
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stages.config.benchmarks import Benchmark
from stages.config.errors import ConfigError, StageError
from stages.data.sources.benchmarks import harness_version
from stages.judge.benchmarks.facets import Facet, Shared, Tally, all_skipped, digest_of, silent
from stages.judge.benchmarks.harness_tasks import load_tasks
from stages.judge.benchmarks.items import evenly_spaced
from stages.judge.failures import is_of_the_machine
from stages.judge.suite import Better, Measurement, Subject

logger = logging.getLogger(__name__)

_FEWSHOT_SEED = 1234
"""Of the harness's command line."""
_BITS, _LOGLIKELIHOOD = "bits_per_byte", "loglikelihood"
_BY_CHOICE = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")
_KNOWN_KWARGS = frozenset(
    ("until", "do_sample", "temperature", "max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
)


@dataclass(frozen=True)
class _Column:
    """One metric of a task under one filter, item by item."""

    metric: str
    """As the harness calls it."""
    filter: str
    label: str
    """What the mean of the values is."""
    better: Better
    value: Callable[[Any], float]
    """From what the harness has for an item to a number."""

    @property
    def key(self) -> str:
        return f"{self.metric},{self.filter}"


@dataclass(frozen=True)
class TaskPass:
    """One task, run as the harness's command line runs it."""

    task: Any
    columns: tuple[_Column, ...]
    indices: tuple[int, ...]
    """Of the documents that are asked; all of them in order, unless there is a limit."""
    num_documents: int
    chat: bool
    beat: Callable[[], None] = silent

    def run(self, subject: Subject) -> dict[str, Measurement]:
        """A task's own templates, filters and functions may raise anything, and for one document in a thousand: then
        its suites are counted as failed, and asked again by the next evaluation."""
        try:
            return self._run(subject)
        except Exception as error:
            if is_of_the_machine(error):
                raise
            logger.exception("task %s failed on %s", self.task.task_name, subject.role)
            reason = f"task_failed_{type(error).__name__}"
            return all_skipped((column.key for column in self.columns), reason, len(self.indices), is_final=False)

    def _run(self, subject: Subject) -> dict[str, Measurement]:
        from lm_eval.evaluator import evaluate  # pyright: ignore[reportMissingImports]

        from stages.judge.benchmarks.harness_model import HarnessModel

        name = self.task.task_name
        model = HarnessModel(subject, chat=self.chat, beat=self.beat)
        # The harness's own means are not read, and one value that is no number would end all of them.
        self.task.aggregation = lambda: defaultdict(lambda: lambda values: 0.0)
        self.task.set_fewshot_seed(seed=_FEWSHOT_SEED)  # each model sees the same examples
        whole = len(self.indices) == self.num_documents
        results: Any = evaluate(
            lm=model,
            task_dict={"tasks": {name: self.task}},
            samples=None if whole else {name: list(self.indices)},
            bootstrap_iters=0,
            apply_chat_template=self.chat,
            fewshot_as_multiturn=True,
        )
        tallies = {column.key: Tally() for column in self.columns}
        by_filter: dict[str, dict[int, dict[str, Any]]] = {}
        for found in results["samples"][name]:
            by_filter.setdefault(found["filter"], {})[found["doc_id"]] = found
        # Requests know a document by its position among those that were asked.
        skipped = {self.indices[position]: reason for (_, position), reason in model.skipped.items()}
        for column in self.columns:
            for index in self.indices:
                self._add(tallies[column.key], column, index, by_filter.get(column.filter, {}).get(index), skipped)
        return {key: tally.result for key, tally in tallies.items()}

    def _add(
        self, tally: Tally, column: _Column, index: int, found: dict[str, Any] | None, skipped: dict[int, str]
    ) -> None:
        if index in skipped:
            tally.skip(skipped[index])
        elif found is None or column.metric not in found:
            tally.skip("no_value")
        else:
            written = self.task.OUTPUT_TYPE == "generate_until"
            response = str(found["resps"][0][0]) if written else ""
            try:
                value = column.value(found[column.metric])
            except (TypeError, ValueError, LookupError, ArithmeticError) as error:
                logger.warning(
                    "task %s, document %d: %s=%.80r is no number: %s",
                    self.task.task_name,
                    index,
                    column.metric,
                    found[column.metric],
                    error,
                )
                tally.skip("value_is_no_number")
                return
            tally.add(str(index), value, response=response)


def task_suites(benchmark: Benchmark, into: Path, *, beat: Callable[[], None] = silent) -> list[Facet]:
    """The suites of a task or of all tasks of a group: one per metric that there is item by item."""
    tasks = load_tasks(benchmark, into)
    alone = len(tasks) == 1
    suites: list[Facet] = []
    for task in tasks:
        name = benchmark.name if benchmark.name and alone else task.task_name
        try:
            suites += _suites_of(task, name.replace("::", "-"), benchmark, beat)
        except Exception as error:
            if isinstance(error, StageError) or is_of_the_machine(error):
                raise
            raise ConfigError(
                f"benchmarks: the documents of task {task.task_name!r} of {benchmark.uri!r} cannot be read as its file "
                f"says: {type(error).__name__}: {error}",
                advice="Try it with the harness's own command line; docs/BENCHMARKS.md says what task files may use.",
            ) from error
    return suites


def _suites_of(task: Any, name: str, benchmark: Benchmark, beat: Callable[[], None]) -> list[Facet]:
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    _refuse_unknown_generation(task)
    documents = task.eval_docs
    columns = _columns(task)
    if benchmark.metric:
        columns = [column for column in columns if column.metric == benchmark.metric]
    if not columns:
        wanted = f"metric={benchmark.metric!r}" if benchmark.metric else "metric of single items"
        raise ConfigError(
            f"benchmarks: task {task.task_name!r} has no {wanted}; it has {', '.join(map(str, task.aggregation()))}",
            advice="Name one that is a mean over items, such as acc or exact_match, by #metric=.",
        )
    indices = tuple(evenly_spaced(range(len(documents)), benchmark.limit))
    told = [harness_version(), benchmark.chat, list(indices), _told(task, documents)]
    shared = Shared(TaskPass(task, tuple(columns), indices, len(documents), benchmark.chat, beat))
    chance = _chance(task, documents, indices)
    return [
        Facet(
            name=name if not place else "-".join(filter(None, (name, column.metric, _short(column.filter)))),
            metric=column.label,
            better=column.better,
            chance=chance if column.metric in _BY_CHOICE else None,
            digest=digest_of("lm-eval", column.key, *told),
            items=len(indices),
            facet=column.key,
            shared=shared,
        )
        for place, column in enumerate(columns)
    ]


def _columns(task: Any) -> list[_Column]:
    """Metrics of which every item has a number; the others, such as F1 over all items, are named in the log."""
    found, left_out = [], []
    higher = task.higher_is_better() or {}
    for metric, aggregate in task.aggregation().items():
        how = getattr(aggregate, "__name__", "")
        # One element of a pipeline each: the harness computes all metrics under every filter.
        for pipeline in task._filters:
            name = pipeline.name
            if metric == _BITS:
                found.append(_Column(metric, name, _BITS, "lower", lambda pair: -pair[0] / math.log(2) / pair[1]))
            elif metric == "perplexity" and how == "perplexity":
                found.append(_Column(metric, name, _LOGLIKELIHOOD, "higher", float))
            elif how in ("mean", "nanmean"):
                better: Better = {True: "higher", False: "lower"}.get(higher.get(metric), "")  # type: ignore[arg-type]
                found.append(_Column(metric, name, metric, better, float))
            else:
                left_out.append(f"{metric} ({how})")
    if left_out:
        logger.info("task %s: no value by item, so not measured: %s", task.task_name, ", ".join(sorted(set(left_out))))
    return found


def _short(name: str) -> str:
    return "" if name == "none" else name


def _chance(task: Any, documents: Any, indices: Sequence[int]) -> float | None:
    """What guessing gives: the mean share of right options."""
    if task.OUTPUT_TYPE != "multiple_choice" or getattr(task, "multiple_input", 0):
        return None
    shares = []
    for index in indices:
        document = documents[index]
        gold = task.doc_to_target(document)
        shares.append((len(gold) if isinstance(gold, list) else 1) / max(len(task.doc_to_choice(document)), 1))
    return float(np.mean(shares)) if shares else None


def _refuse_unknown_generation(task: Any) -> None:
    if task.OUTPUT_TYPE != "generate_until":
        return
    given = task.get_config("generation_kwargs") or {}
    unknown = sorted(set(given) - _KNOWN_KWARGS)
    if unknown and given.get("do_sample"):
        raise ConfigError(
            f"benchmarks: task {task.task_name!r} samples with {', '.join(unknown)} (generation_kwargs), which is not "
            "known here",
            advice=f"Known are {', '.join(sorted(_KNOWN_KWARGS))}; set do_sample to false for greedy responses.",
        )


def _told(task: Any, documents: Any) -> list[Any]:
    """All that decides what the task asks and how it judges: its settings, with the source of functions, and its
    documents."""
    settings = {key: value for key, value in task.dump_config().items() if key not in ("metadata", "custom_dataset")}
    examples = list(task.sampler.df) if hasattr(task, "sampler") and task.get_config("num_fewshot") else []
    return [json.dumps(part, sort_keys=True, default=str) for part in (settings, list(documents), examples)]
