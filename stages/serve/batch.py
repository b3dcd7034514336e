"""The answers that one model writes at the same time, one token each a step: answers join and leave between steps.

Every prompt is read alone, in parts, so that a long one does not hold up the answers that are being written, and no
padding is read. Then its keys and values join those of the others, padded on the left to the same length. Models
whose caches are no plain keys and values (sliding windows, state spaces) keep an answer's cache apart, which is slower.

Shape legend: S answers, L tokens in the cache, C tokens of a part of a prompt, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stages.models.generation import token_at
from stages.serve.answer import Answer, TokenScore
from stages.serve.cache import is_plain, joined, kept_rows, new_cache, repeated

PROMPT_PART = 256
"""Tokens of a prompt that are read between two steps of the others."""


class NotFiniteError(Exception):
    """The model gave NaN where probabilities should be."""


@dataclass
class Group:
    """Answers whose keys and values lie in one cache."""

    answers: list[Answer]
    cache: Any
    mask_SL: Tensor
    """1 where a token stands, 0 for padding."""
    last_S: Tensor
    """The token of each answer that the model has not read yet."""

    def keep(self, rows: list[int]) -> None:
        """Drop all other answers, and the padding that nobody needs any more."""
        indices = torch.tensor(rows, device=self.mask_SL.device)
        mask = self.mask_SL[indices]
        padding = int((mask.cumsum(-1) == 0).sum(-1).min())
        kept_rows(self.cache, indices, padding=padding)
        self.answers = [self.answers[row] for row in rows]
        self.mask_SL, self.last_S = mask[:, padding:], self.last_S[indices]

    def join(self, other: "Group") -> None:
        """Take over the answers of another group."""
        width = max(self.mask_SL.shape[1], other.mask_SL.shape[1])
        joined(self.cache, other.cache, length=width)
        self.mask_SL = torch.cat([_padded(self.mask_SL, width), _padded(other.mask_SL, width)])
        self.last_S = torch.cat([self.last_S, other.last_S])
        self.answers += other.answers


def _padded(mask_SL: Tensor, width: int) -> Tensor:
    return nn.functional.pad(mask_SL, (width - mask_SL.shape[1], 0))


@torch.no_grad()
def read_prompt(model: Any, answers: list[Answer]) -> Iterator[Group | None]:
    """Read the prompt that some answers share, and choose their first tokens; yields None after each part of it but the
    last, and the group in the end."""
    first = answers[0]
    device = next(model.parameters()).device
    ids = torch.from_numpy(first.prompt)[None].to(device)
    length = ids.shape[1]
    cache, last_V = new_cache(model), None
    for start in range(0, length, PROMPT_PART):
        part_1C = ids[:, start : start + PROMPT_PART]
        end = start + part_1C.shape[1]
        out = model(
            input_ids=part_1C,
            attention_mask=torch.ones(1, end, dtype=torch.int64, device=device),
            position_ids=torch.arange(start, end, device=device)[None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=0 if first.choice.echo else 1,
        )
        logits_CV = _finite(out.logits[0])
        if first.choice.echo:
            _score_prompt(answers, part_1C[0], logits_CV, before_V=last_V)
        last_V = logits_CV[-1]
        if end < length:
            yield None
    assert last_V is not None
    if first.choice.max_tokens == 0:
        for answer in answers:
            answer.end_with_prompt()
        return
    repeated(cache, len(answers))
    mask = torch.ones(len(answers), length, dtype=torch.int64, device=device)
    group = Group(answers, cache, mask, torch.zeros(len(answers), dtype=torch.int64, device=device))
    _choose(group, last_V.expand(len(answers), -1))
    _leave(group)
    yield group


@torch.no_grad()
def step(model: Any, group: Group) -> None:
    """Write one more token of every answer of the group, and drop the answers that have ended."""
    _leave(group)
    if not group.answers:
        return
    positions_S1 = group.mask_SL.sum(-1, keepdim=True)
    group.mask_SL = nn.functional.pad(group.mask_SL, (0, 1), value=1)
    out = model(
        input_ids=group.last_S[:, None],
        attention_mask=group.mask_SL,
        position_ids=positions_S1,
        past_key_values=group.cache,
        use_cache=True,
        logits_to_keep=1,
    )
    group.cache = out.past_key_values
    _choose(group, _finite(out.logits[:, -1]))
    _leave(group)


def can_join(group: Group, other: Group) -> bool:
    return is_plain(group.cache) and is_plain(other.cache)


def _leave(group: Group) -> None:
    staying = [row for row, answer in enumerate(group.answers) if not (answer.is_done or answer.cancelled)]
    if len(staying) == len(group.answers):
        return
    if staying:
        group.keep(staying)
    else:
        group.answers, group.cache = [], None


def _finite(logits: Tensor) -> Tensor:
    logits = logits.float()
    if bool(logits.isnan().any()):
        raise NotFiniteError("the model's logits are NaN")
    return logits


def _choose(group: Group, logits_SV: Tensor) -> None:
    """Choose a token for each answer, and hand it over with the logprobs that were asked for."""
    choices = [answer.choice for answer in group.answers]
    device = logits_SV.device
    tokens_S = chosen_tokens(
        logits_SV,
        temperature_S=torch.tensor([choice.temperature for choice in choices], device=device),
        top_p_S=torch.tensor([choice.top_p for choice in choices], device=device),
        draws_S=torch.tensor([answer.draw for answer in group.answers], device=device),
    )
    group.last_S = tokens_S
    wanted = [row for row, choice in enumerate(choices) if choice.top_logprobs is not None]
    logprobs_SV = logits_SV[wanted].log_softmax(-1) if wanted else logits_SV[:0]
    for row, (answer, token) in enumerate(zip(group.answers, tokens_S.tolist(), strict=True)):
        if row in wanted:
            answer.add(_score(logprobs_SV[wanted.index(row)], token, answer.choice.top_logprobs or 0))
        else:
            answer.add(TokenScore(token, None))


def chosen_tokens(logits_SV: Tensor, *, temperature_S: Tensor, top_p_S: Tensor, draws_S: Tensor) -> Tensor:
    """Return one token a row: the most probable at temperature 0, otherwise the one that the row's draw points to.

    With `top_p` only the most probable tokens count whose predecessors together have less than that (nucleus sampling,
    Holtzman 2019, https://arxiv.org/abs/1904.09751); the most probable one always does.
    """
    greedy_S = logits_SV.argmax(-1)
    if bool((temperature_S == 0).all()):
        return greedy_S
    scaled_SV = logits_SV / torch.where(temperature_S == 0, 1.0, temperature_S)[:, None]
    probabilities_SV = scaled_SV.softmax(-1)
    if bool((top_p_S < 1).any()):
        sorted_SV, order_SV = probabilities_SV.sort(-1, descending=True)
        before_SV = sorted_SV.cumsum(-1) - sorted_SV
        sorted_SV = sorted_SV.masked_fill(before_SV >= top_p_S[:, None], 0.0)
        probabilities_SV = torch.zeros_like(probabilities_SV).scatter(-1, order_SV, sorted_SV)
    return torch.where(temperature_S == 0, greedy_S, token_at(probabilities_SV, draws_S))


def _score(logprobs_V: Tensor, token: int, count: int) -> TokenScore:
    values, tokens = logprobs_V.topk(min(count, len(logprobs_V)))
    return TokenScore(token, float(logprobs_V[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True)))


def _score_prompt(answers: list[Answer], part_C: Tensor, logits_CV: Tensor, *, before_V: Tensor | None) -> None:
    """Note the logprobs of a part of the prompt: each token is scored where it was predicted, one place earlier."""
    count = answers[0].choice.top_logprobs
    scores = [] if before_V is not None else [TokenScore(int(part_C[0]), None)]
    predicted = logits_CV[:-1] if before_V is None else torch.cat([before_V[None], logits_CV[:-1]])
    if count is not None:
        logprobs_CV = predicted.log_softmax(-1)
        tokens = part_C[len(scores) :].tolist()
        scores += [_score(logprobs_V, token, count) for logprobs_V, token in zip(logprobs_CV, tokens, strict=True)]
    for answer in answers:
        answer.prompt_scores += scores
