"""Every model of the run, and the champion, on the same held-out items: language, responses, preferences, scores.

Scores of the run's own reward model, or the given one, say how well a model pleases it, not how good it is; what that
cost shows next to them. A run without a reward model has neither scores nor win rates. How a model is measured is in
`stages/judge`, what is shown of it in `stages/config/metrics.py`.
"""

import logging
import os

import torch

from stages.config.closing import EvaluateConfig
from stages.job.context import StageContext, StageOutcome
from stages.job.workers import launch
from stages.judge.bench import measure_units, open_bench
from stages.judge.results import flat, in_order, report_of, samples_of, write_results

logger = logging.getLogger(__name__)


def run(context: StageContext) -> StageOutcome:
    return launch(context, measure_models)


def measure_models(context: StageContext) -> StageOutcome:
    """Measure this worker's share; rank 0 writes what all of them found. At most three models are in memory: the one
    measured, the one that it started from, the reward model."""
    config = context.config
    assert isinstance(config, EvaluateConfig)
    torch.set_num_threads(max(1, int(context.execution.cpus_per_worker)))
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    bench = open_bench(context)
    left_out = bench.heldout.left_out(has_benchmarks=bench.has_benchmarks)
    measured = measure_units(bench, context, rank=rank, world_size=world_size)
    if rank:
        return StageOutcome()
    report = report_of(context, bench, measured, left_out | bench.left_out)
    samples = samples_of(bench, measured, num_samples=config.num_samples)
    write_results(context.output_dir, report, samples, in_order(bench, measured))
    not_measured = report.get("left_out") or {}
    for what, reason in not_measured.items():
        logger.warning("not measured: %s: %s", what, reason)
    ledger = {"data": report["data"], "units": bench.counts, **({"left_out": not_measured} if not_measured else {})}
    return StageOutcome(metrics=flat(report), ledger=ledger)
