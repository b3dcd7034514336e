"""What the report says about models: facts, learning curves, evaluation, aligned models side by side."""

from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from stages.config.base import Config
from stages.config.evaluation import CHAMPION_ROLE
from stages.config.graph import (
    GRAPH,
    Curve,
    Stage,
    StageSpec,
    aligned_models,
    language_models,
    trained_stages,
)
from stages.config.metrics import EVALUATION_METRICS
from stages.config.pipeline import CONFIG_CLASSES
from stages.config.request import Manifest
from stages.config.rollouts import PPOConfig
from stages.config.scorers import RewardModelScorer, described
from stages.config.text import byte_size, duration
from stages.config.train import Models, TrainConfig
from stages.reporting.figures import Figure, figure_data
from stages.reporting.line_plot import Series, line_plot, number
from stages.reporting.names import in_order, name_of, start_name, start_of
from stages.reporting.story import Story
from stages.reporting.tables import Cell, Table, best_of, num, shown, text

_EVALUATION_COLUMNS = tuple(
    (metric.key, metric.label, {"higher": True, "lower": False, "": None}[metric.better])
    for metric in EVALUATION_METRICS
    if metric.in_report
)
"""Key, heading, and whether higher is better (None: neither)."""


@dataclass(frozen=True)
class Fact:
    """One card at the top."""

    label: str
    value: str
    detail: str


@dataclass(frozen=True)
class Curves:
    """All figures of one model."""

    name: str
    steps: int
    plots: tuple[Figure, ...]


_BASE, _SFT = GRAPH[Stage.PRETRAIN].role, GRAPH[Stage.SFT].role


def facts(story: Story) -> list[Fact]:
    """The handful of numbers that say whether anything was learned."""
    found = [_decided_fact(story), _base_fact(story), _sft_fact(story), _reward_fact(story), *_aligned_facts(story)]
    return [fact for fact in found if fact]


def _decided_fact(story: Story) -> Fact | None:
    """The difference that decided about the champion."""
    ruling = story.promotion.decision.ruling if story.promotion else None
    if ruling is None or ruling.primary is None or (found := ruling.primary.compared) is None:
        return None
    against = name_of(ruling.opponent, story)
    detail = f"{found.low:+.3g} to {found.high:+.3g}, {ruling.primary.metric} of {found.suite}, {found.items} items"
    return Fact(f"{name_of(ruling.role, story)} minus {against}", f"{found.difference:+.3g}", detail)


def _base_fact(story: Story) -> Fact | None:
    value, unigram = story.metrics_of(_BASE).get("eval/perplexity"), story.evaluation.unigram_perplexity
    if value is None:
        return None
    detail = (
        f"unigram model {number(unigram)}: {number(unigram / value, 2)} times higher" if unigram else "held-out text"
    )
    return Fact(f"{name_of(_BASE, story)} perplexity".capitalize(), number(value), detail)


def _sft_fact(story: Story) -> Fact | None:
    before = start_of(_SFT, story) or _BASE
    base, sft = (story.metrics_of(role).get("eval/response_loss") for role in (before, _SFT))
    if sft is None:
        return None
    name = "base" if before in story.manifests else start_name(_SFT, story)
    detail = f"{(sft - base) / base:+.0%} against {name} ({number(base)})" if base else "held-out answers"
    return Fact("SFT response loss", number(sft), detail)


def _reward_fact(story: Story) -> Fact | None:
    reward = story.evaluation.reward
    if (accuracy := reward.get("reward/accuracy")) is None:
        return None
    margin = f"margin {number(reward['reward/margin'])}, " if "reward/margin" in reward else ""
    return Fact("Reward accuracy", f"{accuracy:.0%}", f"{margin}held-out pairs")


def _aligned_facts(story: Story) -> list[Fact]:
    found = []
    for spec in aligned_models():
        metrics = story.metrics_of(spec.role)
        if "eval/win_rate" not in metrics:
            continue
        gain = score_gain(story, spec.role)
        start = start_name(spec.role, story)
        detail = f"score {gain:+.2f} SD over {start}" if gain is not None else f"against {start}"
        if "eval/kl" in metrics:
            detail += f", KL {number(metrics['eval/kl'])} nats"
        found.append(Fact(f"{spec.label} win rate", f"{metrics['eval/win_rate']:.0%}", detail))
    return found


def score_gain(story: Story, role: str) -> float | None:
    """Mean score above that of the model that this one started from, in standard deviations of the latter's scores."""
    start, metrics = story.metrics_of(start_of(role, story) or _SFT), story.metrics_of(role)
    if not {"eval/score_mean", "eval/score_std"} <= start.keys() or "eval/score_mean" not in metrics:
        return None
    if not start["eval/score_std"]:
        return None
    return (metrics["eval/score_mean"] - start["eval/score_mean"]) / start["eval/score_std"]


def curves(story: Story) -> list[Curves]:
    """Figures for every model with a history."""
    found = []
    for spec in trained_stages():
        history = story.histories.get(spec.role) or []
        plots = [plot for curve in spec.curves if (plot := _plot(spec.label, curve, history))]
        if plots:
            found.append(Curves(spec.label, int(history[-1]["step"]), tuple(plots)))
    return found


def _plot(model: str, curve: Curve, history: list[dict[str, Any]]) -> Figure | None:
    series = []
    for colour, (key, name) in enumerate(curve.lines, start=1):
        points = tuple((float(row["step"]), float(row[key])) for row in history if row.get(key) is not None)
        if points:
            series.append(Series(name, points, colour))
    svg = line_plot(series, label=f"{model} {curve.title}")
    if not svg:
        return None
    data = figure_data(
        f"{model} {curve.title}",
        ("step", *(name for _, name in curve.lines)),
        [
            (float(row["step"]), *(row.get(key) for key, _ in curve.lines))
            for row in history
            if any(row.get(key) is not None for key, _ in curve.lines)
        ],
    )
    return Figure(curve.title, svg, tuple((one.name, one.colour) for one in series), data)


