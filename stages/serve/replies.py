"""Answers in the words of OpenAI's API: whole ones and chunks of a stream, for chats and for completions."""

import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from stages.serve.answer import Answer, Piece, TokenScore
from stages.serve.loading import ServedModel
from stages.serve.text import token_bytes, token_text

_LEAST = -9999.0
"""What OpenAI writes for the logprob of what cannot be; JSON has no infinity."""


@dataclass(frozen=True)
class Reply:
    """What all parts of one reply have in common."""

    served: ServedModel
    is_chat: bool
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, int]) -> dict[str, Any]:
        return {**self._head(is_chunk=False), "choices": choices, "usage": usage}

    def chunk(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> dict[str, Any]:
        return {**self._head(is_chunk=True), "choices": choices, **({"usage": usage} if usage else {})}

    def _head(self, *, is_chunk: bool) -> dict[str, Any]:
        prefix, kind = ("chatcmpl", "chat.completion") if self.is_chat else ("cmpl", "text_completion")
        return {
            "id": f"{prefix}-{self.id}",
            "object": f"{kind}.chunk" if is_chunk and self.is_chat else kind,
            "created": self.created,
            "model": self.served.name,
            # the weights that answered: with the same ones, a seed gives the same answer
            "system_fingerprint": self.served.digest[:16] or None,
        }

    def choice(self, index: int, pieces: Sequence[Piece], *, prompt: str = "", answer: Answer) -> dict[str, Any]:
        """A whole answer; `prompt` is repeated in front of it."""
        text = "".join(piece.text for piece in pieces)
        scores = [score for piece in pieces for score in piece.scores]
        reason = next((piece.finish_reason for piece in pieces if piece.finish_reason), None)
        common = {"index": index, "finish_reason": reason}
        wants = answer.choice.top_logprobs is not None
        if self.is_chat:
            logprobs = chat_logprobs(self.served, scores) if wants else None
            return {**common, "message": {"role": "assistant", "content": text, "refusal": None}, "logprobs": logprobs}
        scores = [*answer.prompt_scores, *scores]
        return {**common, "text": prompt + text, "logprobs": text_logprobs(self.served, scores) if wants else None}

    def first_choice(self, index: int, prompt: str = "", answer: Answer | None = None) -> dict[str, Any] | None:
        """What a stream says before an answer's first token: whose turn it is, or the prompt that is repeated."""
        if self.is_chat:
            return {"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        if not prompt:
            return None
        scores = answer.prompt_scores if answer is not None and answer.choice.top_logprobs is not None else []
        logprobs = text_logprobs(self.served, scores) if scores else None
        return {"index": index, "text": prompt, "logprobs": logprobs, "finish_reason": None}

    def piece_choice(self, index: int, piece: Piece, *, offset: int) -> dict[str, Any]:
        """What one step added; `offset` is where its text begins in the answer."""
        common: dict[str, Any] = {"index": index, "finish_reason": piece.finish_reason}
        if self.is_chat:
            logprobs = {"logprobs": chat_logprobs(self.served, piece.scores)} if piece.scores else {}
            return {**common, "delta": {"content": piece.text} if piece.text else {}, **logprobs}
        logprobs = text_logprobs(self.served, piece.scores, offset=offset) if piece.scores else None
        return {**common, "text": piece.text, "logprobs": logprobs}


def usage_of(prompt_tokens: int, answers: Iterable[Answer]) -> dict[str, int]:
    written = sum(answer.num_tokens for answer in answers)
    return {"prompt_tokens": prompt_tokens, "completion_tokens": written, "total_tokens": prompt_tokens + written}


def chat_logprobs(served: ServedModel, scores: Iterable[TokenScore]) -> dict[str, Any]:
    def one(token: int, logprob: float | None) -> dict[str, Any]:
        data = token_bytes(served.tokenizer.backend, token)
        return {"token": token_text(data), "logprob": _finite(logprob), "bytes": list(data)}

    content = [
        {**one(score.token, score.logprob), "top_logprobs": [one(token, value) for token, value in score.top]}
        for score in scores
    ]
    return {"content": content, "refusal": None}


def text_logprobs(served: ServedModel, scores: Iterable[TokenScore], *, offset: int = 0) -> dict[str, Any]:
    """Completions list tokens in columns, and the most probable ones as a mapping from their texts."""
    backend = served.tokenizer.backend
    columns: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    data = b""
    for score in scores:
        columns["text_offset"].append(offset + len(data.decode(errors="ignore")))
        one = token_bytes(backend, score.token)
        data += one
        columns["tokens"].append(token_text(one))
        columns["token_logprobs"].append(_finite(score.logprob))
        top = [(token_text(token_bytes(backend, token)), _finite(value)) for token, value in score.top]
        # Two tokens may have one text, of which the more probable comes first.
        columns["top_logprobs"].append(dict(reversed(top)) if score.logprob is not None else None)
    return columns


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, _LEAST)
