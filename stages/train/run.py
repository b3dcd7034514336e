"""From a verb to a Ray Train run and back: the part of training that is the same for all five.

A verb provides `prepare(context, tokens)`; this module places it on workers, trains, saves and exports. With
`num_workers=0` Ray Train runs it in the job's own process, which saves three process starts on one machine.
"""

import importlib
import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stages.artifacts import upload_files
from stages.config.errors import ConfigError
from stages.config.graph import GRAPH
from stages.config.request import FileEntry, StageRequest
from stages.config.train import TrainConfig
from stages.context import StageContext, StageOutcome
from stages.data.tokens import TokensArtifact
from stages.models.build import save_model
from stages.train.checkpoint import Checkpointer
from stages.train.engine import Engine
from stages.train.loop import train
from stages.train.objective import Objective

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """What a verb makes ready on every worker."""

    parts: dict[str, nn.Module]
    """Models that are trained, by name."""
    objective: Callable[[Engine], Objective]
    exported: str
    """Name of the part that becomes the artifact."""
    ledger: dict[str, Any] = field(default_factory=dict)


def train_stage(context: StageContext) -> StageOutcome:
    """Run the stage's `prepare` and the loop on the workers that its execution config asks for."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    execution = context.execution
    if execution.num_workers == 0:
        trainer = TorchTrainer(
            lambda: _train_on_worker(context).to_json(), scaling_config=ScalingConfig(num_workers=0)
        )
        return TrainedFiles.from_json(trainer.fit().return_value).outcome()
    context.tracker.wait_run_id(30.0)
    trainer = TorchTrainer(
        _remote_worker,
        train_loop_config={
            "request": context.request.model_dump(mode="json"),
            "fingerprint": context.fingerprint,
            "sources": context.sources,
        },
        scaling_config=ScalingConfig(
            num_workers=execution.num_workers,
            use_gpu=execution.gpus_per_worker > 0,
            resources_per_worker={
                "CPU": execution.cpus_per_worker,
                **({"GPU": execution.gpus_per_worker} if execution.gpus_per_worker else {}),
            },
        ),
        run_config=RunConfig(
            name=context.request.submission_id or context.fingerprint[:16],
            storage_path=f"{context.store.root_uri}/ray",
            failure_config=FailureConfig(max_failures=0),
        ),
    )
    return TrainedFiles.from_json(trainer.fit().return_value).outcome()


@dataclass(frozen=True)
class TrainedFiles:
    """What rank 0 sends back to the job: numbers, and the files that it has already published."""

    metrics: dict[str, float]
    ledger: dict[str, Any]
    files: tuple[FileEntry, ...] = ()

    def outcome(self) -> StageOutcome:
        return StageOutcome(self.metrics, self.ledger, self.files)

    def to_json(self) -> dict[str, Any]:
        return {"metrics": self.metrics, "ledger": self.ledger, "files": [entry.model_dump() for entry in self.files]}

    @staticmethod
    def from_json(data: dict[str, Any]) -> "TrainedFiles":
        files = tuple(FileEntry.model_validate(entry) for entry in data["files"])
        return TrainedFiles(data["metrics"], data["ledger"], files)


def _remote_worker(arguments: dict[str, Any]) -> dict[str, Any] | None:
    """Body of a worker process: rebuild the context, train, publish from rank 0."""
    from stages.runner import worker_context

    request = StageRequest.model_validate(arguments["request"])
    with worker_context(request, arguments["fingerprint"], arguments["sources"]) as context:
        trained = _train_on_worker(context)
        if int(os.environ.get("RANK", "0")) != 0:
            return None
        kind = GRAPH[request.stage].kind
        files = upload_files(context.store, context.output_dir, kind=kind, fingerprint=context.fingerprint)
        return TrainedFiles(trained.metrics, trained.ledger, files).to_json()


def _train_on_worker(context: StageContext) -> TrainedFiles:
    config, execution = context.config, context.execution
    assert isinstance(config, TrainConfig)
    if execution.num_threads:
        torch.set_num_threads(execution.num_threads)
    tokens = TokensArtifact(context.input_dir("tokens"))
    verb = importlib.import_module(f"stages.{context.request.stage.value}")
    prepared: Prepared = verb.prepare(context, tokens)
    engine = Engine(prepared.parts, config, execution)
    objective = prepared.objective(engine)
    _check_size(objective, context)
    checkpointer = Checkpointer(context.store, context.fingerprint, keep=execution.keep_checkpoints, rank=engine.rank)
    history = train(
        objective, engine, config=config, execution=execution, checkpointer=checkpointer, report=_reporter(context, engine)
    )
    weights = engine.model_weights(prepared.exported)
    if engine.rank == 0:
        _export(context.output_dir, prepared, weights, history, tokens)
    final = {name: value for name, value in history[-1].items() if name != "step"}
    return TrainedFiles(metrics=final, ledger=prepared.ledger | {"steps": objective.num_steps})


def _check_size(objective: Objective, context: StageContext) -> None:
    if objective.num_steps == 0:
        raise ConfigError(
            f"{context.request.stage.value} has nothing to train on: 0 optimizer steps",
            advice="Bring more data, or train longer.",
        )


def _reporter(context: StageContext, engine: Engine) -> Callable[..., None]:
    """Numbers leave from rank 0 alone."""

    def report(metrics: dict[str, float], *, step: int, num_steps: int) -> None:
        if engine.rank != 0:
            return
        context.tracker.log(metrics, step)
        shown = {name.split("/")[-1]: metrics[name] for name in ("ppo/score", "ppo/kl") if name in metrics}
        context.progress(
            step,
            num_steps,
            "step",
            loss=metrics["train/loss"],
            rate=metrics["train/tokens_per_second"],
            rate_unit="tokens/s",
            **shown,
        )

    return report


def _export(
    folder: Path, prepared: Prepared, weights: dict[str, torch.Tensor], history: list[dict[str, Any]], tokens: TokensArtifact
) -> None:
    save_model(prepared.parts[prepared.exported], weights, folder, tokens)  # type: ignore[arg-type]
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history))
