"""The API over HTTP: what OpenAI's schema says, answers of several clients, clients that leave, and bad requests."""

import dataclasses
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from stages.config.graph import Stage
from stages.serve.app import Access
from stages.serve.loading import ServedModel
from tests.serving import serving
from tests.unit.serve.conftest import Load

HELLO = [{"role": "user", "content": "array?"}]


@pytest.fixture(scope="module")
def models(load: Load) -> list[ServedModel]:
    return [load(Stage.PRETRAIN, "base"), load(Stage.SFT, "sft")]


@pytest.fixture(scope="module")
def url(models: list[ServedModel]) -> Iterator[str]:
    with serving(models) as url:
        yield url


def post(url: str, path: str = "chat/completions", *, headers: dict[str, str] | None = None, **body: Any) -> Any:
    return httpx.post(f"{url}/v1/{path}", json=body, headers=headers, timeout=60)


def chat(url: str, **body: Any) -> dict[str, Any]:
    response = post(url, **{"model": "sft", "messages": HELLO, "temperature": 0, "max_tokens": 8, **body})
    assert response.status_code == 200, response.text
    return response.json()


def complete(url: str, **body: Any) -> dict[str, Any]:
    response = post(
        url, "completions", **{"model": "sft", "prompt": "array", "temperature": 0, "max_tokens": 8, **body}
    )
    assert response.status_code == 200, response.text
    return response.json()


def events(url: str, path: str = "chat/completions", **body: Any) -> list[dict[str, Any]]:
    """The objects of a stream, which must end with [DONE]."""
    with httpx.stream("POST", f"{url}/v1/{path}", json={**body, "stream": True}, timeout=60) as response:
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        parts = "".join(response.iter_text()).split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def refused(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def open_answers(url: str) -> dict[str, int]:
    return {one["id"]: one["open_answers"] for one in httpx.get(f"{url}/v1/models").json()["data"]}


def endless(served: ServedModel) -> ServedModel:
    """The same model, whose answers end with nothing but their length."""
    return dataclasses.replace(served, end_ids=frozenset())


@contextmanager
def slowly(served: ServedModel, seconds: float = 0.05) -> Iterator[None]:
    """Make every step take so long."""
    hook = served.model.register_forward_pre_hook(lambda *_: time.sleep(seconds))
    try:
        yield
    finally:
        hook.remove()


def test_models_are_listed_under_their_names(url: str, models: list[ServedModel]) -> None:
    found = httpx.get(f"{url}/v1/models").json()
    assert found["object"] == "list"
    assert [(one["id"], one["object"], one["max_model_len"], one["kind"]) for one in found["data"]] == [
        ("base", "model", 64, "base-model"),
        ("sft", "model", 64, "sft-model"),
    ]
    assert httpx.get(f"{url}/v1/models/sft").json()["digest"] == models[1].digest
    assert refused(httpx.get(f"{url}/v1/models/ppo"), 404)["code"] == "model_not_found"


def test_a_chat_answer_has_openais_form(url: str, models: list[ServedModel]) -> None:
    found = chat(url)
    (choice,) = found["choices"]
    assert (found["object"], found["model"], choice["finish_reason"]) == ("chat.completion", "sft", "length")
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"]
    prompt = models[1].chat.encode_prompt(HELLO)
    assert found["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": 8,
        "total_tokens": len(prompt) + 8,
    }


def test_a_stream_brings_the_same_answer_in_pieces(url: str) -> None:
    whole = chat(url)["choices"][0]["message"]["content"]
    body = {"model": "sft", "messages": HELLO, "temperature": 0, "max_tokens": 8}
    found = events(url, **body, stream_options={"include_usage": True})
    assert {one["object"] for one in found} == {"chat.completion.chunk"}
    assert len({one["id"] for one in found}) == 1
    *chunks, last = found
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 8
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(pieces) == whole
    assert sum(map(bool, pieces)) > 1
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]


