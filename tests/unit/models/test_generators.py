"""A model of this process and an endpoint as generators: one protocol, the same texts, nothing written twice."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.artifacts.folder import FileStore
from stages.config.endpoints import EndpointConfig
from stages.config.tokens import PLAIN, TokenizeConfig
from stages.models.build import load_with_own_tokenizer
from stages.models.endpoint.client import ChatClient
from stages.models.endpoint.records import AWAY, BUDGET, TOO_LONG, ChatRequest, Completion, Outcome, Unanswered, Usage
from stages.models.generators import Generator, Kept, ModelGenerator
from stages.models.given_tokenizer import given_tokenizer
from stages.serve.address import Address
from stages.serve.loading import load_model, model_files
from tests.judging import make_world, published_model
from tests.serving import serving

TEXTS = ("What does sort_array do?", "What?", "Tell me about the copy of a tree and the merge of a queue.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = TokenizeConfig(vocab_size=340, sequence_length=256, bpe_train_bytes=10_000, chat_template=PLAIN)
    world = make_world(tmp_path_factory.mktemp("generators"), settings)
    return Path(published_model(world, seed=7).uri.removeprefix("file://"))


def request(text: str, *, number: int = 0, temperature: float = 1.0, max_tokens: int = 6) -> ChatRequest:
    return ChatRequest(({"role": "user", "content": text},), max_tokens, temperature, number)


def generator(folder: Path, **settings: Any) -> ModelGenerator:
    tokenizer = given_tokenizer(folder)
    given = {"name": "m", "content": "c", "context_length": 256, "seed": 3, "batch_size": 2, **settings}
    model = load_with_own_tokenizer(folder, tokenizer).eval()
    return ModelGenerator(model, tokenizer, device=torch.device("cpu"), eos_id=tokenizer.chat().check(), **given)


def texts(outcomes: Sequence[Outcome]) -> list[str | None]:
    return [one.text if isinstance(one, Completion) else one.reason for one in outcomes]


def test_an_answer_depends_on_its_request_and_not_on_its_neighbours(folder: Path) -> None:
    one = generator(folder)
    requests = [request(text, number=number) for text in TEXTS for number in (0, 1)]
    found = texts(one.ask(requests))
    assert texts(generator(folder, batch_size=5).ask(requests[::-1])) == found[::-1]
    assert [texts(one.ask([single])) for single in requests] == [[text] for text in found]
    assert found[0] != found[1]  # another number, another draw
    assert texts(generator(folder, seed=4).ask(requests)) != found


def test_requests_of_other_settings_are_answered_in_their_places(folder: Path) -> None:
    one = generator(folder, context_length=60)
    mixed = [request("a", max_tokens=3), request("b " * 80), request("a", temperature=0.0), request("a", max_tokens=3)]
    outcomes = one.ask(mixed)
    assert texts(outcomes)[1] == TOO_LONG
    assert texts(outcomes)[0] == texts(outcomes)[3]
    assert texts(outcomes)[2] == texts(one.ask([request("a", temperature=0.0, number=9)]))[0]
    answered = [one for one in outcomes if isinstance(one, Completion)]
    assert all(found.usage.answer_tokens <= 6 and found.usage.prompt_tokens > 0 for found in answered)
    assert one.account()["requests"] == 4  # the prompt that was too long was not asked


class Counting:
    """Answers in capitals, and counts."""

    name, identity = "counting", "i"

    def __init__(self, *, away: bool = False) -> None:
        self.asked: list[str] = []
        self._away = away

    def ask(self, requests: Sequence[ChatRequest]) -> list[Outcome]:
        self.asked += [one.messages[0]["content"] for one in requests]
        return [self._outcome(one.messages[0]["content"]) for one in requests]

    def account(self) -> dict[str, Any]:
        return {}

    def _outcome(self, text: str) -> Outcome:
        if text == "long":
            return Unanswered(TOO_LONG)
        return Unanswered(AWAY) if self._away else Completion(text.upper(), "stop", Usage(2, 3))


def test_what_is_kept_is_not_asked_again_and_what_may_still_come_is_not_kept(tmp_path: Path) -> None:
    store, calls = FileStore(tmp_path), [[request("a"), request("long")], [request("b")]]

    def run(inner: Generator) -> list[list[str | None]]:
        kept = Kept(inner, store, "checkpoints/f/answers")
        found = [texts(kept.ask(call)) for call in calls]
        assert kept.account()["requests"] == 3
        return found

    assert run(Counting(away=True)) == [[AWAY, TOO_LONG], [AWAY]]
    first, second = Counting(), Counting()
    assert run(first) == run(second) == [["A", TOO_LONG], ["B"]]
    assert (first.asked, second.asked) == (["a", "long", "b"], [])
    other = Counting()
    other.identity = "another model"
    run(other)
    assert other.asked == first.asked
    for key in store.list("checkpoints"):
        store.write_bytes(key, b"[1]")
    third = Counting()
    assert run(third) == [["A", TOO_LONG], ["B"]]
    assert third.asked == first.asked


def test_a_process_that_lost_its_lease_keeps_nothing(tmp_path: Path) -> None:
    def lost() -> None:
        raise RuntimeError("lost")

    kept = Kept(Counting(), FileStore(tmp_path), "checkpoints/f", check_lease=lost)
    with pytest.raises(RuntimeError):
        kept.ask([request("a")])
    assert not list(FileStore(tmp_path).list("checkpoints"))


@pytest.fixture(scope="module")
def served(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    address = Address("tiny", str(folder))
    files = model_files(address, tmp_path_factory.mktemp("cache"))
    model = load_model(address, files, device=torch.device("cpu"), dtype=torch.float32, context_length=256)
    with serving([model]) as url:
        yield f"{url}/v1"


def test_our_own_server_is_an_endpoint_that_answers_as_the_model_itself(folder: Path, served: str) -> None:
    """Greedy, in the precision of the weights, on both sides."""
    config = EndpointConfig(endpoint=served, model="tiny")
    with ChatClient(config, field="generator") as client:
        requests = [request(text, temperature=0.0) for text in TEXTS]
        outcomes = client.ask(requests)
        assert client.account()["without_usage"] == 0
    direct = generator(folder).ask(requests)
    assert texts(outcomes) == texts(direct)
    assert [one.usage for one in outcomes] == [one.usage for one in direct]  # type: ignore[union-attr]


def test_a_budget_holds_at_our_own_server(served: str) -> None:
    config = EndpointConfig(endpoint=served, model="tiny", budget_tokens=150, concurrency=3)
    with ChatClient(config, field="generator") as client:
        outcomes = client.ask([request("What?", number=number) for number in range(12)])
        account = client.account()
    assert texts(outcomes).count(BUDGET) > 0
    assert 0 < account["prompt_tokens"] + account["answer_tokens"] <= 150
    assert account["answered"] == 12 - texts(outcomes).count(BUDGET)
