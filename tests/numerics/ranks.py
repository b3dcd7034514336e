"""One training on any number of gloo ranks, each a process forked from the server."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from stages.config.graph import Stage
from stages.config.pipeline import stage_config_from_json
from stages.config.request import ArtifactRef
from stages.config.train import TrainConfig
from tests.numerics.fork_server import ForkServer
from tests.numerics.training import Killed, Trained, run_training

KILLED = 86
"""Exit status of a rank that ended at `kill_at`."""


def run_ranks(
    server: ForkServer,
    home: Path,
    stage: Stage,
    config: TrainConfig,
    inputs: dict[str, ArtifactRef],
    *,
    ranks: int,
    **options: Any,
) -> Trained:
    """Train in `home` on `ranks` processes, from the newest checkpoint there; return what rank 0 saw.

    With `kill_at`, every rank ends at that step, which is what is expected then.
    """
    home.mkdir(parents=True, exist_ok=True)
    (home / "rendezvous").unlink(missing_ok=True)
    arguments = {
        "home": str(home),
        "stage": stage.value,
        "config": config.model_dump(mode="json"),
        "inputs": {role: ref.model_dump(mode="json") for role, ref in inputs.items()},
        "ranks": ranks,
        "options": options,
    }
    children = [
        server.start("tests.numerics.ranks:train_rank", log=home / f"rank-{rank}.log", rank=rank, **arguments)
        for rank in range(ranks)
    ]
    expected = KILLED if "kill_at" in options else 0
    statuses = [child.wait() for child in children]
    assert statuses == [expected] * ranks, "\n".join(child.log.read_text()[-3000:] for child in children)
    if expected:
        return Trained({}, [])
    return Trained(load_file(home / "weights.safetensors"), json.loads((home / "history.json").read_text()))


def train_rank(
    *,
    home: str,
    stage: str,
    config: dict[str, Any],
    inputs: dict[str, Any],
    rank: int,
    ranks: int,
    options: dict[str, Any],
) -> int:
    logging.basicConfig(level=logging.INFO)
    torch.set_num_threads(1)
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{home}/rendezvous", rank=rank, world_size=ranks)
    try:
        trained = run_training(
            Path(home),
            Stage(stage),
            stage_config_from_json(Stage(stage), config),  # type: ignore[arg-type]
            {role: ArtifactRef.model_validate(ref) for role, ref in inputs.items()},
            **options,
        )
    except Killed:
        return KILLED
    if rank == 0:
        save_file(trained.weights, Path(home) / "weights.safetensors")
        (Path(home) / "history.json").write_text(json.dumps(trained.history))
    if ranks > 1:
        dist.destroy_process_group()
    return 0
