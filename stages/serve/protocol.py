"""What clients send, as OpenAI's API defines it: every field is either obeyed, without effect on answers, or refused.

Fields that this server cannot obey are accepted at the value that asks for nothing, because clients send defaults.
"""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

MOST_ANSWERS = 64
"""To one prompt."""
MOST_PROMPTS = 256
"""Of one request; all their answers together are as many at most."""
_MOST_STOPS = 16
_ABOUT_THE_CALLER = ("user", "metadata", "store", "safety_identifier", "prompt_cache_key", "service_tier")
"""Say who asks, or how the provider keeps and bills it; no answer depends on them."""
_ASKS_FOR_NOTHING: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}


class RequestError(Exception):
    """A request that cannot be answered, in OpenAI's terms."""

    def __init__(
        self, message: str, *, status: int = 400, kind: str = "invalid_request_error", param: str = "", code: str = ""
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.kind, self.param, self.code = message, status, kind, param, code

    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param or None,
                "code": self.code or None,
            }
        }


def _as_list(value: Any) -> Any:
    return [] if value is None else [value] if isinstance(value, str) else value


Stops = Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=_MOST_STOPS), BeforeValidator(_as_list)]


class StreamOptions(BaseModel):
    """What a stream holds besides the answers."""

    model_config = ConfigDict(extra="ignore")

    include_usage: bool = False
    """Whether a last chunk counts the tokens."""


class Asked(BaseModel):
    """What both kinds of request have."""

    model_config = ConfigDict(extra="forbid")

    model: str
    temperature: float = Field(default=1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0, le=1)
    n: int = Field(default=1, ge=1, le=MOST_ANSWERS)
    seed: int | None = None
    stop: Stops = Field(default_factory=list)
    stream: bool = False
    stream_options: StreamOptions = Field(default_factory=StreamOptions)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: Any) -> Any:
        """Leave out what changes nothing, and refuse what would and cannot be done."""
        if not isinstance(data, dict):
            return data
        kept = {}
        for name, value in data.items():
            if value is None or name in _ABOUT_THE_CALLER:
                continue  # null is OpenAI's word for a field that is not given
            if name in _ASKS_FOR_NOTHING and name not in cls.model_fields:
                if value not in _ASKS_FOR_NOTHING[name]:
                    raise ValueError(f"{name}={json.dumps(value)[:80]} is not supported by this server; leave it out")
                continue
            kept[name] = value
        return kept


class ChatAsked(Asked):
    """`POST /v1/chat/completions`."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    """The newer name of the same."""
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=20)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError(f"top_logprobs={self.top_logprobs} needs logprobs=true")
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise ValueError(
                f"max_tokens={self.max_tokens} and max_completion_tokens={self.max_completion_tokens} differ; give one"
            )
        return self

    @property
    def longest(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def scores(self) -> int | None:
        return self.top_logprobs if self.logprobs else None


TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class CompletionAsked(Asked):
    """`POST /v1/completions`; a prompt is text or token ids, and there may be several."""

    prompt: str | TokenIds | Annotated[list[str] | list[TokenIds], Field(min_length=1, max_length=MOST_PROMPTS)]
    max_tokens: int = Field(default=16, ge=0)
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: bool = False
    best_of: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.best_of is not None and self.best_of != self.n:
            raise ValueError(f"best_of={self.best_of} is not supported by this server; leave it out, or set it to n")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens=0 asks for nothing; add echo=true to get the prompt's log-probabilities")
        if len(self.prompts) * self.n > MOST_PROMPTS:
            raise ValueError(f"n={self.n} answers to {len(self.prompts)} prompts; allowed: {MOST_PROMPTS} together")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]  # pyright: ignore[reportReturnType]
        return list(self.prompt)  # pyright: ignore[reportReturnType]


Kind = type[ChatAsked] | type[CompletionAsked]


def parse_request(kind: Kind, body: bytes) -> Any:
    """Read a request's body; raises RequestError that names the field, the value and what is allowed."""
    try:
        found = json.loads(body, parse_constant=_refuse_constant)
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RequestError("the body holds half a character (an unpaired surrogate)") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise RequestError(f"the body is a JSON {type(found).__name__}, not an object")
    try:
        return kind.model_validate(found)
    except ValidationError as error:
        raise _told(error, kind) from None


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _told(error: ValidationError, kind: Kind) -> RequestError:
    first = error.errors(include_url=False)[0]
    field = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        known = ", ".join(sorted(kind.model_fields))
        return RequestError(
            f"unknown field {field!r}; this server knows {known}", param=field, code="unknown_parameter"
        )
    message = first["msg"].removeprefix("Value error, ")
    if not field:  # a rule over several fields, whose message names them
        return RequestError(message, param=message.partition("=")[0] if "=" in message else "")
    place = ".".join(
        str(part) for part in first["loc"] if not str(part).startswith(("list[", "constrained", "function"))
    )
    value = "" if first["type"] == "missing" else f"={json.dumps(first['input'], default=str)[:80]}"
    return RequestError(f"{place}{value}: {message}", param=field)


Finish = Literal["stop", "length"]
