"""What the training stages have in common: a verb provides `prepare(context, tokens)`, the rest is here."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stages.config.errors import ConfigError, DataError
from stages.config.graph import GRAPH
from stages.config.memory import RECORDED_AS
from stages.config.train import TrainConfig
from stages.data.tokens.views import TokensArtifact
from stages.job.context import StageContext, StageOutcome
from stages.job.devices import local_device
from stages.job.workers import launch
from stages.models.build import save_model
from stages.models.dropout import largest_dropout
from stages.models.precision import compute_dtype
from stages.train.best import BestBy, Fallback
from stages.train.checkpoint import Checkpointer
from stages.train.engine import Engine
from stages.train.engines.choose import make_engine
from stages.train.interruption import Interruption, stop_flag, wait_for_all
from stages.train.loop import train
from stages.train.memory import MemoryMeter
from stages.train.objective import Objective
from stages.train.scores import Scores, score_metrics, write_statistics
from stages.train.throughput import Meter

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """What a verb makes ready on every worker."""

    parts: dict[str, nn.Module]
    """Models that are trained, by name."""
    objective: Callable[[Engine], Objective]
    exported: str
    """Name of the part that becomes the artifact."""
    scores: Callable[[Engine], Scores] | None = None
    """What the trained model scores, where it is one that scores, for the statistics that lie next to it."""
    ledger: dict[str, Any] = field(default_factory=dict)
    fallback: Fallback | None = None
    """Whose weights become the model where the objective ended because something went wrong."""


Prepare = Callable[[StageContext, TokensArtifact], Prepared]
"""A verb's own part, a function of its module."""


def train_stage(context: StageContext, prepare: Prepare) -> StageOutcome:
    """Run `prepare` and the loop on the workers that the stage's execution config asks for."""
    return launch(context, train_on_worker, prepare)


@dataclass(frozen=True)
class Place:
    """Where one model's training stands among those that its stage makes one after another; alone, by default."""

    number: int = 0
    count: int = 1

    @property
    def checkpoints(self) -> str:
        """What is added to the place of the stage's checkpoints."""
        return f"/member-{self.number:02d}" if self.count > 1 else ""


ALONE = Place()


@dataclass(frozen=True)
class Trained:
    """A trained and exported model, before the stage sums up what it made."""

    history: list[dict[str, Any]]
    scores: Scores | None
    outcome: StageOutcome
    is_main: bool
    """Whether this process writes the files."""


def train_on_worker(context: StageContext, prepare: Prepare) -> StageOutcome:
    """Prepare, train, export: the body that runs on every worker."""
    trained = train_model(context, prepare)
    if trained.scores is None:
        return trained.outcome
    if trained.is_main:
        write_statistics(context.output_dir, [trained.scores])
    return replace(trained.outcome, metrics=trained.outcome.metrics | score_metrics(trained.scores))


def train_model(context: StageContext, prepare: Prepare, place: Place = ALONE) -> Trained:
    """Train one model and export it to the context's output folder."""
    config, execution = context.config, context.execution
    assert isinstance(config, TrainConfig)
    torch.set_num_threads(max(1, int(execution.cpus_per_worker)))
    tokens = TokensArtifact(context.input_dir("tokens"))
    memory = MemoryMeter(local_device())
    prepared = prepare(context, tokens)
    dtype = compute_dtype(local_device(), config.precision)
    meter = Meter.of(prepared.parts, device=local_device(), dtype=dtype)
    dropout = largest_dropout(prepared.parts.values())  # before an engine wraps them
    engine = make_engine(prepared.parts, config, execution)
    objective = prepared.objective(engine)
    _check_size(objective, context)
    unmeasured = _unmeasured(objective, config)
    if engine.is_main and not place.number:  # of many workers one says so
        for reason in unmeasured.values():
            logger.warning("%s", reason)
    checkpointer = Checkpointer(
        context.store,
        context.fingerprint + place.checkpoints,
        keep=execution.keep_checkpoints,
        processes=engine.processes,
        best=BestBy.of(config),
        fallback=prepared.fallback,
        trained_on=_trained_on(context, objective),
        before_publishing=context.check_lease,
    )
    context.progress.begin()
    with stop_flag(context) as stop:
        history = train(
            objective,
            engine,
            config=config,
            execution=execution,
            checkpointer=checkpointer,
            report=_reporter(context, engine, place),
            meter=meter,
            memory=memory,
            asked=Interruption(engine.device, stop).asked,
            saves_last=place.count > 1,
        )
    held = memory.measured(engine)  # before the weights are copied for the export
    chosen = _choose(engine, checkpointer, history)
    weights = engine.model_weights(prepared.exported)
    with engine.averaged():
        scores = prepared.scores(engine) if prepared.scores is not None else None
    if engine.is_main:
        _export(context.output_dir, prepared, weights, history, tokens)
    outcome = StageOutcome(
        metrics={name: value for name, value in chosen.items() if name != "step"},
        ledger=prepared.ledger | objective.ledger | _steps(history, chosen) | unmeasured,
        execution={
            "device": engine.device.type,
            "compute_dtype": str(dtype).removeprefix("torch."),
            "dropout": dropout,
            RECORDED_AS: held.model_dump(mode="json"),
        },
    )
    return Trained(history, scores, outcome, engine.is_main)


