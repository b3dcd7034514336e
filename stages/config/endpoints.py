"""Which HTTP endpoints a run may ask, and how: whoever may trigger a run chooses an address, whoever runs the workers
decides.

A request carries texts of the run and perhaps a key of the operator's. So an endpoint must begin with one of the
addresses in `ATHANOR_ENDPOINTS` (separated by spaces or commas), in the environment of Airflow and of Ray's workers.
`ATHANOR_JUDGE_ENDPOINTS` lists more of them, for judges only. One on loopback need not be listed, unless a key is sent
there.
"""

import os
import re
from collections.abc import Sequence
from ipaddress import ip_address
from typing import Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from stages.config.base import Config
from stages.config.errors import ConfigError

ALLOWED, ALLOWED_FOR_JUDGES = "ATHANOR_ENDPOINTS", "ATHANOR_JUDGE_ENDPOINTS"

FOR_ENDPOINTS, FOR_JUDGES = "ATHANOR_ENDPOINT_", "ATHANOR_JUDGE_"
"""How the names of variables begin that may hold a key."""

KEY_CONNECTION = "api_key_connection"
"""Name of the field that names a connection."""


class EndpointConfig(Config):
    """An OpenAI-compatible endpoint, how it is asked, and what may be spent there."""

    endpoint: str = ""
    """Address to ask, such as `https://host/v1`."""
    model: str = ""
    """Name by which the endpoint knows the model."""
    api_key_env: str = ""
    """Variable in the environment of Ray's workers that holds the endpoint's key; its name begins with
    `ATHANOR_ENDPOINT_`. Empty: no key is sent, unless a connection has it. The key itself is never stored."""
    api_key_connection: str = ""
    """Airflow connection that holds the endpoint's key as its password, in place of `api_key_env`. Its type is
    `model_endpoint`, its host the address that the key is for. Not part of the fingerprint."""
    limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """Name of the limit of an answer in requests; some models take only the second."""
    send_seed: bool = True
    """Send a seed with each request, so that an endpoint that obeys it answers the same again. Some refuse it."""
    concurrency: int = Field(default=4, ge=1, le=256)
    """Requests at once. Neither this nor the next four settings are part of the fingerprint."""
    timeout_seconds: float = Field(default=120.0, gt=0, le=3600)
    """Time for one request, from its first byte to its last."""
    max_retries: int = Field(default=6, ge=0, le=20)
    """Further attempts at a request that failed for a reason that may pass; each waits longer."""
    requests_per_minute: int = Field(default=0, ge=0)
    """Most requests in any 60 seconds; 0 = as many as the concurrency allows."""
    tokens_per_minute: int = Field(default=0, ge=0)
    """Most tokens of prompts and answers in any 60 seconds; 0 = no limit."""
    budget_requests: int = Field(default=0, ge=0)
    """Most requests that one artifact may cost, repeated ones counted; 0 = no limit. What a budget does not reach is
    left out and counted, and what is done is kept. With a larger budget the next run continues from there."""
    budget_tokens: int = Field(default=0, ge=0)
    """Most tokens of prompts and answers that one artifact may cost; 0 = no limit."""
    budget_cost: float = Field(default=0.0, ge=0)
    """Most money that one artifact may cost, in the currency of the prices; 0 = no limit."""
    price_prompt: float = Field(default=0.0, ge=0)
    """Price of a million tokens of prompts."""
    price_answer: float = Field(default=0.0, ge=0)
    """Price of a million tokens of answers."""
    max_minutes: float = Field(default=0.0, ge=0, le=100_000)
    """Time for all requests of one attempt; 0 = no limit."""

    how_fast: ClassVar[frozenset[str]] = frozenset(
        {"concurrency", "timeout_seconds", "max_retries", "requests_per_minute", "tokens_per_minute"}
    )
    """Fields that decide nothing but speed."""

    def identity(self, *, only_given: bool = False) -> dict[str, Any]:
        """As for every config, without what decides nothing but speed, and without where the key is kept."""
        found = super().identity(only_given=only_given)
        left_out = {*self.how_fast, KEY_CONNECTION}
        return {name: value for name, value in found.items() if name not in left_out}

    @property
    def has_key(self) -> bool:
        """Whether a key is sent along."""
        return bool(self.api_key_env or self.api_key_connection)

    def cost(self, prompt_tokens: float, answer_tokens: float) -> float:
        """Return the price of so many tokens."""
        return (prompt_tokens * self.price_prompt + answer_tokens * self.price_answer) / 1e6

    @field_validator("endpoint")
    @classmethod
    def _no_login_in_the_address(cls, endpoint: str) -> str:
        return plain_address(endpoint)

    @field_validator("api_key_env")
    @classmethod
    def _a_variable_for_endpoints(cls, name: str) -> str:
        return key_variable(name, FOR_ENDPOINTS, FOR_JUDGES, whose="endpoints")

    @field_validator(KEY_CONNECTION)
    @classmethod
    def _a_connection(cls, name: str) -> str:
        return key_connection(name)

    @model_validator(mode="after")
    def _consistent(self) -> "EndpointConfig":
        check_key_fields(self.endpoint, env=self.api_key_env, connection=self.api_key_connection)
        if self.endpoint and not self.model:
            raise ValueError(f"model is empty, and {self.endpoint} may serve several; set model")
        if self.budget_cost and not (self.price_prompt or self.price_answer):
            raise ValueError(
                f"budget_cost={self.budget_cost:g} needs prices, got 0; set price_prompt and price_answer, per million "
                "tokens"
            )
        return self


