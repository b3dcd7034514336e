"""Every model of the run on the same held-out data: language, responses, preferences, scores and win rates.

Scores come from the run's own reward model, or the given one, so they say how well a model pleases it, not how good it
is; perplexity, response loss and KL next to them show what that cost. A run without a reward model has neither scores
nor win rates. Prompts share their random numbers across models, so that win rates compare answers to the same draws.
What is measured is listed in `stages/config/metrics.py`.

Shape legend: N targets, S segments, P pairs.
"""

import json
import logging
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from stages.config.closing import SCORE, WIN_RATE, EvaluateConfig
from stages.config.errors import DataError
from stages.config.graph import (
    BASE_MODEL,
    GRAPH,
    REWARD_MODEL,
    aligned_models,
    language_models,
    spec_of_role,
    trained_stages,
)
from stages.config.records import without_non_finite
from stages.data.tokens.packing import (
    Packed,
    RowBudget,
    TokenSequence,
    collate,
    lay_out,
    prompt_and_response,
    split_by_rows,
)
from stages.data.tokens.ragged import Ragged
from stages.data.tokens.views import Split, TokensArtifact, evenly
from stages.job.context import StageContext, StageOutcome
from stages.job.devices import local_device
from stages.job.workers import launch
from stages.losses import bits_per_byte, calibration_error, pair_accuracy, perplexity
from stages.models.answers import Answerer, InProcess
from stages.models.build import load_causal_lm, load_reward_model
from stages.models.forward import next_token_loss_sum, segment_logprobs, segment_scores
from stages.models.generation import Sampling
from stages.models.precision import autocast
from stages.models.same_tokenizer import check_given_scorer
from stages.train.next_token import DocumentRows

logger = logging.getLogger(__name__)

_TOKENS_AT_ONCE = 1 << 24
"""Of the training data, when its tokens are counted: 128 MiB as int64."""


def run(context: StageContext) -> StageOutcome:
    return launch(context, measure_models)


def language_roles() -> list[str]:
    """Roles of the models that write text, in the order of the pipeline; the first may be a given base model."""
    return [spec.role for spec in language_models()]


def reference_role(roles: Collection[str]) -> str:
    """Role of the model that the aligned ones start from: KL, implicit rewards and win rates are relative to it. Where
    the run has not made it, the given model has taken its place."""
    usual = GRAPH[dict(aligned_models()[0].inputs)["model"]].role
    return usual if usual in roles else language_roles()[0]


def scorer_role() -> str:
    return next(spec.role for spec in trained_stages() if spec.scores)


def measure_models(context: StageContext) -> StageOutcome:
    """Measure each model in turn. At most three are in memory: the one measured, the reference, the reward model."""
    config = context.config
    assert isinstance(config, EvaluateConfig)
    torch.set_num_threads(max(1, int(context.execution.cpus_per_worker)))
    bench = Bench(config, TokensArtifact(context.input_dir("tokens")), max_rows=context.execution.micro_batch_size)
    left_out = bench.left_out()
    folders = _model_folders(context)
    judge = context.identity_of(scorer_role(), REWARD_MODEL)
    reward = bench.reward_model(_judge_dir(context, bench)) if judge else None
    basis = reference_role(folders)
    reference = bench.language_model(folders[basis]) if basis in folders else None
    measured: dict[str, Measured] = {}
    for position, (role, folder) in enumerate(folders.items()):
        model = reference if role == basis and reference is not None else bench.language_model(folder)
        relative_to = reference if spec_of_role(role).aligned else None
        measured[role] = bench.measure(model, reference=relative_to, reward=reward)
        found = measured[role].metrics.get("eval/perplexity")
        shown = {} if found is None else {"perplexity": found}
        context.progress(position + 1, len(folders), "model", **shown)
    _add_win_rates(measured, basis)
    numbers = {role: result.metrics for role, result in measured.items()}
    unigram = bench.unigram_perplexity()
    quality = bench.reward_quality(reward) if reward is not None else {}
    for name, values in {**numbers, scorer_role(): quality}.items():
        left_out |= _without_infinite(name, values)
    report = {
        "models": numbers,
        **({} if unigram is None else {"unigram_perplexity": unigram}),
        "reward": quality,
        **({"left_out": left_out} if left_out else {}),
        "data": bench.describe(context),
        "reward_fingerprint": judge or None,
    }
    (context.output_dir / "metrics.json").write_text(json.dumps(report, indent=1, allow_nan=False))
    samples, _ = without_non_finite(bench.samples(measured))  # a score that is no number is null
    text = json.dumps(samples, indent=1, ensure_ascii=False, allow_nan=False)
    (context.output_dir / "samples.json").write_text(text)
    for what, reason in left_out.items():
        logger.warning("not measured: %s: %s", what, reason)
    ledger = {"data": report["data"], **({"left_out": left_out} if left_out else {})}
    return StageOutcome(metrics=_flat(report), ledger=ledger)


