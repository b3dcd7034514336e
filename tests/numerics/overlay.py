"""Draw the loss curves of all engines over each other: `python -m tests.numerics.overlay docs/images/engines.svg`.

The upper half shows the curves, which cover each other; the lower half how far each is from the single process's.
Prints the largest differences as the table of docs/TRAINING.md.
"""

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.config.graph import Stage
from stages.config.train import PretrainConfig
from tests.numerics.training import Case, Trained, run_on_processes, run_training
from tests.small_world import CONFIGS, make_tokens

LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "DDP": {"engine": "ddp"},
        "FSDP2": {"engine": "fsdp"},
        "ZeRO 1": {"engine": "deepspeed", "zero_stage": 1},
        "ZeRO 2": {"engine": "deepspeed", "zero_stage": 2},
        "ZeRO 2, offloaded": {"engine": "deepspeed", "zero_stage": 2, "offload": True},
        "ZeRO 3": {"engine": "deepspeed", "zero_stage": 3},
        "TP 2": {"tensor_parallel": 2},
        "PP 2": {"pipeline_parallel": 2},
    },
    4: {
        "TP 2 x DDP": {"tensor_parallel": 2},
        "TP 2 x FSDP2": {"tensor_parallel": 2, "engine": "fsdp"},
        "PP 2 x DDP": {"pipeline_parallel": 2},
        "PP 2 x FSDP2": {"pipeline_parallel": 2, "engine": "fsdp"},
        "TP 2 x PP 2": {"tensor_parallel": 2, "pipeline_parallel": 2},
    },
}


def train_all(home: Path, *, num_steps: int) -> tuple[Trained, dict[str, Trained]]:
    """Train the same tiny model in one process and in every layout."""
    inputs = {"tokens": make_tokens(home)}
    config = CONFIGS[Stage.PRETRAIN].model_copy(update={"max_tokens": 64 * 4 * num_steps})
    assert isinstance(config, PretrainConfig)
    alone = run_training(home / "alone", Stage.PRETRAIN, config, inputs, micro_batch_size=1)
    together: dict[str, Trained] = {}
    for num_processes, layouts in LAYOUTS.items():
        cases = {
            name: Case(
                home / name,
                Stage.PRETRAIN,
                config,
                inputs,
                {"num_workers": num_processes, "micro_batch_size": 1, **how},
            )
            for name, how in layouts.items()
        }
        together |= run_on_processes(cases, num_processes=num_processes)
    return alone, together


def differences(alone: Trained, other: Trained) -> list[float]:
    return [
        abs(row["train/loss"] - expected["train/loss"])
        for row, expected in zip(other.history, alone.history, strict=True)
    ]


def table(alone: Trained, together: Mapping[str, Trained]) -> str:
    """The largest differences in Markdown."""
    lines = ["| layout | largest difference in loss | in a weight at the end |", "|---|---|---|"]
    for name, trained in together.items():
        weight = max(float((trained.weights[key] - value).abs().max()) for key, value in alone.weights.items())
        lines.append(f"| {name} | {max(differences(alone, trained)):.1e} | {weight:.1e} |")
    return "\n".join(lines)


def draw(alone: Trained, together: Mapping[str, Trained], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "engines"  # the same picture, the same bytes
    from matplotlib import pyplot

    figure, (curves, distances) = pyplot.subplots(2, 1, figsize=(8, 7), sharex=True, layout="constrained")
    steps = [row["step"] for row in alone.history]
    curves.plot(steps, [row["train/loss"] for row in alone.history], color="0.8", linewidth=8, label="single process")
    for name, trained in together.items():
        curves.plot(steps, [row["train/loss"] for row in trained.history], linewidth=0.8, label=name)
        # an exact zero has no place on a logarithmic axis
        distances.plot(steps, [max(value, 1e-9) for value in differences(alone, trained)], linewidth=0.8)
    distances.axhline(1e-5, color="0.5", linestyle="--", linewidth=0.8)
    distances.annotate("allowed: 1e-5", (steps[0], 1.2e-5), fontsize=8, color="0.4")
    curves.set_ylabel("training loss")
    distances.set(xlabel="step", ylabel="distance from the single process", yscale="log", ylim=(5e-10, 1e-4))
    curves.legend(fontsize=8, ncols=2)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        alone, together = train_all(Path(scratch), num_steps=arguments.steps)
    draw(alone, together, arguments.path)
    print(table(alone, together))


if __name__ == "__main__":
    main()
