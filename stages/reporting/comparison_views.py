"""What a comparison of alignment methods says first: a sentence, the table of six criteria, and the frontier."""

from collections.abc import Iterable, Sequence

from stages.config.compare import FEWEST_SEEDS
from stages.config.compare_results import ComparedModel, Comparison, Estimate, Setting, Spread, spread
from stages.config.graph import GRAPH
from stages.config.text import byte_size, duration
from stages.reporting.comparison_tables import DASH, signed
from stages.reporting.figures import Figure, figure_data
from stages.reporting.interval_plot import Estimate as Drawn
from stages.reporting.interval_plot import interval_plot
from stages.reporting.line_plot import number
from stages.reporting.scatter_plot import Cloud, Point, colour_of, scatter_plot
from stages.reporting.tables import Cell, Table, text

_NO_RESULT = "no result"


def verdict(best: Sequence[Setting]) -> str:
    """The one sentence at the top: which method gains most by gold."""
    gains = _by_gain(best)
    if not gains:
        return "No model of this comparison has a result by the gold scorer."
    (mean, first), *others = gains
    before = f", before {others[0][1].name} with {signed(others[0][0])}" if others else ""
    return f"{first.name} gains most by the gold scorer: {signed(mean)}{before}."


def reason(comparison: Comparison, best: Sequence[Setting]) -> str:
    """Whether that is sure; empty where nothing compares the two best methods."""
    gains = _by_gain(best)
    return _sure(comparison, gains[0][1], gains[1][1]) if len(gains) > 1 else ""


def _by_gain(best: Sequence[Setting]) -> list[tuple[float, Setting]]:
    found = [(setting.gold_gain.mean, setting) for setting in best if setting.gold_gain]
    return sorted(found, key=lambda one: -one[0])


def _sure(comparison: Comparison, first: Setting, second: Setting) -> str:
    for one in comparison.versus:
        rate = one.win_rate
        if (one.method, one.against) == (first.method, second.method):
            low, high, wins = rate.low, rate.high, rate.value
        elif (one.method, one.against) == (second.method, first.method):
            low, high, wins = 1 - rate.high, 1 - rate.low, 1 - rate.value
        else:
            continue
        side = "which is sure on these prompts" if low > 0.5 else "which these prompts do not settle"
        against = f"Over all betas and seeds {first.method} wins {wins:.1%} of the prompts against {second.method}"
        return f"{against} ({low:.1%} to {high:.1%}), {side if high >= 0.5 else 'so it is the other way round there'}."
    return ""


def cautions(comparison: Comparison, settings: Sequence[Setting]) -> list[str]:
    """What a reader must know before the numbers."""
    found = []
    if failed := sum(setting.failed for setting in settings):
        found.append(f"{failed} of {len(comparison.models)} combinations failed; the reasons are at the end.")
    fewest = min((len(setting.measured) for setting in settings), default=0)
    if fewest < FEWEST_SEEDS:
        found.append(
            f"Some settings have only {fewest} {'seed' if fewest == 1 else 'seeds'} with a result: a spread over so "
            f"few says little about stability. Use {FEWEST_SEEDS} or more."
        )
    agreed = comparison.gold_agreement
    if agreed is not None and agreed.low <= 0.5:
        found.append(
            f"The gold scorer agrees with {agreed.value:.1%} of the held-out pairs ({agreed.low:.1%} to "
            f"{agreed.high:.1%}), which is not surely better than chance: gains by it prove nothing."
        )
    if comparison.judge and not comparison.judge_is_proven:
        found.append("The judge has not shown that it agrees with known pairs more often than chance.")
    if hacked := [model.combination.name for model in comparison.models if model.is_hacked]:
        found.append(f"Reward hacking: the proxy rose and gold fell, both for sure, in {'; '.join(hacked)}.")
    return found


def criteria_table(comparison: Comparison, best: Sequence[Setting]) -> Table:
    """The six criteria, with measured numbers: each method at its best beta."""
    fastest = min((one.mean for setting in best if (one := _wall(setting))), default=0.0)
    rows = (
        ("complexity", [_complexity(setting) for setting in best]),
        ("stability", [_stability(setting) for setting in best]),
        ("memory", [_memory(setting) for setting in best]),
        ("speed", [_speed(setting, fastest) for setting in best]),
        ("performance", [_performance(setting) for setting in best]),
        ("reward hacking", [_hacking(setting) for setting in best]),
    )
    accuracy = "" if comparison.reward_accuracy is None else f" (held-out accuracy {comparison.reward_accuracy:.1%})"
    note = (
        "Each method at the beta with the highest mean gain by gold. Gains are against the start, in its own spread "
        f"(SD) where that stands behind. The proxy is the reward model{accuracy}, which reinforcement learning "
        "optimises; gold is the scorer that nothing was trained with. Their gap is how much of the gain only the proxy "
        "sees."
    )
    head = ("criterion", *(setting.name for setting in best))
    return Table("Measured, at the best beta", head, tuple((text(name), *cells) for name, cells in rows), note)


def _complexity(setting: Setting) -> Cell:
    told = setting.models[0].combination
    spec = GRAPH[told.stage]
    models = f"{spec.trained_models} trained, {spec.frozen_models} frozen"
    return Cell(models, detail=f"{told.settings} settings, {len(told.changed)} of them not as the recipe says")


