"""What `evaluate` measures of every language model, in the order in which the report shows it.

Evaluation computes these numbers, the report and the approval table read this list: a metric added here and computed
in `stages/judge/aggregates.py` appears in both.
"""

from dataclasses import dataclass
from typing import Literal

from stages.config.closing import PREFERENCE_ACCURACY, SCORE, WIN_RATE


@dataclass(frozen=True)
class EvaluationMetric:
    """One number about one model on held-out data."""

    key: str
    """Its name in `metrics.json`, in the manifest (after the model's role) and in MLflow."""
    label: str
    """Heading of its column."""
    better: Literal["higher", "lower", ""] = ""
    """Which way is better; empty for distances and lengths, which are neither."""
    in_report: bool = True
    """Has a column in the report; the approval table shows every metric."""

    @property
    def arrow(self) -> str:
        return {"higher": "↑", "lower": "↓", "": ""}[self.better]


EVALUATION_METRICS: tuple[EvaluationMetric, ...] = (
    EvaluationMetric("eval/perplexity", "perplexity", "lower"),
    EvaluationMetric("eval/bits_per_byte", "bits per byte", "lower"),
    EvaluationMetric("eval/loss", "loss", "lower", in_report=False),
    EvaluationMetric("eval/response_loss", "response loss", "lower"),
    EvaluationMetric(PREFERENCE_ACCURACY, "preference accuracy", "higher"),
    EvaluationMetric("eval/preference_margin", "preference margin", "higher", in_report=False),
    EvaluationMetric(SCORE, "mean reward score", "higher"),
    EvaluationMetric("eval/score_std", "spread of reward scores", in_report=False),
    EvaluationMetric(WIN_RATE, "win rate vs start", "higher"),
    EvaluationMetric("eval/kl", "KL to start (nats)"),
    EvaluationMetric("eval/response_length", "response length (tokens)"),
)
