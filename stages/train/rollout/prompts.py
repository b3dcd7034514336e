"""The loss of held-out prompts: what PPO measures of its weights that does not depend on sampled answers.

PPO does not train it. It is recorded because the published weights must give the same number, which a gate checks.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor, nn

from stages.config.rollouts import PROMPT_LOSS
from stages.data.tokens.packing import Packed, RowBudget, all_targets, lay_out
from stages.models.forward import next_token_loss_sum
from stages.train.engine import Engine
from stages.train.plan import in_step


def prompt_loss(engine: Engine, prompts: Sequence[np.ndarray], budget: RowBudget) -> dict[str, float]:
    """Return the policy's mean loss a token of the prompts, the same on every rank; empty without targets."""
    batches = [lay_out(part) for part in budget.cut([all_targets(prompt) for prompt in prompts])]
    loss_sum = targets = 0.0
    for batch, counted in in_step(engine, batches[engine.rank :: engine.world_size], spare=batches[0]):
        loss = float(engine.infer(_loss_sum, batch))
        if counted:
            loss_sum, targets = loss_sum + loss, targets + batch.num_targets
    loss_sum, targets = engine.sum([loss_sum, targets])
    return {PROMPT_LOSS: loss_sum / targets} if targets else {}


def _loss_sum(parts: nn.ModuleDict, batch: Packed) -> Tensor:
    return next_token_loss_sum(parts["policy"], batch)
