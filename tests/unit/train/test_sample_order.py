"""Which samples a step trains on follows from the seed alone: not from the number of processes, nor from a resume."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from stages import dpo, pretrain, reward, sft
from stages.config.graph import Stage
from stages.data.tokens.packing import Packed
from stages.data.tokens.views import TokensArtifact
from stages.train.engines.choose import make_engine
from stages.train.objective import Objective, Step
from stages.train.plan import order_digest
from tests.small_world import CONFIGS, make_context, make_models, make_tokens

VERBS: dict[Stage, Any] = {Stage.PRETRAIN: pretrain, Stage.SFT: sft, Stage.REWARD: reward, Stage.DPO: dpo}
Make = Callable[[Stage], Objective]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    home = tmp_path_factory.mktemp("order")
    tokens = make_tokens(home)
    inputs = make_models(home, tokens)

    def objective(stage: Stage) -> Objective:
        config = CONFIGS[stage].model_copy(update={"global_batch_size": 7})
        context = make_context(Path(home), stage, config, inputs[stage])
        prepared = VERBS[stage].prepare(context, TokensArtifact(context.input_dir("tokens")))
        return prepared.objective(make_engine(prepared.parts, config, context.execution))

    return objective


def steps(objective: Objective, *, rank: int = 0, world_size: int = 1) -> list[Step]:
    return list(objective.steps(SimpleNamespace(rank=rank, world_size=world_size)))  # type: ignore[arg-type]


def samples(step: Step) -> Counter[tuple[int, ...]]:
    """The sequences of a step, targets marked by their sign, however they are packed."""
    return (
        Counter(sequence for batch in step.micro_batches for sequence in sequences(batch))
        if step.counted
        else Counter()
    )


def sequences(batch: Packed) -> list[tuple[int, ...]]:
    signed = np.where(batch.loss_mask_BT.numpy() == 1, -1, 1) * (batch.input_ids_BT.numpy() + 1)
    segments = batch.segment_ids_BT.numpy()
    return [tuple(signed[segments == number].tolist()) for number in range(batch.num_segments)]


@pytest.mark.parametrize("stage", list(VERBS), ids=str)
def test_any_number_of_processes_trains_the_same_samples_in_the_same_steps(stage: Stage, make: Make) -> None:
    alone = [samples(step) for step in steps(make(stage))]
    assert len(alone) >= 3
    assert alone[0] != alone[1]
    for world_size in (2, 3, 8):
        ranks = [steps(make(stage), rank=rank, world_size=world_size) for rank in range(world_size)]
        together = [sum(map(samples, parts), Counter()) for parts in zip(*ranks, strict=True)]
        assert together == alone


@pytest.mark.parametrize("stage", list(VERBS), ids=str)
def test_a_resume_goes_on_with_the_next_step_at_any_number_of_processes(stage: Stage, make: Make) -> None:
    alone = [samples(step) for step in steps(make(stage))]
    first = make(stage)
    taken = first.steps(SimpleNamespace(rank=0, world_size=1))  # type: ignore[arg-type]
    next(taken)
    next(taken)
    resumed = [make(stage) for _ in range(2)]
    for objective in resumed:
        objective.load_state_dict(first.state_dict())
    ranks = [steps(objective, rank=rank, world_size=2) for rank, objective in enumerate(resumed)]
    assert [sum(map(samples, parts), Counter()) for parts in zip(*ranks, strict=True)] == alone[2:]


def test_the_digest_of_an_order_knows_items_their_sequence_and_where_steps_end() -> None:
    def digest(*items: list[int]) -> str:
        return order_digest(np.array(step) for step in items)

    same = digest([3, 1], [2])
    assert same == digest([3, 1], [2])
    assert len({same, digest([1, 3], [2]), digest([3], [1, 2]), digest([3, 1], [0]), digest([3, 1])}) == 5
