"""Every model of the run on the same held-out data: language, responses, preferences, scores and win rates.

Scores come from the run's own reward model, so they say how well a model pleases it, not how good it is; perplexity,
response loss and KL beside them show what that cost. Prompts share their random numbers across models, so that win
rates compare answers to the same draws.

Shape legend: N targets, S segments, P pairs.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn

from stages.config.closing import EvaluateConfig
from stages.data.tokens.packing import Packed, TokenSequence, collate, lay_out, plan_rows, split_by_rows
from stages.data.tokens.views import Split, TokensArtifact, evenly
from stages.job.context import StageContext, StageOutcome
from stages.job.devices import local_device
from stages.job.workers import launch
from stages.losses import bits_per_byte, pair_accuracy, perplexity
from stages.models.build import load_causal_lm, load_reward_model
from stages.models.forward import next_token_loss_sum, segment_logprobs, segment_scores
from stages.models.generation import generate, uniforms
from stages.models.precision import autocast
from stages.train.next_token import DocumentRows

_ALIGNED = ("ppo", "dpo")
_LANGUAGE_MODELS = ("base", "sft", *_ALIGNED)


def run(context: StageContext) -> StageOutcome:
    return launch(context, measure_models)


def measure_models(context: StageContext) -> StageOutcome:
    """Measure each model in turn; only one policy is in memory at a time, beside the reference and the reward model."""
    config = context.config
    assert isinstance(config, EvaluateConfig)
    torch.set_num_threads(max(1, int(context.execution.cpus_per_worker)))
    bench = Bench(config, TokensArtifact(context.input_dir("tokens")), context.execution.micro_batch_size)
    folders = _model_folders(context)
    reward = bench.reward_model(context.input_dir("reward")) if "reward" in context.inputs else None
    reference = bench.language_model(folders["sft"]) if "sft" in folders else None
    measured: dict[str, Measured] = {}
    for position, (role, folder) in enumerate(folders.items()):
        model = reference if role == "sft" and reference is not None else bench.language_model(folder)
        measured[role] = bench.measure(model, reference=reference if role in _ALIGNED else None, reward=reward)
        context.progress(position + 1, len(folders), "model", perplexity=measured[role].metrics["eval/perplexity"])
    _add_win_rates(measured)
    report = {
        "models": {role: result.metrics for role, result in measured.items()},
        "unigram_perplexity": bench.unigram_perplexity(),
        "reward": bench.reward_quality(reward) if reward is not None else {},
        "data": bench.describe(context),
        "reward_fingerprint": context.inputs["reward"].fingerprint if reward is not None else None,
    }
    (context.output_dir / "metrics.json").write_text(json.dumps(report, indent=1))
    samples = bench.samples(measured)
    (context.output_dir / "samples.json").write_text(json.dumps(samples, indent=1, ensure_ascii=False))
    return StageOutcome(metrics=_flat(report), ledger={"data": report["data"]})


def _model_folders(context: StageContext) -> dict[str, Path]:
    folders = {role: context.input_dir(role) for role in _LANGUAGE_MODELS if role in context.inputs}
    if context.has_base_model:
        folders = {"base": context.base_model_dir(), **folders}
    return folders


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

    def __init__(self, config: EvaluateConfig, tokens: TokensArtifact, max_rows: int) -> None:
        self._config, self._tokens, self._max_rows = config, tokens, max_rows
        self._device = local_device()
        self._row_length = tokens.sequence_length
        self._tokenizer = Tokenizer.from_file(str(tokens.tokenizer_dir / "tokenizer.json"))
        documents = tokens.documents(Split.HELDOUT)
        self._document_rows = DocumentRows(documents, self._row_length)
        self._rows = evenly(len(self._document_rows), at_most=max(1, config.max_documents_tokens // self._row_length))
        self._conversations = tokens.conversations(Split.HELDOUT)
        self._pairs = tokens.pairs(Split.HELDOUT)
        prompts = tokens.prompts(Split.HELDOUT)
        chosen = evenly(len(prompts), at_most=config.max_prompts)
        self._prompts = [prompts[int(index)] for index in chosen]
        texts = json.loads((tokens.folder / "prompts" / Split.HELDOUT / "texts.json").read_text())
        self._prompt_texts = [texts[int(index)] for index in chosen]

    def language_model(self, folder: Path) -> nn.Module:
        return self._placed(load_causal_lm(folder, self._tokens))

    def reward_model(self, folder: Path) -> nn.Module:
        return self._placed(load_reward_model(folder, self._tokens))

    def _placed(self, model: nn.Module) -> nn.Module:
        return model.eval().to(self._device)

    @torch.no_grad()
    def measure(self, model: nn.Module, *, reference: nn.Module | None, reward: nn.Module | None) -> Measured:
        metrics = self._language(model) | self._responses(model)
        if reference is not None:
            metrics |= self._preference(model, reference)
        answers = self._answers(model, greedy=False)
        metrics["eval/response_length"] = float(np.mean([len(answer) for answer in answers])) if answers else 0.0
        scores = self._scores(reward, self._prompts, answers) if reward is not None else np.empty(0)
        if len(scores):
            metrics |= {"eval/score_mean": float(scores.mean()), "eval/score_std": float(scores.std())}
        if reference is not None and answers:
            metrics["eval/kl"] = self._kl(model, reference, answers)
        shown = self._answers(model, greedy=True, at_most=self._config.num_samples)
        shown_scores = self._scores(reward, self._prompts, shown).tolist() if reward is not None else []
        texts = [self._tokenizer.decode(answer.tolist(), skip_special_tokens=True).strip() for answer in shown]
        return Measured(metrics, texts, scores, shown_scores)

    def _language(self, model: nn.Module) -> dict[str, float]:
        loss_sum = targets = 0.0
        for batch in self._document_batches():
            loss_sum += float(self._infer(next_token_loss_sum, model, batch))
            targets += batch.num_targets
        if not targets:
            return {}
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
        for batch in self._packed([self._conversations[int(index)] for index in chosen]):
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

    def unigram_perplexity(self) -> float:
        """Perplexity on the held-out tokens of a unigram model of the training tokens (add-one smoothing)."""
        train = self._tokens.documents(Split.TRAIN)
        counts = np.bincount(train.slice(0, train.num_items), minlength=self._tokens.vocab_size) + 1.0
        logprobs = np.log(counts / counts.sum())
        total = targets = 0.0
        for batch in self._document_batches():
            ids = batch.input_ids_BT[batch.loss_mask_BT == 1].numpy()
            total -= float(logprobs[ids].sum())
            targets += len(ids)
        return perplexity(total / targets) if targets else math.inf

    def describe(self, context: StageContext) -> dict[str, Any]:
        return {
            "digest": context.inputs["tokens"].digest,
            "num_document_tokens": len(self._rows) * self._row_length,
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

    def _answers(self, model: nn.Module, *, greedy: bool, at_most: int | None = None) -> list[np.ndarray]:
        prompts = self._prompts[:at_most]
        answers: list[np.ndarray] = []
        for start in range(0, len(prompts), 64):
            part = prompts[start : start + 64]
            draws = uniforms(
                seed=self._config.seed,
                stream=0,
                indices=range(start, start + len(part)),
                length=self._config.max_response_length,
            )
            answers += self._infer(
                generate,
                model,
                part,
                max_response_length=self._config.max_response_length,
                eos_id=self._tokens.eos_id,
                pad_id=self._tokens.pad_id,
                temperature=self._config.temperature,
                uniforms_SR=None if greedy else draws,
            )
        return answers

    def _scores(self, reward: nn.Module, prompts: list[np.ndarray], answers: list[np.ndarray]) -> np.ndarray:
        scores = [
            self._infer(segment_scores, reward, batch, pad_id=self._tokens.pad_id).cpu().numpy()
            for batch in self._packed(_joined(prompts, answers))
        ]
        return np.concatenate(scores) if scores else np.empty(0)

    def _kl(self, model: nn.Module, reference: nn.Module, answers: list[np.ndarray]) -> float:
        """Mean over answers of log p - log p_ref of the whole answer: sampled KL in nats a response."""
        gains = [
            self._infer(segment_logprobs, model, batch) - self._infer(segment_logprobs, reference, batch)
            for batch in self._packed(_joined(self._prompts, answers))
        ]
        return float(torch.cat(gains).mean())

    def _infer(self, compute: Callable[..., Any], model: nn.Module, *arguments: Any, **options: Any) -> Any:
        moved = [a.to(self._device) if isinstance(a, Packed) else a for a in arguments]
        with torch.no_grad(), autocast(self._device):
            return compute(model, *moved, **options)

    def _document_batches(self) -> list[Packed]:
        rows = [self._document_rows[int(index)] for index in self._rows]
        return [collate(rows[start : start + self._max_rows]) for start in range(0, len(rows), self._max_rows)]

    def _packed(self, sequences: list[TokenSequence]) -> list[Packed]:
        plan = plan_rows([len(sequence.ids) for sequence in sequences], self._row_length)
        return [
            collate([[sequences[i] for i in row] for row in plan[start : start + self._max_rows]])
            for start in range(0, len(plan), self._max_rows)
        ]

    def _pair_indices(self) -> np.ndarray:
        return evenly(len(self._pairs), at_most=self._config.max_preferences)

    def _pair_batches(self) -> list[Packed]:
        pairs = [self._pairs[int(index)] for index in self._pair_indices()]
        groups = [(len(pair.chosen.ids), len(pair.rejected.ids)) for pair in pairs]
        return [
            lay_out([side for i in part for side in (pairs[i].chosen, pairs[i].rejected)])
            for part in split_by_rows(groups, row_length=self._row_length, max_rows=self._max_rows)
        ]


def _joined(prompts: list[np.ndarray], answers: list[np.ndarray]) -> list[TokenSequence]:
    return [
        TokenSequence(
            np.concatenate([prompt, answer]),
            np.concatenate([np.zeros(len(prompt), dtype=np.int64), np.ones(len(answer), dtype=np.int64)]),
        )
        for prompt, answer in zip(prompts, answers, strict=False)
    ]


def _accuracy(margins_P: torch.Tensor) -> float:
    return float(pair_accuracy(margins_P, torch.zeros_like(margins_P))) / len(margins_P)


def calibration_error(margins_P: torch.Tensor, *, num_bins: int = 10) -> float:
    """Expected calibration error of sigmoid(|margin|) as the probability that the preferred side is the chosen one.

    Guo et al. 2017 (arXiv:1706.04599), eq. 5, equal-width bins over [0.5, 1].
    """
    confidence = torch.sigmoid(margins_P.abs())
    correct = (margins_P > 0).float()
    bins = ((confidence - 0.5) * 2 * num_bins).long().clamp(max=num_bins - 1)
    error = 0.0
    for index in range(num_bins):
        inside = bins == index
        if inside.any():
            gap = (confidence[inside].mean() - correct[inside].mean()).abs()
            error += float(gap) * float(inside.float().mean())
    return error


def _add_win_rates(measured: dict[str, Measured]) -> None:
    """Share of held-out prompts on which a model's sampled answer scores above SFT's; ties count one half."""
    if "sft" not in measured:
        return
    base = torch.from_numpy(measured["sft"].scores)
    for result in measured.values():
        if len(result.scores):
            result.metrics["eval/win_rate"] = float(pair_accuracy(torch.from_numpy(result.scores), base)) / len(base)


def _flat(report: dict[str, Any]) -> dict[str, float]:
    flat = {f"{role}/{name}": value for role, metrics in report["models"].items() for name, value in metrics.items()}
    return flat | report["reward"] | {"eval/unigram_perplexity": report["unigram_perplexity"]}