def _stability(setting: Setting) -> Cell:
    gain = setting.gold_gain
    failed = f", {setting.failed} of {len(setting.models)} failed" if setting.failed else ""
    if gain is None:
        return Cell(_NO_RESULT, detail=failed.removeprefix(", "))
    if gain.deviation is None:
        return Cell("one seed", detail=f"nothing known about the spread{failed}")
    return Cell(
        f"± {number(gain.deviation, 2)} over {gain.count} seeds",
        detail=f"gain by gold from {signed(gain.low)} to {signed(gain.high)}{failed}",
    )


def _memory(setting: Setting) -> Cell:
    found = [model.memory for model in setting.measured if model.memory]
    peak, models = spread(one.peak for one in found), spread(one.of_models for one in found)
    if peak is None or models is None:
        return Cell(DASH)
    return Cell(
        f"{byte_size(models.mean)} of models",
        detail=f"parameters, gradients, optimizer, frozen models; peak {byte_size(peak.high)} ({found[0].device})",
    )


def _wall(setting: Setting) -> Spread | None:
    return spread(model.cost.wall_seconds for model in setting.measured if model.cost.wall_seconds)


def _speed(setting: Setting, fastest: float) -> Cell:
    wall = _wall(setting)
    if wall is None:
        return Cell(DASH)
    cpu = spread(model.cost.cpu_seconds for model in setting.measured)
    gpu = spread(model.cost.gpu_seconds for model in setting.measured)
    spent = [f"{duration(cpu.mean)} of CPU"] if cpu and cpu.mean else []
    spent += [f"{duration(gpu.mean)} of GPU"] if gpu and gpu.mean else []
    times = f", {number(wall.mean / fastest)} times the fastest" if wall.mean > fastest else ""
    return Cell(duration(wall.mean), detail=f"{' and '.join(spent)}{times}")


def _performance(setting: Setting) -> Cell:
    gain = setting.gold_gain
    if gain is None:
        return Cell(_NO_RESULT)
    wins = spread(one.gold_win_rate.value for one in setting.measured if one.gold_win_rate)
    sure = sum(one.gold_gain.is_above_zero for one in setting.measured if one.gold_gain)
    rate = f", wins {wins.mean:.1%} by gold" if wins else ""
    return Cell(f"{signed(gain.mean)} by gold", detail=f"above zero for sure in {sure} of {gain.count} models{rate}")


def _hacking(setting: Setting) -> Cell:
    gaps = spread(one.gap for one in setting.measured if one.gap is not None)
    proxy = spread(one.proxy_gain_sd for one in setting.measured if one.proxy_gain_sd is not None)
    gold = spread(one.gold_gain_sd for one in setting.measured if one.gold_gain_sd is not None)
    if gaps is None or proxy is None or gold is None:
        return Cell(DASH)
    hacked = sum(one.is_hacked for one in setting.measured)
    told = f"; hacked in {hacked} of {len(setting.measured)}" if hacked else ""
    return Cell(
        f"gap {signed(gaps.mean)} SD",
        detail=f"proxy {signed(proxy.mean)} SD, gold {signed(gold.mean)} SD{told}",
        is_worst=hacked > 0,
    )


def figures(comparison: Comparison, settings: Sequence[Setting]) -> list[Figure]:
    """The frontier by gold and by the proxy, and every gain with its interval."""
    found = [
        _frontier("Gain by gold over KL", settings, "gold_gain"),
        _frontier("Gain by the proxy over KL", settings, "proxy_gain"),
        _gains(comparison),
    ]
    return [figure for figure in found if figure is not None]


def _frontier(title: str, settings: Sequence[Setting], field: str) -> Figure | None:
    clouds: list[Cloud] = []
    for method in dict.fromkeys(setting.method for setting in settings):
        own = sorted((one for one in settings if one.method == method), key=lambda one: one.beta)
        placed = [[point for model in one.measured if (point := _point(model, field))] for one in own]
        means = [(_mean(one.x for one in points), _mean(one.y for one in points)) for points in placed if points]
        clouds.append(Cloud(method, tuple(point for points in placed for point in points), tuple(means)))
    svg = scatter_plot(clouds, label=title, x_label="KL to the start (nats a response)", mark=0.0)
    if not svg:
        return None
    rows = [(cloud.name, one.name, one.x, one.y, one.low, one.high) for cloud in clouds for one in cloud.points]
    data = figure_data(title, ("method", "model", "KL", "gain", "low", "high"), rows)
    return Figure(title, svg, tuple((cloud.name, colour_of(place)) for place, cloud in enumerate(clouds)), data)


def _point(model: ComparedModel, field: str) -> Point | None:
    gain: Estimate | None = getattr(model, field)
    if gain is None or model.kl is None:
        return None
    return Point(model.combination.name, model.kl.value, gain.value, gain.low, gain.high)


def _mean(values: Iterable[float]) -> float:
    found = spread(values)
    assert found is not None
    return found.mean


def _gains(comparison: Comparison) -> Figure | None:
    methods = list(dict.fromkeys(model.combination.method for model in comparison.models))
    drawn = [
        Drawn(
            model.combination.short_name,
            model.gold_gain.value,
            model.gold_gain.low,
            model.gold_gain.high,
            colour_of(methods.index(model.combination.method)),
        )
        for model in comparison.models
        if model.gold_gain is not None
    ]
    title = "Gain by gold: method, beta, #seed"
    svg = interval_plot(drawn, label=title, mark=0.0, mark_name="the start")
    if not svg:
        return None
    rows = [(one.name, one.value, one.low, one.high) for one in drawn]
    return Figure(title, svg, (), figure_data(title, ("model", "gain", "low", "high"), rows))