def _model_folders(context: StageContext) -> dict[str, Path]:
    folders = {role: context.input_dir(role) for role in language_roles() if role in context.inputs}
    if context.has_base_model:  # unless the run has trained it further and so has a base model of its own
        folders = {language_roles()[0]: context.given_dir(BASE_MODEL), **folders}
    return folders


def _judge_dir(context: StageContext, bench: "Bench") -> Path:
    folder = context.model_dir(scorer_role(), REWARD_MODEL)
    if context.has_given(REWARD_MODEL):
        bench.require_reads_ids(folder)
    return folder


@dataclass(frozen=True)
class Measured:
    """One language model's numbers and answers."""

    metrics: dict[str, float]
    shown: list[str]
    """Greedy answers to the prompts that are shown."""
    scores: np.ndarray
    """Reward-model score of each sampled answer; empty without a reward model."""
    shown_scores: list[float]


class Bench:
    """The held-out data, chosen once, and how to measure a model on it."""

    def __init__(self, config: EvaluateConfig, tokens: TokensArtifact, *, max_rows: int) -> None:
        self._config, self._tokens = config, tokens
        self._budget = RowBudget(row_length=tokens.sequence_length, max_rows=max_rows)
        self._device = local_device()
        self._tokenizer = tokens.tokenizer()
        documents = tokens.documents(Split.HELDOUT)
        self._document_rows = DocumentRows(documents, tokens.sequence_length)
        num_rows = max(1, config.max_documents_tokens // tokens.sequence_length)
        self._rows = evenly(len(self._document_rows), at_most=num_rows)
        self._conversations = tokens.conversations(Split.HELDOUT)
        self._pairs = tokens.pairs(Split.HELDOUT)
        prompts = tokens.prompts(Split.HELDOUT)
        chosen = evenly(len(prompts), at_most=config.max_prompts)
        self._prompts = [prompts[int(index)] for index in chosen]
        texts = json.loads((tokens.folder / "prompts" / Split.HELDOUT / "texts.json").read_text())
        self._prompt_texts = [texts[int(index)] for index in chosen]

    def left_out(self) -> dict[str, str]:
        """Return what cannot be measured, by what is missing, and why; raises DataError when nothing can be."""
        documents = self._tokens.documents(Split.HELDOUT).num_items
        too_short = f"the held-out documents have {documents} tokens together, a row has {self._tokens.sequence_length}"
        missing = {
            "documents": "" if len(self._rows) else too_short if documents else "there are no held-out documents",
            "responses": "" if len(self._conversations) else "there are no held-out conversations",
            "preferences": "" if len(self._pairs) else "there are no held-out preference pairs",
            "prompts": "" if self._prompts else "there are no held-out prompts",
        }
        left_out = {what: reason for what, reason in missing.items() if reason}
        if left_out == missing:
            raise DataError(
                f"there is nothing to evaluate on: {'; '.join(missing.values())}",
                advice="Bring more data, or hold out a larger share of it (curate.heldout_fraction).",
            )
        return left_out

    def language_model(self, folder: Path) -> nn.Module:
        return self._placed(load_causal_lm(folder, self._tokens))

    def reward_model(self, folder: Path) -> nn.Module:
        return self._placed(load_reward_model(folder, self._tokens))

    def require_reads_ids(self, folder: Path) -> None:
        """Raise ConfigError unless a given reward model scores texts of these tokens."""
        check_given_scorer(folder, self._tokenizer, role=REWARD_MODEL)

    def _placed(self, model: nn.Module) -> nn.Module:
        return model.eval().to(self._device)

    @torch.no_grad()
    def measure(self, model: nn.Module, *, reference: nn.Module | None, reward: nn.Module | None) -> Measured:
        metrics = self._language(model) | self._responses(model)
        if reference is not None:
            metrics |= self._preference(model, reference)
        answers = self._answerer(model, temperature=self._config.temperature).answers(self._prompts)
        if answers:
            metrics["eval/response_length"] = float(np.mean([len(answer) for answer in answers]))
        scores = self._scores(reward, answers) if reward is not None else np.empty(0)
        if len(scores):
            metrics |= {SCORE: float(scores.mean()), "eval/score_std": float(scores.std())}
        if reference is not None and answers:
            metrics["eval/kl"] = self._kl(model, reference, answers)
        # People are shown the most probable answer; numbers come from sampled ones.
        shown = self._answerer(model, temperature=0.0).answers(self._prompts[: self._config.num_samples])
        shown_scores = self._scores(reward, shown).tolist() if reward is not None else []
        texts = [self._tokenizer.decode(answer.tolist(), skip_special_tokens=True).strip() for answer in shown]
        return Measured(metrics, texts, scores, shown_scores)

    def _language(self, model: nn.Module) -> dict[str, float]:
        loss_sum = targets = 0.0
        for batch in self._document_batches():
            loss_sum += float(self._infer(next_token_loss_sum, model, batch))
            targets += batch.num_targets
        if not targets:
            return {}
        # Bytes are known by document, and rows cut documents: those of the measured tokens are their share of all.
        share_seen = targets / max(self._tokens.documents(Split.HELDOUT).num_items, 1)
        num_bytes = max(int(self._tokens.document_bytes(Split.HELDOUT).sum() * share_seen), 1)
        return {
            "eval/loss": loss_sum / targets,
            "eval/perplexity": perplexity(loss_sum / targets),
            "eval/bits_per_byte": bits_per_byte(loss_sum, num_bytes=num_bytes),
        }

    def _responses(self, model: nn.Module) -> dict[str, float]:
        chosen = evenly(len(self._conversations), at_most=self._config.max_instructions)
        loss_sum = targets = 0.0
        for batch in self._batches([self._conversations[int(index)] for index in chosen]):
            loss_sum += float(self._infer(next_token_loss_sum, model, batch))
            targets += batch.num_targets
        return {"eval/response_loss": loss_sum / targets} if targets else {}

    def _preference(self, model: nn.Module, reference: nn.Module) -> dict[str, float]:
        """Implicit-reward accuracy: does the model, relative to its reference, prefer the chosen answer?"""
        margins = []
        for batch in self._pair_batches():
            gain_S = self._infer(segment_logprobs, model, batch) - self._infer(segment_logprobs, reference, batch)
            margins.append(gain_S[0::2] - gain_S[1::2])
        if not margins:
            return {}
        # A margin above 0 is a win of the chosen answer, 0 is a tie.
        margins_P = torch.cat(margins)
        wins = pair_accuracy(margins_P, torch.zeros_like(margins_P))
        return {
            "eval/preference_accuracy": float(wins) / len(margins_P),
            "eval/preference_margin": float(margins_P.mean()),
        }

    def reward_quality(self, reward: nn.Module) -> dict[str, float]:
        """Accuracy, margin and calibration of the reward model, also by kind of pair."""
        margins = []
        for batch in self._pair_batches():
            with torch.no_grad():
                scores_S = self._infer(segment_scores, reward, batch, pad_id=self._tokens.pad_id)
            margins.append(scores_S[0::2] - scores_S[1::2])
        if not margins:
            return {}
        margins_P = torch.cat(margins).cpu()
        kinds = np.array(self._tokens.pair_kinds(Split.HELDOUT))[self._pair_indices()]
        result = {
            "reward/accuracy": _accuracy(margins_P),
            "reward/margin": float(margins_P.mean()),
            "reward/ece": calibration_error(margins_P),
        }
        for kind in sorted(set(kinds)):
            result[f"reward/accuracy_{kind}"] = _accuracy(margins_P[torch.from_numpy(kinds == kind)])
        return result

    def unigram_perplexity(self) -> float | None:
        """Perplexity on the held-out tokens of a unigram model of the training tokens (add-one smoothing); None without
        a held-out row."""
        counts = count_tokens(self._tokens.documents(Split.TRAIN), vocab_size=self._tokens.vocab_size) + 1.0
        logprobs = np.log(counts / counts.sum())  # what a model knows that only counts: the mark to beat
        total = targets = 0.0
        for batch in self._document_batches():
            ids = batch.input_ids_BT[batch.loss_mask_BT == 1].numpy()
            total -= float(logprobs[ids].sum())
            targets += len(ids)
        return perplexity(total / targets) if targets else None

    def describe(self, context: StageContext) -> dict[str, Any]:
        return {
            "digest": context.inputs["tokens"].digest,
            "num_document_tokens": len(self._rows) * self._budget.row_length,
            "num_conversations": min(len(self._conversations), self._config.max_instructions),
            "num_preferences": len(self._pair_indices()),
            "num_prompts": len(self._prompts),
            "heldout_document_tokens": self._tokens.documents(Split.HELDOUT).num_items,
        }

    def samples(self, measured: dict[str, Measured]) -> list[dict[str, Any]]:
        return [
            {
                "prompt": self._prompt_texts[index],
                "responses": {role: result.shown[index] for role, result in measured.items()},
                "scores": {
                    role: result.shown_scores[index] for role, result in measured.items() if result.shown_scores
                },
            }
            for index in range(min(self._config.num_samples, len(self._prompts)))
        ]

    def _answerer(self, model: nn.Module, *, temperature: float) -> Answerer:
        length, tokens = self._config.max_response_length, self._tokens
        sampling = Sampling(length, eos_id=tokens.eos_id, pad_id=tokens.pad_id, temperature=temperature)
        return Answerer(InProcess(model, self._device), sampling, seed=self._config.seed)

    def _answered(self, answers: list[np.ndarray]) -> list[Packed]:
        """Lay out the first prompts with the answers to them; the targets are the answers."""
        prompts = self._prompts[: len(answers)]
        return self._batches([prompt_and_response(*both) for both in zip(prompts, answers, strict=True)])

    def _scores(self, reward: nn.Module, answers: list[np.ndarray]) -> np.ndarray:
        scores = [
            self._infer(segment_scores, reward, batch, pad_id=self._tokens.pad_id).cpu().numpy()
            for batch in self._answered(answers)
        ]
        return np.concatenate(scores) if scores else np.empty(0)

    def _kl(self, model: nn.Module, reference: nn.Module, answers: list[np.ndarray]) -> float:
        """Mean over answers of log p - log p_ref of the whole answer: sampled KL in nats a response."""
        gains = [
            self._infer(segment_logprobs, model, batch) - self._infer(segment_logprobs, reference, batch)
            for batch in self._answered(answers)
        ]
        return float(torch.cat(gains).mean())

    def _infer(self, compute: Callable[..., Any], model: nn.Module, batch: Packed, **options: Any) -> Any:
        with torch.no_grad(), autocast(self._device):
            return compute(model, batch.to(self._device), **options)

    def _document_batches(self) -> list[Packed]:
        rows, size = [self._document_rows[int(index)] for index in self._rows], self._budget.max_rows
        return [collate(rows[start : start + size]) for start in range(0, len(rows), size)]

    def _batches(self, sequences: Sequence[TokenSequence]) -> list[Packed]:
        return [lay_out(part) for part in self._budget.cut(sequences)]

    def _pair_indices(self) -> np.ndarray:
        return evenly(len(self._pairs), at_most=self._config.max_preferences)

    def _pair_batches(self) -> list[Packed]:
        """Chosen and rejected answers in turn: segments 0::2 and 1::2."""
        pairs = [self._pairs[int(index)] for index in self._pair_indices()]
        groups = [(len(pair.chosen.ids), len(pair.rejected.ids)) for pair in pairs]
        return [
            lay_out([side for i in part for side in (pairs[i].chosen, pairs[i].rejected)])
            for part in split_by_rows(groups, row_length=self._budget.row_length, max_rows=self._budget.max_rows)
        ]


def count_tokens(documents: Ragged, *, vocab_size: int) -> np.ndarray:
    """Return how often each token occurs, in memory that does not grow with the data."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, documents.num_items, _TOKENS_AT_ONCE):
        part = documents.slice(start, min(start + _TOKENS_AT_ONCE, documents.num_items))
        counts += np.bincount(part, minlength=vocab_size)
    return counts


def _accuracy(margins_P: torch.Tensor) -> float:
    return float(pair_accuracy(margins_P, torch.zeros_like(margins_P))) / len(margins_P)


def _add_win_rates(measured: dict[str, Measured], basis: str) -> None:
    """Share of held-out prompts on which a model's sampled answer scores above the reference's; ties count one
    half."""
    if basis not in measured:
        return
    base = torch.from_numpy(measured[basis].scores)
    for result in measured.values():
        if len(result.scores):
            result.metrics[WIN_RATE] = float(pair_accuracy(torch.from_numpy(result.scores), base)) / len(base)


def _without_infinite(name: str, values: dict[str, float]) -> dict[str, str]:
    """Take numbers that are not finite out of `values`, which JSON does not have and no reader can compare; return why,
    by their names."""
    odd = {key: value for key, value in values.items() if not math.isfinite(value)}
    for key in odd:
        del values[key]
    return {f"{name} {key}": f"the result is not a finite number: {value}" for key, value in odd.items()}


def _flat(report: dict[str, Any]) -> dict[str, float]:
    flat = {f"{role}/{name}": value for role, metrics in report["models"].items() for name, value in metrics.items()}
    unigram = report.get("unigram_perplexity")
    return flat | report["reward"] | ({} if unigram is None else {"eval/unigram_perplexity": unigram})
