"""Facts about the first step of a training, which hold before anything is learned: ln V, ln 2, ratio 1."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from stages.config.gate_evidence import DEFECT, Evidence
from stages.config.gate_ledgers import number_at
from stages.config.gate_records import Check, compared, skipped
from stages.config.graph import BASE_MODEL, GRAPH, PREFERENCES, REWARD_BASE, Stage
from stages.config.preference_losses import KTOLoss, PreferenceLoss, read_loss
from stages.config.request import Manifest
from stages.config.selection import learns_from_scores

_DRAWN_HEADS = 0.2
"""How far the first loss of an ensemble's first member may be from that of equal scores."""
EXACT = "float32"
"""Number format in which initial losses and ratios are exact but for the last digits."""


def initial_facts(evidence: Evidence) -> Iterable[Check]:
    """Facts that hold before anything is learned: ln V, ln 2, ratio 1."""
    row, manifest = evidence.first_row, evidence.manifest
    spec = GRAPH[manifest.stage]
    samples, compares = learns_from_scores(spec), spec.needs == PREFERENCES
    if not (samples or compares or spec.stage is Stage.PRETRAIN):
        return
    name = "initial_ratio" if samples else "initial_loss"
    if row is None or row.get("step") != 1:
        first = "it has no history" if row is None else f"its history begins with step {row.get('step')}"
        yield skipped(name, f"{first}; earlier versions logged the first step only with log_every=1")
        return
    if dropout := number_at(manifest.execution, "dropout"):
        for of in ("initial_approx_kl", "initial_clip_fraction") if samples else (name,):
            yield skipped(of, f"the model drops {dropout:g} of its values at random while it is trained")
        return
    exact = manifest.execution.get("compute_dtype") == EXACT
    if spec.stage is Stage.PRETRAIN:
        yield _uniform(evidence, row)
    elif samples:
        yield from _ratio(row, exact=exact)
    elif spec.scores:
        yield _even_scores(evidence, row, exact=exact)
    else:
        yield _preferences(row, read_loss(manifest.config.get("loss", {})), exact=exact)


def _reads(manifest: Manifest, role: str) -> bool:
    return role in {entry.role for entry in (*manifest.inputs, *manifest.sources)}


def _loss(row: Mapping[str, Any]) -> float | None:
    found = row.get("train/loss")
    return float(found) if isinstance(found, int | float) else None


def _uniform(evidence: Evidence, row: Mapping[str, Any]) -> Check:
    """A new model knows nothing: its loss is ln V plus half the variance of its logits, up to sampling."""
    manifest, tokens, loss = evidence.manifest, evidence.inputs.get("tokens"), _loss(row)
    if _reads(manifest, BASE_MODEL):
        return skipped("initial_loss", "the model goes on from a given one")
    size = number_at(tokens.metrics if tokens else {}, "tokens/vocab_size")
    if loss is None or not size:
        return skipped("initial_loss", "vocabulary or loss was not recorded")
    model = manifest.config.get("model", {})
    # Hidden states leave the last norm with a mean square of 1 in each dimension.
    spread = float(model.get("initializer_range", 0.02)) * math.sqrt(float(model.get("hidden_size", 1)))
    loss -= float(row.get("train/z_loss", 0.0))
    center, tolerance = math.log(size) + spread**2 / 2, 0.02 + spread / 2
    return compared(
        "initial_loss",
        abs(loss - center) <= tolerance,
        f"{loss:.4f} in the first step",
        f"{center:.4f} ± {tolerance:.4f}, of which ln({size:,.0f}) = {math.log(size):.4f}",
        "Labels, loss mask or initial weights are not what they should be. " + DEFECT,
    )


def _preferences(row: Mapping[str, Any], loss: PreferenceLoss, *, exact: bool) -> Check:
    """A policy that still is its reference has no margins: each loss has a value of its own for that."""
    start, share = loss.start, row.get("dpo/desirable_share")
    if isinstance(loss, KTOLoss) and isinstance(share, int | float):
        start = loss.start_with(share)
    if start is None:
        return skipped("initial_loss", f"loss {loss.kind} compares with no reference: its start depends on the model")
    supervised = loss.sft_coefficient * float(row.get("dpo/sft_loss", 0.0))
    name = f"ln 2 = {start:.6f}" if start == math.log(2) else f"{loss.kind} without margins = {start:.6f}"
    name += f", and {supervised:.6f} of the supervised term" if supervised else ""
    return _starts_at(start + supervised, name, row, exact=exact)


def _starts_at(expected: float, name: str, row: Mapping[str, Any], *, exact: bool, slack: float = 0.0) -> Check:
    # Of large values the last digits are uncertain as well.
    loss, tolerance = _loss(row), (1e-4 if exact else 2e-2) * max(1.0, expected) + slack
    if loss is None:
        return skipped("initial_loss", "no loss was recorded")
    return compared(
        "initial_loss",
        abs(loss - expected) <= tolerance,
        f"{loss:.6f} in the first step",
        f"{name} ± {tolerance:g}",
        "The reference is not the model that training started from, or scores do not start at zero. " + DEFECT,
    )


def _even_scores(evidence: Evidence, row: Mapping[str, Any], *, exact: bool) -> Check:
    if _reads(evidence.manifest, REWARD_BASE):
        return skipped("initial_loss", "it starts from a given reward base, which may bring a head that is not zero")
    # The members of an ensemble start with heads that differ a little.
    slack = _DRAWN_HEADS if int(evidence.manifest.config.get("ensemble_size", 1)) > 1 else 0.0
    margins = row.get("reward/even_loss")  # with margins, equal scores are not what is asked for
    expected = math.log(2) if margins is None else float(margins)
    name = f"{'ln 2' if margins is None else 'equal scores'} = {expected:.6f}"
    return _starts_at(expected, name, row, exact=exact, slack=slack)


def _ratio(row: Mapping[str, Any], *, exact: bool) -> Iterable[Check]:
    """The first minibatch is judged by the very policy that sampled it."""
    allowed = {"ppo/approx_kl": 1e-6 if exact else 1e-3, "ppo/clip_fraction": 0.0 if exact else 0.01}
    for metric, tolerance in allowed.items():
        name, found = f"initial_{metric.removeprefix('ppo/')}", row.get(metric)
        if not isinstance(found, int | float):
            yield skipped(name, f"{metric} was not recorded")
            continue
        yield compared(
            name,
            abs(found) <= tolerance,
            f"{found:g} in the first minibatch",
            f"0 ± {tolerance:g}, because the ratio is 1",
            "Rollout and training do not compute the same log-probabilities: temperature, packing or number format "
            "differ. " + DEFECT,
        )
