"""The numbers about each model as a whole, from the scores of the bench: what `stages/config/metrics.py` lists.

Some are no mean over items (perplexity, spread, win rate), and some compare only within the run's tokenizer: a model
with another one has no perplexity, no response loss and no length in tokens.

Shape legend: P pairs.
"""

import math

import numpy as np
import torch

from stages.config.closing import SCORE
from stages.data.tokens.packing import collate
from stages.data.tokens.ragged import Ragged
from stages.data.tokens.views import Split
from stages.judge.bench import Bench, Measured
from stages.judge.heldout import Heldout
from stages.judge.subjects import scorer_role
from stages.judge.suite import Score
from stages.losses.language import bits_per_byte, perplexity
from stages.losses.reward import calibration_error, pair_accuracy

_TOKENS_AT_ONCE = 1 << 24
"""Of the training data, when its tokens are counted: 128 MiB as int64."""


def metrics_of(role: str, bench: Bench, measured: Measured) -> dict[str, float]:
    """Return one model's numbers, win rates aside; a number whose items were all skipped is left out."""
    shares = bench.subjects.reads_run_tokens(role)
    metrics = _language(bench.heldout, _scores(measured, role, "rows"))
    if shares:
        metrics |= _responses(bench.heldout, _scores(measured, role, "responses"))
    metrics |= _mean("eval/preference_accuracy", _scores(measured, role, "preferences"))
    metrics |= _mean("eval/preference_margin", _scores(measured, role, "preference_margins"))
    answers = _scores(measured, role, "length")
    if answers and shares:
        metrics["eval/response_length"] = float(np.mean([score.tokens for score in answers]))
    if values := [score.value for score in _scores(measured, role, "score")]:
        metrics |= {SCORE: float(np.mean(values)), "eval/score_std": float(np.std(values))}
    return metrics | _mean("eval/kl", _scores(measured, role, "kl"))


def win_rates(roles: list[str], basis: str, measured: Measured) -> dict[str, float]:
    """Return by role on which share of the prompts a model's answer scores above the start's; ties count one half."""
    base = {score.item: score.value for score in _scores(measured, basis, "score")}
    rates = {}
    for role in roles:
        both = [(one.value, base[one.item]) for one in _scores(measured, role, "score") if one.item in base]
        if both:
            ours, theirs = torch.tensor(both, dtype=torch.float64).T
            rates[role] = float(pair_accuracy(ours, theirs)) / len(both)
    return rates


def reward_quality(bench: Bench, measured: Measured) -> dict[str, float]:
    """Accuracy, margin and calibration of the reward model, also by kind of pair."""
    found = {score.item: score.value for score in _scores(measured, scorer_role(), "reward_margins")}
    if not found:
        return {}
    heldout = bench.heldout
    kinds = np.array(heldout.tokens.pair_kinds(Split.HELDOUT))[heldout.pair_numbers]
    scored = [(found[pair.id], kind) for pair, kind in zip(heldout.pairs, kinds, strict=True) if pair.id in found]
    margins_P = torch.tensor([margin for margin, _ in scored], dtype=torch.float32)
    kinds_P = np.array([kind for _, kind in scored])
    result = {
        "reward/accuracy": _accuracy(margins_P),
        "reward/margin": float(margins_P.mean()),
        "reward/ece": calibration_error(margins_P),
    }
    for kind in sorted(set(kinds_P.tolist())):
        result[f"reward/accuracy_{kind}"] = _accuracy(margins_P[torch.from_numpy(kinds_P == kind)])
    return result


def unigram_perplexity(heldout: Heldout) -> float | None:
    """Perplexity on the held-out tokens of a unigram model of the training tokens (add-one smoothing); None without a
    held-out row."""
    tokens = heldout.tokens
    counts = count_tokens(tokens.documents(Split.TRAIN), vocab_size=tokens.vocab_size) + 1.0
    logprobs = np.log(counts / counts.sum())  # what a model knows that only counts: the mark to beat
    total = targets = 0.0
    for number in heldout.row_numbers:
        row = collate([heldout.rows[int(number)]])
        ids = row.input_ids_BT[row.loss_mask_BT == 1].numpy()
        total -= float(logprobs[ids].sum())
        targets += len(ids)
    return perplexity(total / targets) if targets else None


def count_tokens(documents: Ragged, *, vocab_size: int) -> np.ndarray:
    """Return how often each token occurs, in memory that does not grow with the data."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, documents.num_items, _TOKENS_AT_ONCE):
        part = documents.slice(start, min(start + _TOKENS_AT_ONCE, documents.num_items))
        counts += np.bincount(part, minlength=vocab_size)
    return counts


def without_infinite(name: str, values: dict[str, float]) -> dict[str, str]:
    """Take numbers that are not finite out of `values`, which JSON does not have and no reader can compare; return why,
    by their names."""
    odd = {key: value for key, value in values.items() if not math.isfinite(value)}
    for key in odd:
        del values[key]
    return {f"{name} {key}": f"the result is not a finite number: {value}" for key, value in odd.items()}


def _language(heldout: Heldout, rows: list[Score]) -> dict[str, float]:
    loss_sum, targets = sum(row.value for row in rows), sum(row.tokens for row in rows)
    if not targets:
        return {}
    # Bytes are known by document, and rows cut documents: those of the measured tokens are their share of all.
    share_seen = targets / max(heldout.tokens.documents(Split.HELDOUT).num_items, 1)
    num_bytes = max(int(heldout.tokens.document_bytes(Split.HELDOUT).sum() * share_seen), 1)
    return {
        "eval/loss": loss_sum / targets,
        "eval/perplexity": perplexity(loss_sum / targets),
        "eval/bits_per_byte": bits_per_byte(loss_sum, num_bytes=num_bytes),
    }


def _responses(heldout: Heldout, scores: list[Score]) -> dict[str, float]:
    num_bytes = {reply.id: reply.num_bytes for reply in heldout.conversations}
    loss_sum = sum(score.value * num_bytes[score.item] for score in scores)
    targets = sum(score.tokens for score in scores)
    return {"eval/response_loss": loss_sum / targets} if targets else {}


def _mean(key: str, scores: list[Score]) -> dict[str, float]:
    return {key: float(np.mean([score.value for score in scores]))} if scores else {}


def _scores(measured: Measured, role: str, suite: str) -> list[Score]:
    found = measured.get((role, suite))
    return found.scores if found is not None else []


def _accuracy(margins_P: torch.Tensor) -> float:
    return float(pair_accuracy(margins_P, torch.zeros_like(margins_P))) / len(margins_P)
