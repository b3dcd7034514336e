"""What each stage of recipe `demo` must reach: the table of docs/RECIPES.md, measured by whole runs.

`python -m tests.alignment.milestones FOLDER [--seeds 0,1,2]` plays the stages up to the evaluation on one core and
prints the table; what is finished in FOLDER is not made again.
"""

import argparse
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from operators.given import given_artifacts
from stages.artifacts.addresses import open_store
from stages.artifacts.manifests import read_manifest
from stages.config.graph import Stage
from stages.config.resolve import resolve
from tests.playing import ONE_THREAD, play

Metrics = Mapping[Stage, Mapping[str, float]]
"""What the stages of one run measured, by stage and name."""


@dataclass(frozen=True)
class Milestone:
    """A bound of a number that says what a stage has reached."""

    stage: Stage
    means: str
    metric: str
    least: float | None = None
    most: float | None = None
    measured_by: Stage | None = None
    """The stage among whose metrics the number is; None: its own."""

    def value(self, metrics: Metrics) -> float:
        return metrics[self.measured_by or self.stage][self.metric]

    def reached_by(self, value: float) -> bool:
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)

    @property
    def bound(self) -> str:
        return f"at least {self.least:g}" if self.least is not None else f"at most {self.most:g}"


MILESTONES = (
    Milestone(Stage.CURATE, "share of the planted documents that were found", "curate/planted_found", least=0.95),
    Milestone(Stage.TOKENIZE, "bytes of held-out text a token", "tokens/bytes_per_token", least=2.6),
    Milestone(Stage.PRETRAIN, "perplexity of held-out text", "eval/perplexity", most=190),
    Milestone(Stage.SFT, "loss of held-out answers, nats a token", "eval/loss", most=5.0),
    Milestone(Stage.REWARD, "held-out pairs told right", "eval/reward_accuracy", least=0.7),
    Milestone(Stage.GOLD, "held-out pairs told right", "eval/reward_accuracy", least=0.62),
    Milestone(Stage.PPO, "wins against SFT by the reward model", "ppo/eval/win_rate", 0.75, None, Stage.EVALUATE),
    Milestone(Stage.PPO, "KL to SFT, nats a response", "ppo/eval/kl", None, 12, Stage.EVALUATE),
    Milestone(Stage.PPO, "responses that end by themselves", "eval/finished", least=0.9),
    Milestone(Stage.DPO, "held-out pairs told right, relative to SFT", "eval/dpo_accuracy", least=0.65),
    Milestone(Stage.DPO, "KL to SFT, nats a response", "dpo/eval/kl", None, 6, Stage.EVALUATE),
)


def played(home: Path, seed: int) -> dict[Stage, Mapping[str, float]]:
    """What each stage of recipe `demo` measured."""
    config = resolve({"recipe": "demo", "seed": seed, "last_stage": "evaluate", "overrides": ONE_THREAD})
    config = config.with_given(given_artifacts(config))
    done = play(open_store((home / "store").as_uri()), config, f"demo-{seed}")
    return {stage: read_manifest(artifact).metrics for stage, artifact in done.items()}


def table(runs: Sequence[Metrics]) -> str:
    """One row for each milestone, with what the runs reached."""
    lines = ["| stage | what | must be | measured on seeds 0, 1, 2 |", "|---|---|---|---|"]
    for milestone in MILESTONES:
        measured = ", ".join(f"{milestone.value(metrics):.3g}" for metrics in runs)
        lines.append(f"| `{milestone.stage}` | {milestone.means} | {milestone.bound} | {measured} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.alignment.milestones")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--all", action="store_true", help="every metric of every stage, too")
    chosen = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    os.environ["ATHANOR_SCRATCH"] = str(chosen.folder / "scratch")
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    runs = [played(chosen.folder, seed) for seed in map(int, chosen.seeds.split(","))]
    if chosen.all:
        for stage in runs[0]:
            for name in sorted(runs[0][stage]):
                print(
                    stage.value, name, *(f"{metrics[stage].get(name, float('nan')):.4g}" for metrics in runs), sep="\t"
                )
    print(table(runs))


if __name__ == "__main__":
    main()
