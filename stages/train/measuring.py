"""The mean of a loss and of its metrics over held-out items, on all ranks together."""

from collections.abc import Callable, Sequence

from stages.data.tokens.packing import Packed
from stages.train.engine import Engine, LossOutput
from stages.train.plan import in_step


def measured(
    engine: Engine,
    loss: Callable[..., LossOutput],
    mine: Sequence[Packed],
    *,
    spare: Packed,
    units: Callable[[Packed], float],
) -> dict[str, float]:
    """Return `eval/loss`, per unit, and every metric over its own weight; nothing where all ranks have nothing."""
    totals: dict[str, tuple[float, float]] = {}
    for batch, counted in in_step(engine, mine, spare=spare):
        out = engine.infer(loss, batch)
        if not counted:
            continue
        pairs = {name: (float(pair[0]), float(pair[1])) for name, pair in out.metrics.items()}
        for name, (total, weight) in {"loss": (float(out.loss_sum), units(batch)), **pairs}.items():
            before = totals.get(name, (0.0, 0.0))
            totals[name] = (before[0] + total, before[1] + weight)
    names = sorted(set(engine.gather(list(totals))))  # a rank without items knows no metric names; all sum the same
    flat = engine.sum(value for name in names for value in totals.get(name, (0.0, 0.0)))
    sums = dict(zip(names, zip(flat[::2], flat[1::2], strict=True), strict=True))
    return {f"eval/{name.replace('/', '_')}": total / weight for name, (total, weight) in sums.items() if weight}
