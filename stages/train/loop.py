"""The training loop, shared by pretraining, SFT, reward, DPO and PPO, which differ only in their Objective.

The loss is divided by the global number of trained units over all ranks and micro-batches, known before the first
backward: how a step is cut into micro-batches and spread over ranks does not change its gradient.
"""

import logging
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from stages.config.execution import ExecutionConfig
from stages.config.train import TrainConfig
from stages.data.tokens.packing import Packed
from stages.job.stopping import Stopped
from stages.train.checkpoint import Checkpoint, Checkpointer
from stages.train.engine import Engine, Share
from stages.train.guard import StepGuard
from stages.train.interruption import Ask, wait_for_all
from stages.train.memory import MemoryMeter
from stages.train.objective import Objective, Step
from stages.train.optimizer import learning_rate
from stages.train.throughput import Meter, with_waiting

logger = logging.getLogger(__name__)

History = list[dict[str, Any]]


class Reporter(Protocol):
    """Where numbers go: MLflow and the progress line."""

    def __call__(self, metrics: dict[str, float], *, step: int, num_steps: int) -> None: ...


def train(
    objective: Objective,
    engine: Engine,
    *,
    config: TrainConfig,
    execution: ExecutionConfig,
    checkpointer: Checkpointer,
    report: Reporter,
    meter: Meter,
    memory: MemoryMeter | None = None,
    asked: Callable[[], Ask] = lambda: Ask.NOTHING,
    saves_last: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> History:
    """Train to the last step, from the newest checkpoint if there is one; return the metrics of every logged step.

    Timing is reported but not returned: the same training gives the same history, byte for byte. `asked` says at every
    step boundary whether to save or to stop now, the same on every rank. `saves_last` is for a training that others of
    its stage follow: what it ends with must survive them.
    """
    guard = StepGuard(config.optimizer)
    step, history = _resume(objective, engine, guard, checkpointer)
    blocked = 0.0
    last = clock()
    for item, waited in with_waiting(objective.steps(engine)):
        rate = learning_rate(
            config.optimizer, step=step, num_steps=objective.num_steps, tokens_per_step=objective.tokens_per_step
        )
        # Dropout follows from (seed, step, rank) and from nothing that a resume would have to restore.
        engine.seed(config.seed, step)
        metrics, tokens, flops = _accumulate(objective, engine, item, meter)
        if memory is not None:
            memory.after_backward(engine)
        # The guard judges global numbers, so all ranks take the step or none does.
        accepts = guard.judging(loss=metrics["train/loss"], step=step + 1)
        outcome = engine.step(rate, accepts=accepts, rate_factors=item.rate_factors)
        step += 1
        now = clock()
        metrics |= item.metrics | {
            "train/grad_norm": outcome.grad_norm,
            "train/learning_rate": rate,
            **guard.metrics,
        }
        timing = {
            "train/tokens_per_second": tokens / (now - last),
            "train/mfu": meter.utilisation(flops, now - last),
            "train/data_wait_seconds": waited,
            "train/checkpoint_blocked_seconds": blocked,
        }
        last = now
        num_steps = step if item.is_last else objective.num_steps
        if evaluated := _due(step, config.eval_every, num_steps):
            with engine.averaged():
                metrics |= objective.evaluate(engine)
            last = clock()  # evaluation is not training: it must not lower the next step's tokens a second
        # The first step is always logged: what its loss must be is known exactly, and a gate looks.
        if evaluated or step == 1 or _due(step, execution.log_every, num_steps):
            history.append({"step": step, **metrics})
            report(metrics | timing, step=step, num_steps=objective.num_steps)
            blocked = 0.0
        ask = asked()
        due = _is_multiple(step, execution.checkpoint_every) or (evaluated and checkpointer.is_best(step, history))
        # None after the last step: the artifact comes next. But one that was asked for, because the process is going.
        if ask is not Ask.NOTHING or (saves_last if step == num_steps else due):
            started = clock()
            checkpointer.wait()
            state = Checkpoint(step, engine.state_dict(), objective.state_dict(), guard.state_dict(), list(history))
            checkpointer.save(state)
            blocked += clock() - started
        if ask is Ask.END:
            checkpointer.wait()
            wait_for_all()  # Ray Train ends all workers when the first one fails; others may still be writing
            raise Stopped(
                f"the job was asked to stop and saved its training after step {step} of {objective.num_steps}",
                advice="If it was not stopped on purpose, the retry continues from there.",
            )
    checkpointer.wait()
    return history


def _resume(objective: Objective, engine: Engine, guard: StepGuard, checkpointer: Checkpointer) -> tuple[int, History]:
    checkpoint = checkpointer.latest()
    if checkpoint is None:
        return 0, []
    engine.load_state_dict(checkpoint.engine)
    objective.load_state_dict(checkpoint.objective)
    guard.load_state_dict(checkpoint.guard)
    logger.info("resumed from the checkpoint of step %d of %d", checkpoint.step, objective.num_steps)
    return checkpoint.step, checkpoint.history


def _accumulate(
    objective: Objective, engine: Engine, step: Step, meter: Meter
) -> tuple[dict[str, float], float, float]:
    """Run every micro-batch forward and backward; return the step's metrics, tokens and model FLOPs over all ranks."""
    # Three denominators. All of them are totals over all ranks and micro-batches of the step, so that neither gradient
    # nor metrics depend on how the step was cut:
    #   units   what `loss_sum` sums over: targets or pairs. The mean of micro-batches' means would be another loss, in
    #           which a target in a short micro-batch weighs more than one in a long micro-batch.
    #   tokens  what `token_loss_sum` sums over: experts are balanced over all tokens, prompts included.
    #   weight  what a metric sums over, which the loss function states next to its sum.
    # The first two must be known before the first backward, because they scale it; hence a pass over sizes alone.
    counted = step.micro_batches if step.counted else []
    sizes = [(objective.weight(batch), batch.num_tokens, meter.flops(batch)) for batch in counted]
    units, tokens, flops = engine.sum(sum(column) for column in zip((0.0, 0.0, 0.0), *sizes, strict=True))
    sums: dict[str, Tensor] = {}
    batches = _same_count(engine, step)
    # A batch that only keeps other ranks company has counts of 0: it joins the collectives and adds nothing.
    shares = [Share(batch, counts / units, counts / tokens) for batch, counts in batches]
    outputs = engine.backward(objective.loss, shares)
    observed: list[Tensor] = []
    for (_, counts), out in zip(batches, outputs, strict=True):
        # The loss has no weight of its own: its denominator is `units`.
        with_weights = out.metrics | {"train/loss": torch.stack([out.loss_sum, out.loss_sum.new_tensor(0.0)])}
        for name, sum_and_weight in with_weights.items():
            sums[name] = sums.get(name, 0) + counts * sum_and_weight
        if out.counts is not None:
            observed.append(counts * out.counts)
    # Every rank ran a micro-batch, so every rank has the same names, and one collective in name order adds all of them.
    names = sorted(sums)
    totals = engine.sum([value for name in names for value in sums[name].tolist()])
    metrics = {
        name: total / (weight if name != "train/loss" else units)
        for name, total, weight in zip(names, totals[::2], totals[1::2], strict=True)
        if weight or name == "train/loss"  # a metric without a single item in the step has no mean
    }
    if observed:
        total = engine.sum(torch.stack(observed).sum(0).flatten().tolist())
        metrics |= step.observe(torch.tensor(total).view_as(observed[0]))
    return metrics, tokens, flops


def _same_count(engine: Engine, step: Step) -> list[tuple[Packed, float]]:
    """Give every rank the same number of forward passes, each with how often it counts: once, or not at all."""
    batches = step.micro_batches
    # With parameters in shards a forward pass is a collective: a rank that makes fewer would leave the others waiting.
    missing = int(engine.max(len(batches))) - len(batches)
    return [(batch, float(step.counted)) for batch in batches] + [(batches[0], 0.0)] * missing


def _due(step: int, every: int, num_steps: int) -> bool:
    return step == num_steps or _is_multiple(step, every)


def _is_multiple(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
