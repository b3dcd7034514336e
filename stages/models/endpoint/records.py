"""What an endpoint is asked, and what comes of it: an answer, or the reason why there is none."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from stages.config.endpoints import EndpointConfig

AWAY, REFUSED, GARBAGE, BUDGET = "endpoint_away", "endpoint_refused", "endpoint_answered_garbage", "budget_spent"
TOO_LONG = "prompt_too_long"
"""Reasons for which there is no answer."""
MAY_COME = frozenset({AWAY, BUDGET})
"""Those that say nothing about the question: a later attempt, or a larger budget, may bring an answer."""


@dataclass(frozen=True)
class ChatRequest:
    """One question to a chat model."""

    messages: tuple[Mapping[str, str], ...]
    """`role` and `content` of every turn, oldest first."""
    max_tokens: int
    """Of the answer."""
    temperature: float = 0.0
    number: int = 0
    """Keeps apart several answers to the same messages; also the seed that is sent."""

    def body(self, config: EndpointConfig) -> dict[str, Any]:
        """Return the JSON of the request."""
        seed = {"seed": self.number} if config.send_seed else {}
        return {
            "model": config.model,
            "messages": [dict(message) for message in self.messages],
            "temperature": self.temperature,
            config.limit_field: self.max_tokens,
            **seed,
        }

    def digest(self, config: EndpointConfig) -> str:
        """Return what identifies the request at this endpoint. What runs there under the model's name is not known."""
        known = [config.endpoint.rstrip("/"), self.body(config), self.number]
        return hashlib.sha256(json.dumps(known, sort_keys=True, ensure_ascii=False).encode()).hexdigest()

    def most_prompt_tokens(self) -> int:
        """Return what the prompt has at most: a token stands for a byte or more, apart from a template's few."""
        return sum(len(message["content"].encode()) + _TOKENS_OF_A_TURN for message in self.messages)


_TOKENS_OF_A_TURN = 16
"""Role and marks that a chat template puts around a turn; no template of ours or of the models we know has more."""


@dataclass(frozen=True)
class Usage:
    """Tokens that an answer cost."""

    prompt_tokens: int = 0
    answer_tokens: int = 0
    estimated: bool = False
    """The endpoint did not say; then they are counted as the most that they can be."""

    @property
    def tokens(self) -> int:
        """All of them."""
        return self.prompt_tokens + self.answer_tokens

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.answer_tokens + other.answer_tokens,
            self.estimated or other.estimated,
        )


@dataclass(frozen=True)
class Completion:
    """What the endpoint answered."""

    text: str | None
    """None where the message has no text: a model that only thought, or called a tool."""
    finish_reason: str = ""
    usage: Usage = Usage()
    cached: bool = False
    """It was asked before, by this or by an earlier attempt."""

    @property
    def is_cut(self) -> bool:
        """Whether the limit of the answer ended it."""
        return self.finish_reason == "length"

    def to_json(self) -> dict[str, Any]:
        """As it is kept in the store."""
        return {"text": self.text, "finish_reason": self.finish_reason, "usage": asdict(self.usage)}

    @classmethod
    def from_json(cls, told: Any) -> "Completion":
        """Read what was kept; raises ValueError for what is not that."""
        try:
            text, ended, usage = told["text"], told["finish_reason"], Usage(**told["usage"])
        except (TypeError, KeyError) as error:
            raise ValueError(f"it is no kept answer: {error!r}") from None
        counts = (usage.prompt_tokens, usage.answer_tokens)
        if not (text is None or isinstance(text, str)) or not isinstance(ended, str) or set(map(type, counts)) != {int}:
            raise ValueError("it is no kept answer")
        return cls(text, ended, usage, cached=True)


@dataclass(frozen=True)
class Unanswered:
    """No answer, and why: one of the reasons above."""

    reason: str
    told: str = ""
    """What the endpoint or the network said, for the log; without the key."""


Outcome = Completion | Unanswered
