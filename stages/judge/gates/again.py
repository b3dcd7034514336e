"""Which number of a language model is measured again, by the stage that trained it, and from which held-out items."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import nn

from stages.config.gate_records import Check, skipped
from stages.config.graph import INSTRUCTIONS, Stage
from stages.config.principles import Area
from stages.config.request import Manifest
from stages.config.rollouts import PROMPT_FIELDS, PROMPT_LOSS
from stages.data.tokens.asked import asked_of
from stages.data.tokens.packing import RowBudget, TokenSequence, all_targets
from stages.data.tokens.views import PairView, Split, TokensArtifact, evenly
from stages.judge.gates import heldout
from stages.judge.gates.computing import Computing
from stages.models.build import load_causal_lm

DRIFT = "eval/dpo_chosen_drift"


class Rows(Protocol):
    """Held-out rows by index."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Sequence[TokenSequence]: ...


def measured_again(
    manifest: Manifest,
    model: nn.Module,
    tokens: TokensArtifact,
    computing: Computing,
    *,
    inputs: Mapping[str, Path],
    rows: Rows,
) -> Check:
    """What training measured last on held-out data, again; `rows` are those of a training on next tokens."""
    match manifest.stage:
        case Stage.PRETRAIN | Stage.SFT:
            chosen = evenly(len(rows), at_most=_eval_items(manifest)) if len(rows) else np.empty(0, dtype=np.int64)
            return _loss_again(manifest, "eval/loss", model, [rows[int(index)] for index in chosen], computing)
        case Stage.PPO:
            asked = PROMPT_FIELDS[manifest.config.get("prompts_from", INSTRUCTIONS)]
            prompts = asked_of(asked, tokens, Split.HELDOUT).prompts
            chosen = evenly(len(prompts), at_most=_eval_items(manifest))
            sequences = [all_targets(prompts[int(index)]) for index in chosen]
            # In rows that bound the memory; which prompts share one does not matter.
            budget = RowBudget(row_length=computing.row_length, max_rows=1)
            return _loss_again(manifest, PROMPT_LOSS, model, budget.cut(sequences), computing)
        case _ if heldout.is_quantized(manifest):
            return skipped(heldout.CHECK, "training measured the drift from a reference of 4 bits, which is not kept")
        case _ if "model" in inputs and DRIFT in manifest.metrics:
            return _drift_again(manifest, model, tokens, computing, inputs["model"])
        case _:
            return skipped(heldout.CHECK, "its reference is no artifact, or training measured no drift from it")


def _eval_items(manifest: Manifest) -> int:
    return int(manifest.config.get("eval_items", 0))


def _loss_again(
    manifest: Manifest, metric: str, model: nn.Module, rows: Sequence[Sequence[TokenSequence]], computing: Computing
) -> Check:
    lengths = np.array([sum(len(part.ids) for part in row) for row in rows])
    affordable = computing.affordable([model], lengths, asked=len(rows))
    if affordable.why:  # another number of rows would have another loss
        return skipped(heldout.CHECK, f"held-out rows are not measured again: {affordable.why}")
    with computing.as_trained(manifest):
        found = heldout.next_token_loss(model, rows, computing)
    why = "there are no held-out items"
    return heldout.compare_again(manifest, metric, found, why, alike=computing.computes_as(manifest))


def _drift_again(
    manifest: Manifest, model: nn.Module, tokens: TokensArtifact, computing: Computing, reference_dir: Path
) -> Check:
    """The drift is the difference of two sums over an answer, so both models compute as in training."""
    pairs, measured = tokens.pairs(Split.HELDOUT), pairs_of(manifest, tokens)
    indices = measured[evenly(len(measured), at_most=_eval_items(manifest))]
    affordable = computing.affordable([model, model], pair_lengths(pairs)[indices], asked=len(indices))
    if affordable.why:
        return skipped(heldout.CHECK, f"held-out pairs are not measured again: {affordable.why}")
    with computing.as_trained(manifest):
        after = heldout.pair_logprobs(model, pairs, indices, computing)
    model.to("cpu")  # one of them at a time is on the device
    reference: Any = load_causal_lm(reference_dir, tokens).eval()
    reference.to(computing.device)
    with computing.as_trained(manifest):
        before = heldout.pair_logprobs(reference, pairs, indices, computing)
    return heldout.compare_again(
        manifest,
        DRIFT,
        float((after[:, 0] - before[:, 0]).mean()),
        alike=computing.computes_as(manifest),
        targets=float(pairs.chosen.num_targets[indices].mean()),
    )


def pairs_of(manifest: Manifest, tokens: TokensArtifact) -> np.ndarray:
    """Which held-out pairs a model is measured on: those of the reasons that it learnt from, or all."""
    return tokens.pairs_naming(Split.HELDOUT, [Area(name) for name in manifest.config.get("reasons", ())])


def pair_lengths(pairs: PairView) -> np.ndarray:
    """Tokens of both answers, prompts included."""
    return pairs.chosen.lengths + pairs.rejected.lengths