def evaluation_table(story: Story) -> Table | None:
    """All models on the same held-out data."""
    known = {*(spec.role for spec in language_models()), CHAMPION_ROLE}
    models = [role for role in in_order(story.evaluation.models) if role in known and story.metrics_of(role)]
    if not models:
        return None
    columns = [column for column in _EVALUATION_COLUMNS if any(column[0] in story.metrics_of(role) for role in models)]
    rows = []
    for role in models:
        cells = [text(name_of(role, story))]
        for key, _, higher in columns:
            value = story.metrics_of(role).get(key)
            others = [story.metrics_of(other).get(key) for other in models]
            best = best_of(others, higher=higher) if higher is not None else None
            cells.append(num(value, best=value is not None and value == best))
        rows.append(tuple(cells))
    if (unigram := story.evaluation.unigram_perplexity) is not None:
        blank = [Cell("") for _ in columns]
        for position, (key, _, _) in enumerate(columns):
            if key == "eval/perplexity":
                blank[position] = num(unigram)
        rows.append((text("Unigram model"), *blank))
    prompts = story.evaluation.data.get("num_prompts")
    notes = [f"Scores and win rates on {prompts} held-out prompts."] if prompts else []
    notes += [f"Not measured: {what}, because {reason}." for what, reason in story.evaluation.left_out.items()]
    note = " ".join(notes)
    return Table("Evaluation on held-out data", ("model", *(head for _, head, _ in columns)), tuple(rows), note)


def reward_table(story: Story) -> Table | None:
    """Accuracy of the reward model, by kind of pair."""
    reward = story.evaluation.reward
    if not reward:
        return None
    rows = tuple(
        (text(key.removeprefix("reward/").replace("_", " ")), num(value)) for key, value in sorted(reward.items())
    )
    return Table("Reward model on held-out pairs", ("measure", "value"), rows)


def alignment_table(story: Story) -> Table | None:
    """The aligned models side by side: what they cost and what they reached; None unless the run has several."""
    aligned = [spec for spec in aligned_models() if spec.role in story.manifests]
    if len(aligned) < 2:
        return None
    roles = [spec.role for spec in aligned]
    manifests = {role: story.manifests[role] for role in roles}
    rows: list[tuple[Cell, ...]] = [
        (text(label), *(shown(spell(manifests[role])) for role in roles))
        for label, spell in (
            ("peak memory", lambda manifest: byte_size(manifest.cost.peak_memory_bytes)),
            ("wall time", lambda manifest: duration(manifest.cost.wall_seconds)),
            ("CPU time", lambda manifest: duration(manifest.cost.cpu_seconds)),
            ("optimizer steps", _steps),
            ("learning rate", lambda manifest: number((manifest.config.get("optimizer") or {}).get("learning_rate"))),
        )
    ]
    left_out = ("eval/bits_per_byte", "eval/response_loss")  # perplexity, in the last row, says it for the language
    reached = [column for column in _EVALUATION_COLUMNS if column[0] not in left_out]
    for key, label, higher in sorted(reached, key=lambda column: column[0] == "eval/perplexity"):
        values = [story.metrics_of(role).get(key) for role in roles]
        if any(value is not None for value in values):
            best = best_of(values, higher=higher) if higher is not None else None
            rows.append((text(label), *(num(value, best=value is not None and value == best) for value in values)))
    gains = [score_gain(story, role) for role in roles]
    if any(gain is not None for gain in gains):
        starts = {start_name(role, story) for role in roles}
        over = starts.pop() if len(starts) == 1 else "its start"
        rows.append((text(f"score over {over} (SD)"), *(num(gain) for gain in gains)))
    return Table(
        "What each costs and reaches",
        ("", *(spec.label for spec in aligned)),
        tuple(rows),
        f"Memory is the peak of the stage's job. {' '.join(_means(spec, manifests[spec.role]) for spec in aligned)}",
    )


def _means(spec: StageSpec, manifest: Manifest) -> str:
    held = _models(spec, manifest)
    frozen = f" beside {held.frozen} frozen one{'s' * (held.frozen > 1)}" if held.frozen else ""
    models = "1 model" if held.trained == 1 else f"{held.trained} models"
    return f"{spec.label} trains {models}{frozen} and learns from {_teacher(spec, manifest)}."


def _teacher(spec: StageSpec, manifest: Manifest) -> str:
    if spec.weighs == "preferences":
        return "preference pairs"
    config = _config(spec, manifest)
    if not isinstance(config, PPOConfig) or isinstance(config.scorer, RewardModelScorer):
        return "the reward model"
    return f"scores ({described(config.scorer)})"


def _models(spec: StageSpec, manifest: Manifest) -> Models:
    """What the stage held, by its settings; at most, where this version cannot read those."""
    config = _config(spec, manifest)
    return config.models if isinstance(config, TrainConfig) else Models(spec.trained_models, spec.frozen_models)


def _config(spec: StageSpec, manifest: Manifest) -> Config | None:
    """The settings of a stage; None where this version cannot read them."""
    try:
        return CONFIG_CLASSES[spec.stage].model_validate(manifest.config)
    except ValidationError:
        return None


def _steps(manifest: Manifest) -> str:
    return number(manifest.ledger.get("steps"))