def test_models_answer_differently_and_a_seed_repeats_an_answer(url: str) -> None:
    drawn = [
        chat(url, model=name, temperature=1, seed=4)["choices"][0]["message"]["content"] for name in ("base", "sft")
    ]
    assert drawn[0] != drawn[1]
    assert chat(url, temperature=1, seed=4)["choices"][0]["message"]["content"] == drawn[1]
    assert chat(url, temperature=1, seed=5)["choices"][0]["message"]["content"] != drawn[1]


def test_several_answers_to_one_question_differ(url: str) -> None:
    found = chat(url, temperature=1, seed=1, n=3)
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2]
    assert len({choice["message"]["content"] for choice in found["choices"]}) == 3
    assert 8 < found["usage"]["completion_tokens"] <= 24


def test_an_answer_ends_before_a_stop(url: str) -> None:
    whole = chat(url)["choices"][0]["message"]["content"]
    stop = whole[3:5]
    found = chat(url, stop=[stop, "never there"])["choices"][0]
    assert found == {**found, "finish_reason": "stop"}
    assert found["message"]["content"] == whole[: whole.index(stop)]


def test_many_clients_get_the_answers_that_each_would_get_alone(url: str) -> None:
    questions = [f"what does sort{'_x' * count} do?" for count in range(6)]

    def asked(question: str) -> str:
        body = {"messages": [{"role": "user", "content": question}], "temperature": 1, "seed": 3, "max_tokens": 12}
        return chat(url, **body)["choices"][0]["message"]["content"]

    alone = [asked(question) for question in questions]
    with ThreadPoolExecutor(6) as clients:
        assert list(clients.map(asked, questions)) == alone
    assert len(set(alone)) == 6


def test_a_completion_scores_its_prompt_as_evaluations_ask(url: str, models: list[ServedModel]) -> None:
    """What lm-evaluation-harness sends for a log-likelihood: token ids, echo, one token, logprobs."""
    ids = models[1].tokenizer.backend.encode("array of trees").ids
    found = complete(url, prompt=ids, echo=True, max_tokens=1, logprobs=1)["choices"][0]
    logprobs = found["logprobs"]
    assert len(logprobs["tokens"]) == len(ids) + 1
    assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
    for token, value, top in zip(
        *(logprobs[name][1:] for name in ("tokens", "token_logprobs", "top_logprobs")), strict=True
    ):
        assert value <= max(top.values()) + 1e-6
        assert token not in top or top[token] == pytest.approx(value, abs=1e-6)
    assert found["text"].startswith(models[1].tokenizer.backend.decode(ids, skip_special_tokens=False))
    assert "".join(logprobs["tokens"][:-1]) == models[1].tokenizer.backend.decode(ids, skip_special_tokens=False)
    assert logprobs["text_offset"][1] == len(logprobs["tokens"][0])
    only = complete(url, prompt=ids, echo=True, max_tokens=0, logprobs=1)["choices"][0]["logprobs"]
    assert only["token_logprobs"][1:] == pytest.approx(logprobs["token_logprobs"][1:-1], abs=1e-5)


def test_a_completion_continues_text_as_documents_are_trained(url: str, models: list[ServedModel]) -> None:
    """The begin token is put in front; what spells a control token stays text."""
    tokenizer = models[1].tokenizer
    ids = [tokenizer.bos_id, *tokenizer.backend.encode("array", add_special_tokens=False).ids]
    assert complete(url, prompt="array")["choices"][0]["text"] == complete(url, prompt=ids)["choices"][0]["text"]
    spelled = complete(url, prompt="<|end|>")["usage"]["prompt_tokens"]
    assert spelled > 2


