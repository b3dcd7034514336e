"""A judge that is a language model of this process: which verdict is likelier as its next token, or what it writes.

By likelihood even a small model always answers, and its preference for a place is cancelled by asking in both orders;
it never says that neither is better. A model that thinks before it answers should write.

Shape legend: V vocabulary.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from stages.config.errors import ConfigError
from stages.config.judging import JudgeConfig
from stages.data.pairs.turns import Unusable
from stages.data.tokens.packing import RowBudget, TokenSequence, lay_out
from stages.data.tokens.tokenizer import LoadedTokenizer
from stages.judge.pairwise import CUT, NOT_FINITE, TOO_LONG, UNCLEAR, Answer, Preferred, Question, read_verdict
from stages.judge.prompts import filled, prompt_digest, prompt_text
from stages.models.answers import Answerer, InProcess
from stages.models.forward import run_trunk
from stages.models.generation import Sampling
from stages.models.precision import autocast, compute_dtype

_SPELLINGS = {Preferred.FIRST: ("A", " A"), Preferred.SECOND: ("B", " B")}
"""What a verdict may be as a token: after some templates with the blank before it."""


class InProcessJudge:
    """A model with its own tokenizer and chat template."""

    def __init__(
        self,
        config: JudgeConfig,
        model: nn.Module,
        tokenizer: LoadedTokenizer,
        *,
        identity: str,
        device: torch.device,
        context_length: int,
        max_rows: int = 8,
        eos_id: int | None = None,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        """`identity` is the digest of the model's content, `max_rows` bounds how many questions are read at once,
        `eos_id` ends a written verdict (the tokenizer's, unless given). Raises ConfigError for a tokenizer without
        tokens for the verdicts."""
        self._config, self._model, self._tokenizer, self._device = config, model, tokenizer, device
        self._content, self._context_length, self._max_rows, self._beat = identity, context_length, max_rows, beat
        self._eos_id = tokenizer.eos_id if eos_id is None else eos_id
        self._template = prompt_text(config.prompt)
        by_likelihood = config.method == "likelihood"
        self._verdicts = {one: self._ids_of(spellings) for one, spellings in _SPELLINGS.items() if by_likelihood}

    @property
    def identity(self) -> str:
        return identity_of(self._config, self._content, compute_dtype(self._device))

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        room = self._config.answer_tokens if self._config.method == "generation" else 1
        answers: list[Answer] = [TOO_LONG] * len(questions)
        encoded: dict[int, np.ndarray] = {}
        for place, question in enumerate(questions):
            try:
                ids = self._encoded(question)
            except Unusable as error:
                answers[place] = error.reason
                continue
            if len(ids) + room <= self._context_length:
                encoded[place] = ids
        answer = self._written if self._config.method == "generation" else self._likelier
        for place, found in zip(encoded, answer(list(encoded.values())), strict=True):
            answers[place] = found
        return answers

    def _encoded(self, question: Question) -> np.ndarray:
        asked = filled(self._template, question=question.prompt, first=question.first, second=question.second)
        return self._tokenizer.chat().encode_prompt([{"role": "user", "content": asked}])

    def _likelier(self, prompts: Sequence[np.ndarray]) -> list[Answer]:
        answers: list[Answer] = []
        budget = RowBudget(max((len(ids) for ids in prompts), default=1), self._max_rows)
        for part in budget.cut([TokenSequence(ids, np.zeros(len(ids), dtype=np.int64)) for ids in prompts]):
            batch = lay_out(part)
            last = torch.as_tensor(batch.spans_D4[:, 1] - 1)
            with torch.no_grad(), autocast(self._device):
                hidden_BTH = run_trunk(self._model, batch.to(self._device)).last_hidden_BTH
                head = self._model.get_output_embeddings()  # type: ignore[operator]
                logits_DV = head(hidden_BTH.flatten(0, 1)[last.to(self._device)]).float().cpu()
            # Of two spellings of one verdict the model means the same: their probabilities add up.
            said = {preferred: logits_DV[:, ids].logsumexp(dim=1) for preferred, ids in self._verdicts.items()}
            margins = (said[Preferred.FIRST] - said[Preferred.SECOND]).tolist()
            answers += map(_likelier, margins)
            self._beat()
        return answers

    def _ids_of(self, spellings: Sequence[str]) -> list[int]:
        """The tokens that are a verdict; two spellings may be one token."""
        encoded = [self._tokenizer.backend.encode(text, add_special_tokens=False).ids for text in spellings]
        if not (single := sorted({ids[0] for ids in encoded if len(ids) == 1})):
            raise ConfigError(
                f"judge: its tokenizer has no single token for {spellings[0]!r}, so no verdict is likelier",
                advice="Set evaluate.judge.method=generation, or give another judge.",
            )
        return single

    def _written(self, prompts: Sequence[np.ndarray]) -> list[Answer]:
        length, eos = self._config.answer_tokens, self._eos_id
        sampling = Sampling(length, eos_id=eos, pad_id=self._tokenizer.pad_id, temperature=0.0)
        answerer = Answerer(InProcess(self._model, self._device), sampling, seed=0, batch_size=self._max_rows)
        answers: list[Answer] = []
        for part in answerer.in_batches(prompts):
            for ids in part:
                text = self._tokenizer.backend.decode(ids.tolist(), skip_special_tokens=True)
                ended = len(ids) > 0 and int(ids[-1]) == eos
                answers.append(read_verdict(text) or (UNCLEAR if ended else CUT))
            self._beat()
        return answers


def _likelier(margin: float) -> Answer:
    """The margin is the log of how much likelier the first verdict is."""
    if math.isnan(margin):
        return NOT_FINITE
    return Preferred.FIRST if margin > 0 else Preferred.SECOND if margin < 0 else Preferred.NEITHER


def identity_of(config: JudgeConfig, content: str, dtype: torch.dtype) -> str:
    """Hash over the model's content, the number format and how it is asked."""
    length = config.answer_tokens if config.method == "generation" else 0
    parts = [content, config.method, prompt_digest(config.prompt), length, str(dtype)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
