"""Read-only passes of a rollout's models over its sequences, the same number of passes on every rank."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from stages.data.tokens.packing import RowBudget, TokenSequence, lay_out
from stages.train.engine import Engine
from stages.train.plan import in_step

Result = TypeVar("Result")


def infer_each(
    engine: Engine, compute: Callable[..., Result], sequences: Sequence[TokenSequence], budget: RowBudget
) -> Iterator[tuple[list[TokenSequence], Result]]:
    """Yield each micro-batch's sequences and `compute(parts, batch)`, in order; every rank needs at least one
    sequence."""
    parts = budget.cut(sequences)
    # Sharded models compute on all ranks or on none: a rank that is through repeats a batch and drops the result.
    for part, counted in in_step(engine, parts, spare=parts[0]):
        result = engine.infer(compute, lay_out(part))
        if counted:
            yield part, result