def test_several_prompts_are_answered_in_order_in_a_stream_too(url: str) -> None:
    prompts = ["array", "tree of", "queue"]
    alone = [complete(url, prompt=prompt)["choices"][0]["text"] for prompt in prompts]
    found = complete(url, prompt=prompts)["choices"]
    assert [(one["index"], one["text"]) for one in found] == list(enumerate(alone))
    texts = {0: "", 1: "", 2: ""}
    for event in events(url, "completions", model="sft", prompt=prompts, temperature=0, max_tokens=8):
        (choice,) = event["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == dict(enumerate(alone))


def test_chat_logprobs_spell_every_token(url: str) -> None:
    choice = chat(url, logprobs=True, top_logprobs=2)["choices"][0]
    content = choice["logprobs"]["content"]
    assert len(content) == 8
    assert b"".join(bytes(one["bytes"]) for one in content).decode(errors="replace") == choice["message"]["content"]
    assert all(one["top_logprobs"][0]["logprob"] == one["logprob"] for one in content), "greedy takes the best"
    assert all(len(one["top_logprobs"]) == 2 for one in content)


def test_a_client_that_leaves_frees_its_place(models: list[ServedModel]) -> None:
    with serving([endless(models[1])], max_batch=1) as url:
        body = {"model": "sft", "prompt": "array", "max_tokens": 50, "temperature": 0, "stream": True}
        with slowly(models[1], seconds=0.6):
            with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
                pieces = response.iter_text()  # kept, because httpx closes the connection of one that is forgotten
                assert "error" not in next(pieces)
                assert open_answers(url) == {"sft": 1}
            deadline = time.monotonic() + 15
            while open_answers(url) != {"sft": 0}:
                assert time.monotonic() < deadline, "the whole answer would take 30 s"
                time.sleep(0.02)
            begin = time.monotonic()
            assert complete(url, max_tokens=2)["usage"]["completion_tokens"] == 2
            assert time.monotonic() - begin < 15


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"temperature": 3}, "temperature", "temperature=3: Input should be less than or equal to 2"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"n": 1000}, "n", "less than or equal to 64"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 60}, "max_tokens", "reads and writes at most 64"),
        ({"stop": [""]}, "stop", "at least 1 character"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "hello"}, "messages", "list"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages", "unknown role; allowed: system"),
        ({"messages": [{"content": "x"}]}, "messages", "a role and a content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages",
            "messages[0].content is 'image_url'; this model reads text",
        ),
        ({"messages": [{"role": "user", "content": "x " * 90}]}, "max_tokens", "Shorten the prompt"),
        ({"frequency_penalty": 1}, "frequency_penalty", "frequency_penalty=1 is not supported"),
        ({"tools": [{"type": "function"}]}, "tools", "is not supported by this server"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"top_logprobs": 3}, "top_logprobs", "needs logprobs=true"),
        ({"temprature": 1}, "temprature", "unknown field 'temprature'; this server knows"),
        ({"model": None}, "model", "Field required"),
    ],
)
def test_a_bad_request_names_field_value_and_what_is_allowed(
    url: str, body: dict[str, Any], param: str, message: str
) -> None:
    error = refused(post(url, **{"model": "sft", "messages": HELLO, "max_tokens": 4, **body}), 400)
    assert error["param"] == param
    assert message in error["message"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": [999_999]}, "the token 999999; the model has"),
        ({"prompt": [1, 1 << 63]}, "the token 9223372036854775808; the model has"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[1], "x"]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"max_tokens": 0}, "add echo=true"),
        ({"best_of": 3}, "best_of=3 is not supported"),
        ({"prompt": ["x"] * 5, "n": 60}, "n=60 answers to 5 prompts; allowed: 256 together"),
        ({"logprobs": 21}, "less than or equal to 20"),
        ({"suffix": "x"}, "suffix"),
    ],
)
def test_a_bad_completion_is_refused(url: str, body: dict[str, Any], message: str) -> None:
    error = refused(post(url, "completions", **{"model": "sft", "prompt": "x", **body}), 400)
    assert message in error["message"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not JSON"),
        (b"[1]", "a JSON list, not an object"),
        (b'{"temperature": NaN}', "NaN is no number of JSON"),
        (b'{"messages": "\\ud800"}', "half a character"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_a_body_that_is_no_request_is_refused(url: str, content: bytes, message: str) -> None:
    headers = {"Content-Type": "application/json"}
    error = refused(httpx.post(f"{url}/v1/chat/completions", content=content, headers=headers), 400)
    assert message in error["message"]


def test_fields_that_ask_for_nothing_are_accepted(url: str) -> None:
    whole = chat(url)["choices"]
    nothing = {
        "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "tools": None, "tool_choice": "auto",
        "response_format": {"type": "text"}, "user": "ada", "metadata": {"a": "b"}, "store": False,
    }  # fmt: skip
    assert chat(url, **nothing)["choices"] == whole


def test_what_is_elsewhere_or_otherwise_is_an_error_in_openais_form(url: str) -> None:
    assert refused(httpx.get(f"{url}/v2"), 404)["type"] == "invalid_request_error"
    assert refused(httpx.get(f"{url}/v1/chat/completions"), 405)
    assert refused(httpx.post(f"{url}/v1/chat/completions", data={"model": "sft"}), 415)
    assert refused(post(url, model="x" * (9 << 20)), 413)
    assert refused(post(url, model="gpt-4", messages=HELLO), 404)["code"] == "model_not_found"


def test_a_page_elsewhere_cannot_reach_the_server_by_a_name_of_its_own(url: str) -> None:
    error = refused(httpx.get(f"{url}/v1/models", headers={"Host": "evil.example:8000"}), 403)
    assert "evil.example" in error["message"]
    assert httpx.get(f"{url}/v1/models", headers={"Host": "localhost:8000"}).status_code == 200
    assert "access-control-allow-origin" not in httpx.get(f"{url}/v1/models", headers={"Origin": "http://evil"}).headers


def test_with_a_key_nothing_is_told_without_it(models: list[ServedModel]) -> None:
    with serving(models[:1], access=Access(api_key="sesame", loopback_only=False)) as url:
        assert refused(httpx.get(f"{url}/v1/models"), 401)["code"] == "invalid_api_key"
        assert refused(httpx.get(f"{url}/v1/models", headers={b"Authorization": b"Bearer ses\xe4me"}), 401)
        assert refused(post(url, model="base", messages=HELLO, headers={"Authorization": "Bearer x"}), 401)
        key = {"Authorization": "Bearer sesame"}
        assert post(url, model="base", messages=HELLO, max_tokens=2, headers=key).status_code == 200
        assert httpx.get(f"{url}/").status_code == 200
        assert httpx.get(f"{url}/health").json() == {"status": "ok"}


def test_when_too_many_wait_the_next_is_told_to_come_back(models: list[ServedModel]) -> None:
    with serving([endless(models[0])], most_waiting=3, max_batch=1) as url, slowly(models[0]):
        body = {"model": "base", "prompt": "array", "max_tokens": 50, "temperature": 0, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json={**body, "n": 3}, timeout=60) as response:
            pieces = response.iter_text()
            next(pieces)
            again = post(url, "completions", model="base", prompt="x")
            assert refused(again, 429)["type"] == "rate_limit_error"
            assert again.headers["retry-after"] == "1"


def test_the_page_loads_nothing_from_elsewhere(url: str) -> None:
    response = httpx.get(f"{url}/")
    assert response.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
    text = response.text + httpx.get(f"{url}/page.js").text + httpx.get(f"{url}/page.css").text
    assert "http://" not in text
    assert "https://" not in text
    assert "innerHTML" not in text
    assert Path("stages/serve/page.html").read_text() == response.text


def test_answers_of_a_server_that_stops_end_with_an_error(models: list[ServedModel]) -> None:
    found: list[str] = []

    def ask(url: str) -> None:
        body = {"model": "base", "prompt": "array", "max_tokens": 60, "n": 32, "stream": True, "temperature": 1}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
            found.append("".join(response.iter_text()))

    with serving(models[:1], max_batch=1) as url:
        client = threading.Thread(target=ask, args=[url])
        client.start()
        while open_answers(url) != {"base": 32}:
            time.sleep(0.01)
    client.join(30)
    assert "the server stops" in found[0]
    assert found[0].endswith("data: [DONE]\n\n")