def _trained_on(context: StageContext, objective: Objective) -> dict[str, str]:
    """What decides the samples besides the fingerprint: an input that was built again may hold other bytes under the
    same fingerprint, and other code or libraries may plan another order from the same seed."""
    digests = {role: ref.digest for role, ref in context.inputs.items()}
    return {**digests, "order": objective.order, "num_steps": str(objective.num_steps)}


def _choose(engine: Engine, checkpointer: Checkpointer, history: list[dict[str, Any]]) -> dict[str, Any]:
    """Put the weights that become the model into the engine and return their row of the history."""
    wait_for_all()  # rank 0 has written the last checkpoint when the others get past this
    best = checkpointer.best(history)
    if best is None:
        return history[-1]
    engine.load_state_dict(best.engine)
    logger.info("the model is that of step %d, the best one", best.step)
    return next(row for row in history if row["step"] == best.step)


def _steps(history: list[dict[str, Any]], chosen: dict[str, Any]) -> dict[str, int]:
    """How many steps were made, and after which the model was taken, where it was not the last."""
    made, taken = history[-1]["step"], chosen["step"]
    return {"steps": made, **({"model_step": taken} if taken != made else {})}


def _check_size(objective: Objective, context: StageContext) -> None:
    if objective.num_steps == 0:
        raise ConfigError(
            f"{context.request.stage.value} has nothing to train on: 0 optimizer steps",
            advice="Bring more data, or train longer.",
        )


def _unmeasured(objective: Objective, config: TrainConfig) -> dict[str, str]:
    """Return a ledger entry when there is nothing to evaluate on; raises DataError, before the first step, when the
    best weights could then not be chosen."""
    if objective.num_heldout:
        return {}
    reason = "there are no held-out items for this stage, so nothing under eval/ is measured"
    if config.best_metric:
        raise DataError(
            f"best_metric={config.best_metric!r} cannot be measured: {reason}",
            advice="Hold out a larger share of the data, bring more of it, or leave best_metric empty.",
        )
    return {"not_evaluated": reason}


def _reporter(context: StageContext, engine: Engine, place: Place) -> Callable[..., None]:
    """Numbers leave from the main process alone; progress shows those of the stage's headlines that training has."""
    stage = context.request.stage
    headlines = [headline.key for headline in GRAPH[stage].headlines if headline.key.startswith(f"{stage}/")]

    def report(metrics: dict[str, float], *, step: int, num_steps: int) -> None:
        context.progress.watchdog.beat()
        if not engine.is_main:
            return
        step, num_steps = place.number * num_steps + step, place.count * num_steps
        context.tracker.log(metrics, step)
        shown = {key.split("/")[-1]: metrics[key] for key in headlines if key in metrics}
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
    folder: Path,
    prepared: Prepared,
    weights: dict[str, torch.Tensor],
    history: list[dict[str, Any]],
    tokens: TokensArtifact,
) -> None:
    save_model(prepared.parts[prepared.exported], weights, folder, tokens)  # type: ignore[arg-type]
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history))
