"""Which suites a run's evaluation can have, by name: what promotion asks for must be among them.

A misspelled guard would hold forever, because nothing is ever measured under its name.
"""

import difflib
from collections.abc import Collection, Mapping

from stages.config.benchmarks import Benchmark, BuiltIn, names_of
from stages.config.errors import ConfigError
from stages.config.evaluation import GOLD_SUITE
from stages.config.pipeline import PipelineConfig

SUITES = (
    *("language", "responses", "pairs", "preferences", "score", "kl", "length", "repetition"),
    *(GOLD_SUITE, "rule", "judge"),
)
"""Those of every evaluation that measure language models."""


def check_suites(config: PipelineConfig, found: Mapping[str, Collection[str]] | None = None) -> None:
    """Raise ConfigError where `promote.primary` or `promote.guards` names a suite that the run cannot have.

    `found` has the suites that a benchmark turned out to have, by its address. Without it, a benchmark may have all
    that its format allows; what a task of lm-evaluation-harness has is then not known, and nothing can be refused.
    """
    known = list(SUITES)
    for made in config.evaluate.parsed_benchmarks:
        names = (found or {}).get(made.uri) or _possible(made)
        if not names:
            return
        known += names
    wanted = [("promote.primary", suite) for suite in config.promote.primary]
    wanted += [("promote.guards", guard.suite) for guard in config.promote.guards]
    for field, suite in wanted:
        if suite not in known:
            close = difflib.get_close_matches(suite, known, n=1, cutoff=0.5)
            raise ConfigError(
                f"{field} names the suite {suite!r}, and no evaluation of this run has it; allowed: {', '.join(known)}",
                advice=f"Did you mean {close[0]!r}?" if close else "Name one of these, or add its benchmark.",
            )


def _possible(made: Benchmark) -> tuple[str, ...]:
    """Suites that a benchmark may have before it is read; none where only lm-evaluation-harness knows."""
    if made.built_in is BuiltIn.REFUSALS:
        return (made.suite, f"over-{made.suite}")
    if made.built_in is not None:
        return (made.suite,)
    return () if made.is_task else names_of(made)