def key_variable(name: str, *beginnings: str, whose: str) -> str:
    """Return the name of the variable with an endpoint's key, empty for none; raises ValueError for any other one."""
    # Whoever triggers a run chooses address and variable: the storage's keys must not be among the choices.
    if name and not any(re.fullmatch(f"{beginning}[A-Z0-9_]+", name) for beginning in beginnings):
        raise ValueError(
            f"api_key_env={name[:80]!r} is not a variable for {whose}; use a name such as {beginnings[0]}API_KEY"
        )
    return name


def key_connection(name: str) -> str:
    """Return the id of the connection with an endpoint's key, empty for none; raises ValueError for what is no id."""
    if name and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}", name):
        raise ValueError(
            f"{KEY_CONNECTION}={name[:80]!r} is not the id of a connection; allowed are letters, digits, '.', '_' and "
            "'-', at most 200; the key itself belongs into the connection"
        )
    return name


def check_key_fields(endpoint: str, *, env: str, connection: str) -> None:
    """Raise ValueError where a key has two places, or a connection is named for an endpoint that is not."""
    if env and connection:
        raise ValueError(f"api_key_env={env!r} and {KEY_CONNECTION}={connection!r} both name a key; give one of them")
    if connection and not endpoint:
        raise ValueError(f"{KEY_CONNECTION}={connection!r} has no effect: there is no endpoint; give one, or leave it")


def is_fit_for_header(key: str) -> bool:
    """Whether an HTTP header may hold a key."""
    return key.isascii() and key.isprintable()


def plain_address(endpoint: str) -> str:
    """Return the address unchanged if it is empty or plain; ValueError for what is no address, or holds more."""
    if endpoint and (not is_endpoint(endpoint) or without_credentials(endpoint) != endpoint):
        raise ValueError(
            f"endpoint={without_credentials(endpoint)!r} must be http:// or https:// with a host, and without "
            "user, password, query and fragment; a key is named by api_key_env or api_key_connection"
        )
    return endpoint


def is_endpoint(address: str) -> bool:
    """Whether an address is one that HTTP reaches."""
    try:
        parts = urlsplit(address)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        return False


def without_credentials(address: str) -> str:
    """Return the address without user, password, query and fragment."""
    try:
        parts = urlsplit(address)
    except ValueError:
        return ""
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def check_endpoint(address: str, *, field: str, with_key: bool, for_judges: bool = False) -> None:
    """Raise ConfigError unless the endpoint may be asked, and be sent a key."""
    if not is_endpoint(address):
        raise ConfigError(f"{field}={without_credentials(address)!r} is no address of an endpoint")
    variables = (ALLOWED, ALLOWED_FOR_JUDGES) if for_judges else (ALLOWED,)
    allowed = _listed_in(variables)
    if any(is_below(address, prefix) for prefix in allowed) or (_on_loopback(address) and not with_key):
        return
    what = "may be sent a key" if with_key else "may be asked"
    raise ConfigError(
        f"{field}={without_credentials(address)!r} is not an endpoint that {what}; allowed: "
        f"{', '.join(map(without_credentials, allowed)) or 'none but loopback, without a key'}",
        advice=f"Let the operator add it to {variables[-1]}, in the environment of Airflow and of Ray's workers.",
    )


def _listed_in(variables: Sequence[str]) -> list[str]:
    return [one for name in variables for one in os.environ.get(name, "").replace(",", " ").split()]


def is_below(address: str, prefix: str) -> bool:
    """Whether an address begins with another one, by whole parts: https://host.elsewhere is not below https://host, and
    neither is another port or scheme."""
    asked, given = urlsplit(address), urlsplit(prefix)
    path, folder = asked.path.rstrip("/"), given.path.rstrip("/")
    same_server = (asked.scheme, asked.hostname, _port(asked.scheme, asked.port)) == (
        given.scheme,
        given.hostname,
        _port(given.scheme, given.port),
    )
    return same_server and ".." not in path.split("/") and (path == folder or path.startswith(f"{folder}/"))


def _port(scheme: str, port: int | None) -> int:
    return port or (443 if scheme == "https" else 80)


def _on_loopback(address: str) -> bool:
    host = urlsplit(address).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
