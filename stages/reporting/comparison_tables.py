"""The plain tables of a comparison: one row for each setting, pair of methods, model, failure."""

from collections.abc import Callable, Iterable, Sequence

from stages.config.compare_results import Comparison, Estimate, Setting, Spread, spread
from stages.config.text import byte_size, duration
from stages.reporting.line_plot import number
from stages.reporting.memory_views import HEAD, NOTE, memory_cells
from stages.reporting.tables import Cell, Table, num, shown, text

DASH = "–"


def settings_table(settings: Sequence[Setting], *, with_judge: bool) -> Table:
    """Each method at each beta, over its seeds."""
    head = ["setting", "seeds", "failed", "gain by gold", "range over seeds", "wins by gold"]
    head += ["wins by the judge"] if with_judge else []
    head += ["gain by the proxy", "KL", "response length", "wall time", "peak memory"]
    rows = []
    for setting in settings:
        gain = setting.gold_gain
        cells = [text(setting.name), num(len(setting.models)), num(setting.failed), _over_seeds(gain)]
        cells.append(shown(f"{signed(gain.low)} to {signed(gain.high)}" if gain else DASH))
        cells.append(_share(_values(setting, "gold_win_rate")))
        if with_judge:
            cells.append(_share(_values(setting, "judge_win_rate")))
        cells += [
            _over_seeds(_values(setting, "proxy_gain")),
            _mean(_values(setting, "kl")),
            _mean(spread(one.response_length for one in setting.measured if one.response_length is not None)),
            shown(_spelled(spread(one.cost.wall_seconds for one in setting.measured), duration)),
            shown(_spelled(spread(one.memory.peak for one in setting.measured if one.memory), byte_size)),
        ]
        rows.append(tuple(cells))
    return Table(
        "Each method at each beta",
        tuple(head),
        tuple(rows),
        "Means over the seeds; after ± their standard deviation, where there are two or more. Gains are scores of the "
        "model's answers minus those of the start's, in units of the scorer; KL in nats a response, length in tokens.",
    )


def versus_table(comparison: Comparison) -> Table | None:
    """Who wins against whom by gold."""
    rows = tuple(
        (text(one.method), text(one.against), interval_cell(one.win_rate, percent=True), num(one.pairs))
        for one in comparison.versus
    )
    note = (
        "Models with the same beta and seed, on the same prompts; ties count one half. With the whole interval on one "
        "side of 50 % one method is better on these prompts. The interval covers the prompts, and not what other seeds "
        "would have given."
    )
    head = ("method", "against", "wins", "pairs of models")
    return Table("Win rates by gold, model against model", head, rows, note) if rows else None


def models_table(comparison: Comparison) -> Table:
    """All numbers of every model, with intervals over the held-out prompts."""
    judged = bool(comparison.judge)
    head = ["model", "gold score", "gain by gold", "wins by gold", *(["wins by the judge"] if judged else [])]
    head += ["gain by the proxy", "KL", "length", "steps", "wall time", "CPU time"]
    on_gpu = any(model.cost.gpu_seconds for model in comparison.models)
    head += ["GPU time"] if on_gpu else []
    rows = []
    for model in comparison.models:
        if model.failure:
            rows.append((text(model.combination.name), text("failed"), *(text("") for _ in head[2:])))
            continue
        rows.append(
            (
                text(model.combination.name),
                interval_cell(model.gold),
                interval_cell(model.gold_gain, sign=True),
                interval_cell(model.gold_win_rate, percent=True),
                *([interval_cell(model.judge_win_rate, percent=True)] if judged else []),
                interval_cell(model.proxy_gain, sign=True),
                interval_cell(model.kl),
                num(model.response_length),
                num(model.steps),
                shown(duration(model.cost.wall_seconds)),
                shown(duration(model.cost.cpu_seconds)),
                *([shown(duration(model.cost.gpu_seconds))] if on_gpu else []),
            )
        )
    note = (
        "Intervals are at 95 %, over the held-out prompts. Time is of the training alone, all attempts together, also "
        "where this run found the model already built."
    )
    return Table("Every model", tuple(head), tuple(rows), note)


def turned_table(comparison: Comparison) -> Table:
    """What was set for each method at each beta."""
    rows = {
        (model.combination.method, model.combination.beta): (
            text(f"{model.combination.method}, beta {model.combination.beta:g}"),
            text(model.combination.stage.value),
            num(model.combination.settings),
            text(", ".join(model.combination.changed) or "none"),
        )
        for model in comparison.models
    }
    head = ("setting", "stage", "settings that it has", "not as the recipe and the overrides say")
    return Table("What was set", head, tuple(rows.values()))


def memory_table(comparison: Comparison) -> Table | None:
    """Memory by component of every training that measured it."""
    rows = tuple(
        (text(model.combination.name), text(model.memory.device), *memory_cells(model.memory))
        for model in comparison.models
        if model.memory is not None
    )
    return Table("Memory of each training", ("model", "device", *HEAD), rows, NOTE) if rows else None


def failures_table(comparison: Comparison) -> Table | None:
    """Combinations without a result, and why."""
    rows = tuple((text(one.combination.name), text(one.failure)) for one in comparison.models if one.failure)
    return Table("Combinations without a result", ("combination", "why"), rows) if rows else None


def signed(value: float) -> str:
    """A gain: with its sign, as it says which way it went."""
    spelled = number(value)
    return f"+{spelled}" if value > 0 else spelled


def interval_cell(found: Estimate | None, *, sign: bool = False, percent: bool = False) -> Cell:
    """A value with its interval below it, small."""
    if found is None:
        return shown(DASH)
    spell = _percent if percent else signed if sign else number
    return Cell(spell(found.value), is_number=True, detail=f"{spell(found.low)} to {spell(found.high)}")


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _values(setting: Setting, field: str) -> Spread | None:
    found: Iterable[Estimate | None] = (getattr(model, field) for model in setting.measured)
    return spread(one.value for one in found if one is not None)


def _over_seeds(found: Spread | None) -> Cell:
    if found is None:
        return shown(DASH)
    around = "" if found.deviation is None else f" ± {number(found.deviation, 2)}"
    return shown(f"{signed(found.mean)}{around}")


def _share(found: Spread | None) -> Cell:
    return shown(DASH if found is None else f"{found.mean:.1%}")


def _mean(found: Spread | None) -> Cell:
    return num(None if found is None else found.mean)


def _spelled(found: Spread | None, spell: Callable[[float], str]) -> str:
    return DASH if found is None else spell(found.mean)
