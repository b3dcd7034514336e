"""The `openai` client against the server: what programs that talk to OpenAI do, works here."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from stages.config.graph import Stage
from stages.serve.app import Access
from stages.serve.loading import ServedModel
from tests.serving import serving
from tests.unit.serve.conftest import Load

openai = pytest.importorskip("openai", reason="the client openai is not installed; `make setup` installs it")

HELLO: Any = [{"role": "user", "content": "array?"}]


@pytest.fixture(scope="module")
def models(load: Load) -> list[ServedModel]:
    return [load(Stage.PRETRAIN, "base"), load(Stage.SFT, "sft")]


@pytest.fixture(scope="module")
def client(models: list[ServedModel]) -> Iterator[Any]:
    with (
        serving(models, access=Access(api_key="sesame")) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="sesame", timeout=60, max_retries=0) as client,
    ):
        yield client


def test_models_are_listed_and_looked_up(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["base", "sft"]
    assert client.models.retrieve("sft").owned_by == "athanor"


def test_a_chat_and_its_stream_give_the_same_answer(client: Any) -> None:
    asked = {"model": "sft", "messages": HELLO, "temperature": 0, "max_tokens": 8}
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 8
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage


def test_several_answers_stops_and_logprobs(client: Any) -> None:
    found = client.chat.completions.create(
        model="sft", messages=HELLO, seed=1, n=2, max_completion_tokens=6, logprobs=True, top_logprobs=3
    )
    assert found.choices[0].message.content != found.choices[1].message.content
    assert len(found.choices[0].logprobs.content[0].top_logprobs) == 3
    text = found.choices[0].message.content
    again = client.chat.completions.create(
        model="sft",
        messages=HELLO,
        seed=1,
        max_completion_tokens=6,
        stop=text[1:3],
        extra_body={"metadata": {"a": "b"}},
    )
    assert again.choices[0].message.content == text[: text.index(text[1:3])]
    assert again.choices[0].finish_reason == "stop"


def test_completions_score_a_prompt(client: Any) -> None:
    found = client.completions.create(model="base", prompt="array of trees", max_tokens=0, echo=True, logprobs=2)
    logprobs = found.choices[0].logprobs
    assert found.choices[0].text == "array of trees"
    assert logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in logprobs.token_logprobs[1:])
    assert len(logprobs.top_logprobs[1]) == 2


def test_a_stream_that_is_closed_early_leaves_the_server_well(client: Any) -> None:
    stream = client.completions.create(model="base", prompt="array", max_tokens=50, stream=True)
    next(iter(stream))
    stream.close()
    assert client.completions.create(model="base", prompt="array", max_tokens=2).usage.completion_tokens <= 2


def test_errors_are_the_clients_own_exceptions(client: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'; this server has base, sft") as missing:
        client.chat.completions.create(model="gpt", messages=HELLO)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="reads and writes at most 64") as full:
        client.chat.completions.create(model="sft", messages=[{"role": "user", "content": "x " * 200}])
    assert full.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError, match="incorrect API key"):
        client.with_options(api_key="wrong").models.list()


def test_a_model_that_fails_in_a_stream_is_an_error_and_no_short_answer(client: Any, models: list[ServedModel]) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    hook = models[0].model.register_forward_pre_hook(fail)
    try:
        with pytest.raises(openai.APIError, match="the model base failed: RuntimeError: out of memory"):
            list(client.completions.create(model="base", prompt="array", stream=True))
        with pytest.raises(openai.InternalServerError, match="out of memory"):
            client.completions.create(model="base", prompt="array")
    finally:
        hook.remove()
    assert client.completions.create(model="base", prompt="array", max_tokens=2).choices[0].text


def test_many_at_once_from_the_asynchronous_client(client: Any) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=str(client.base_url), api_key="sesame", timeout=60) as many:
            asked = [
                many.chat.completions.create(model=name, messages=HELLO, temperature=0, max_tokens=8)
                for name in ("base", "sft") * 8
            ]
            return [one.choices[0].message.content for one in await asyncio.gather(*asked)]

    texts = asyncio.run(ask())
    assert len(set(texts)) == 2
    assert texts[:2] * 8 == texts
