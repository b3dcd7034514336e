"""Settings of the judges that an evaluation may have besides the suites that count right answers: rules and models."""

import re
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from stages.config.base import Config
from stages.config.endpoints import (
    FOR_JUDGES,
    KEY_CONNECTION,
    EndpointConfig,
    check_key_fields,
    key_connection,
    key_variable,
    plain_address,
)

SHIPPED_PROMPTS = ("pairwise-v1",)
"""Prompts of `stages/judge/prompts`; a file there never changes, another text gets another name."""
PLACES = ("{question}", "{first}", "{second}")
"""What a judge's prompt must have places for."""


class JudgeConfig(Config):
    """A model that compares two responses: of each model, and of the model that the aligned ones start from."""

    endpoint: str = ""
    """OpenAI-compatible endpoint to ask, such as `https://host/v1`; filled from the field `judge` of the form. A model
    that is asked in this process is given there too, and is no setting of the evaluation."""
    model: str = ""
    """Name by which the endpoint knows the model."""
    api_key_env: str = ""
    """Variable in the environment of Ray's workers that holds the endpoint's key; its name begins with
    `ATHANOR_JUDGE_`. Empty: no key is sent, unless a connection has it. The key itself is never stored."""
    api_key_connection: str = ""
    """Airflow connection that holds the endpoint's key as its password, in place of `api_key_env`. Its type is
    `model_endpoint`, its host the address that the key is for. Not part of the fingerprint."""
    prompt: str = "pairwise-v1"
    """Name of a shipped prompt, or the text of one with the places `{question}`, `{first}` and `{second}`."""
    method: Literal["likelihood", "generation"] = "likelihood"
    """How a model of this process answers: which verdict is likelier as its next token, or what it writes. Endpoints
    always write."""
    max_items: int = Field(default=128, ge=1)
    """Prompts on which responses are compared, of those that the evaluation samples responses to."""
    max_pairs: int = Field(default=128, ge=1)
    """Held-out preference pairs on which the judge's own agreement is measured before it judges."""
    answer_tokens: int = Field(default=64, ge=1)
    """Tokens of a written verdict at most; thinking counts too."""
    limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """Name of the limit in requests to the endpoint; some models take only the second."""
    temperature: float = Field(default=0.0, ge=0, le=2)
    """Sampling temperature of written verdicts at the endpoint."""
    concurrency: int = Field(default=4, ge=1, le=256)
    """Requests to the endpoint at once."""
    timeout_seconds: float = Field(default=60.0, gt=0, le=3600)
    """Time for one request, from its first byte to its last."""
    max_retries: int = Field(default=4, ge=0, le=20)
    """Further attempts at a request that failed for a reason that may pass; each waits longer."""
    max_requests: int = Field(default=4000, ge=1)
    """Requests to the endpoint in one evaluation, repeated ones counted. What is left then is not judged."""
    max_minutes: float = Field(default=120.0, gt=0, le=10_000)
    """Time for all questions to the endpoint in one evaluation. What is left then is not judged."""

    def identity(self, *, only_given: bool = False) -> dict[str, Any]:
        """As for every config, without where the key is kept."""
        found = super().identity(only_given=only_given)
        return {name: value for name, value in found.items() if name != KEY_CONNECTION}

    @property
    def has_key(self) -> bool:
        """Whether a key is sent along."""
        return bool(self.api_key_env or self.api_key_connection)

    @property
    def asked(self) -> EndpointConfig:
        """The endpoint as every client of one asks it."""
        return EndpointConfig(
            endpoint=self.endpoint,
            model=self.model,
            api_key_env=self.api_key_env,
            api_key_connection=self.api_key_connection,
            limit_field=self.limit_field,
            send_seed=False,
            concurrency=self.concurrency,
            timeout_seconds=self.timeout_seconds,
            max_retries=self.max_retries,
            budget_requests=self.max_requests,
            max_minutes=self.max_minutes,
        )

    @field_validator("endpoint")
    @classmethod
    def _no_login_in_the_address(cls, endpoint: str) -> str:
        return plain_address(endpoint)

    @field_validator("api_key_env")
    @classmethod
    def _a_variable_for_judges(cls, name: str) -> str:
        return key_variable(name, FOR_JUDGES, whose="judges")

    @field_validator(KEY_CONNECTION)
    @classmethod
    def _a_connection(cls, name: str) -> str:
        return key_connection(name)

    @field_validator("prompt")
    @classmethod
    def _has_all_places(cls, prompt: str) -> str:
        if prompt in SHIPPED_PROMPTS:
            return prompt
        if missing := [place for place in PLACES if prompt.count(place) != 1]:
            raise ValueError(
                f"prompt={prompt[:80]!r} is not a shipped one ({', '.join(SHIPPED_PROMPTS)}) and does not have exactly "
                f"one of {', '.join(missing)}"
            )
        return prompt

    @model_validator(mode="after")
    def _endpoint_and_model(self) -> "JudgeConfig":
        check_key_fields(self.endpoint, env=self.api_key_env, connection=self.api_key_connection)
        if self.endpoint and not self.model:
            raise ValueError(f"model is empty, and {self.endpoint} may serve several; set evaluate.judge.model")
        return self


@dataclass(frozen=True)
class Rule:
    """A rule, taken apart."""

    kind: Literal["regex", "length", "json", "python"]
    pattern: str = ""
    least: int = 0
    most: int = 0
    function: str = ""
    """`module:name`."""


def parse_rule(text: str) -> Rule:
    """Take a rule apart; raises ValueError that names what is allowed."""
    kind, _, rest = text.partition(":")
    match kind:
        case "json" if not rest:
            return Rule("json")
        case "regex" if rest:
            try:
                re.compile(rest)
            except re.error as error:
                raise ValueError(f"rule={text!r}: {rest!r} is no regular expression: {error}") from None
            return Rule("regex", pattern=rest)
        case "length":
            found = re.fullmatch(r"(\d{1,9})-(\d{1,9})", rest)
            if found and int(found[1]) <= int(found[2]):
                return Rule("length", least=int(found[1]), most=int(found[2]))
            raise ValueError(f"rule={text!r} must be length:<least>-<most> in characters, such as length:1-400")
        case "python" if re.fullmatch(r"[\w.]+:\w+", rest):
            return Rule("python", function=rest)
    raise ValueError(
        f"rule={text!r} is not one of regex:<pattern>, length:<least>-<most>, json, python:<module>:<function>"
    )


class GoldSettings(Config):
    """What scores responses that no model was trained against, apart from the gold scorer and the judge."""

    rule: str = ""
    """Rule that gives each sampled response 1 or 0, as suite `rule`: `regex:<pattern>` (found in it), `length:1-400`
    (characters), `json` (the whole response is JSON), or `python:<module>:<function>` of a response and its prompt, any
    number; the module must be in `ATHANOR_RULE_MODULES` of Ray's workers. Empty: none."""

    @field_validator("rule")
    @classmethod
    def _understood(cls, rule: str) -> str:
        if rule:
            parse_rule(rule)
        return rule
