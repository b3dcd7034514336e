"""The client of endpoints, against a server that misbehaves: nothing lost, nothing asked twice, the budget kept."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from stages.artifacts.folder import FileStore
from stages.config.endpoints import EndpointConfig
from stages.config.errors import ConfigError
from stages.models.endpoint.client import ChatClient
from stages.models.endpoint.journal import ROOM, Journal
from stages.models.endpoint.records import AWAY, BUDGET, GARBAGE, REFUSED, ChatRequest, Completion, Unanswered
from tests.judge_server import Asked, Reply, judge_server

KEY = "sk-planted-91c0"
ARTIFACT = "a" * 64


def request(text: str, *, number: int = 0, max_tokens: int = 8) -> ChatRequest:
    return ChatRequest(({"role": "user", "content": text},), max_tokens=max_tokens, number=number)


def questions(count: int) -> list[ChatRequest]:
    return [request(f"question {number}") for number in range(count)]


def echo(number: int, asked: Asked) -> Reply:
    """Every prompt costs 10 tokens and every answer 5."""
    return Reply(f"answer to {asked.text}", usage=(10, 5))


def config_of(url: str, **settings: Any) -> EndpointConfig:
    return EndpointConfig(**{"endpoint": url, "model": "m", "timeout_seconds": 1.0, "concurrency": 1, **settings})


def client(
    url: str,
    *,
    store: FileStore | None = None,
    artifact: str = ARTIFACT,
    waits: list[float] | None = None,
    **settings: Any,
) -> ChatClient:
    """A client whose waits are written down instead of slept through."""
    config = config_of(url, **settings)
    journal = Journal(store, config, artifact=artifact) if store else None
    return ChatClient(
        config, field="synthesize.endpoint", journal=journal, sleep=(waits if waits is not None else []).append
    )


def texts(outcomes: list[Completion | Unanswered]) -> list[str | None]:
    return [one.text if isinstance(one, Completion) else one.reason for one in outcomes]


BAD = {
    "429": Reply(status=429, body=b"slow down"),
    "500": Reply(status=500, body=b"oops"),
    "502": Reply(status=502, body=b""),
    "503": Reply(status=503, body=b""),
    "html": Reply(body=b"<html>gateway</html>"),
    "half JSON": Reply(body=b'{"choices": [{"mess'),
    "cut": Reply(cut=True),
    "silence": Reply(wait=0.6),
    "drip": Reply(drip=0.05),
}


def test_whatever_goes_wrong_nothing_is_lost_and_nothing_is_asked_twice(tmp_path: Path) -> None:
    """Every question meets another failure first; afterwards the same questions cost no request at all."""
    kinds, met = list(BAD.values()), Counter[str]()
    lock = threading.Lock()

    def behave(number: int, asked: Asked) -> Reply:
        with lock:
            met[asked.text] += 1
            return kinds[int(asked.text.split()[1]) % len(kinds)] if met[asked.text] == 1 else echo(number, asked)

    store, asked = FileStore(tmp_path), questions(2 * len(kinds))
    with judge_server(behave) as server:
        with client(server.url, store=store, concurrency=6, timeout_seconds=0.3) as first:
            assert texts(first.ask(asked)) == [f"answer to question {number}" for number in range(len(asked))]
            assert first.account()["retried"] == {AWAY: 14, GARBAGE: 4}
        assert set(met.values()) == {2}
        with client(server.url, store=store) as again:
            assert texts(again.ask(asked)) == [f"answer to question {number}" for number in range(len(asked))]
            assert again.requests == 0
            assert again.account()["found_in_store"] == len(asked)
        assert set(met.values()) == {2}


def test_the_same_question_is_asked_once_also_by_threads_that_ask_at_the_same_time(tmp_path: Path) -> None:
    slow = lambda number, asked: Reply(f"answer {number}", wait=0.05)  # noqa: E731
    with judge_server(slow) as server, client(server.url, store=FileStore(tmp_path), concurrency=4) as one:
        assert texts(one.ask([request("same")] * 8)) == ["answer 1"] * 8
        assert len(server.asked) == 1
        assert texts(one.ask([request("same", number=1)])) == ["answer 2"]  # another sample of the same prompt
        assert [asked.body["seed"] for asked in server.asked] == [0, 1]


def test_a_refusal_is_a_reason_and_costs_its_question_alone(tmp_path: Path) -> None:
    def behave(number: int, asked: Asked) -> Reply:
        return Reply(status=400, body=b"too long") if asked.text.endswith("1") else echo(number, asked)

    with judge_server(behave) as server, client(server.url, store=FileStore(tmp_path)) as one:
        assert texts(one.ask(questions(3))) == ["answer to question 0", REFUSED, "answer to question 2"]
        assert one.account()["failed"] == {REFUSED: 1}


def test_an_endpoint_that_is_away_is_left_alone_and_a_later_attempt_asks_what_is_missing(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    dies = lambda number, asked: echo(number, asked) if number <= 2 else Reply(status=503)  # noqa: E731
    with judge_server(dies) as server:
        with client(server.url, store=store, max_retries=1) as one:
            assert texts(one.ask(questions(9)))[2:] == [AWAY] * 7
        assert len(server.asked) == 2 + 3 * 2
        url = server.url
    port = int(url.split(":")[2].split("/")[0])
    with judge_server(echo, port=port) as server, client(url, store=store) as one:
        assert None not in texts(one.ask(questions(9)))
        assert [asked.text for asked in server.asked] == [f"question {number}" for number in range(2, 9)]


def test_a_budget_of_tokens_is_never_exceeded_whatever_is_under_way(tmp_path: Path) -> None:
    """An answer costs 15; a question can cost at most 10 bytes + 16 + 8 = 34. After six, 90 are spent and 34 do not fit
    into 120; after five, 75 are, and 34 do."""
    with judge_server(echo) as server:
        for concurrency in (1, 5):
            with client(server.url, concurrency=concurrency, budget_tokens=120) as one:
                outcomes = texts(one.ask(questions(10)))
            assert outcomes.count(BUDGET) == 4
            assert (one.account()["prompt_tokens"], one.account()["answer_tokens"]) == (60, 30)


def test_a_budget_of_money_is_kept_over_attempts_and_a_larger_one_continues(tmp_path: Path) -> None:
    """Prompts cost 100 and answers 200 a million tokens. An answer costs 10 x 0.0001 + 5 x 0.0002 = 0.002, a question
    at most 26 x 0.0001 + 8 x 0.0002 = 0.0042. Of 0.0123 four are spent (0.008), and 0.0042 still fit; after five
    (0.010) they do not."""
    prices: dict[str, Any] = {"price_prompt": 100.0, "price_answer": 200.0}
    store = FileStore(tmp_path)
    with judge_server(echo) as server:
        with client(server.url, store=store, budget_cost=0.0123, **prices) as one:
            assert texts(one.ask(questions(8))).count(BUDGET) == 3
            assert one.account()["cost"] == pytest.approx(0.010)
        with client(server.url, store=store, budget_cost=0.0123, **prices) as one:
            assert texts(one.ask(questions(8))).count(BUDGET) == 3
            assert one.account()["cost"] == pytest.approx(0.010)
        assert len(server.asked) == 5
        # Another artifact with another budget has the answers for nothing.
        with client(server.url, store=store, artifact="b" * 64, budget_cost=0.0123, **prices) as one:
            assert texts(one.ask(questions(8))) == [f"answer to question {number}" for number in range(8)]
            assert one.account()["cost"] == pytest.approx(0.006)
        assert len(server.asked) == 8


def test_an_attempt_that_may_have_cost_something_counts_with_the_most_that_it_can_cost(tmp_path: Path) -> None:
    cut_once = lambda number, asked: Reply(cut=True) if number == 1 else echo(number, asked)  # noqa: E731
    store = FileStore(tmp_path)
    with judge_server(cut_once) as server, client(server.url, store=store) as one:
        one.ask(questions(1))
        assert (one.account()["prompt_tokens"], one.account()["answer_tokens"]) == (26 + 10, 8 + 5)
        again = Journal(store, config_of(server.url), artifact=ARTIFACT)
        assert (again.spent.requests, again.spent.tokens) == (2, 49)
    limited = lambda number, asked: Reply(status=429) if number == 1 else echo(number, asked)  # noqa: E731
    with judge_server(limited) as server, client(server.url) as one:
        one.ask(questions(1))
        assert one.account()["prompt_tokens"] == 10


def test_an_answer_without_usage_counts_with_the_most_that_it_can_have_cost() -> None:
    for usage in (None, {"prompt_tokens": -1, "completion_tokens": 5}, {"prompt_tokens": True}, "many"):
        body = {"choices": [{"message": {"content": "1234"}, "finish_reason": "stop"}], "usage": usage}
        with judge_server(lambda number, asked, b=body: Reply(body=json.dumps(b).encode())) as server:
            with client(server.url) as one:
                one.ask(questions(1))
        assert (one.account()["prompt_tokens"], one.account()["answer_tokens"]) == (26, 5)
        assert one.account()["without_usage"] == 1


def test_no_more_is_asked_in_a_minute_than_the_pace_allows() -> None:
    now, sent = [0.0], list[float]()

    def sleep(seconds: float) -> None:
        now[0] += seconds

    def behave(number: int, asked: Asked) -> Reply:
        sent.append(now[0])
        return echo(number, asked)

    def pace(**settings: int) -> list[float]:
        now[0] = 0.0
        sent.clear()
        with judge_server(behave) as server:
            config = config_of(server.url, **settings)
            with ChatClient(config, field="f", sleep=sleep, clock=lambda: now[0]) as one:
                one.ask(questions(5))
        return list(sent)

    assert pace(requests_per_minute=2) == [0, 0, 60, 60, 120]
    # 34 are set aside and 15 are used: 15 + 15 + 34 do not fit into 60.
    assert pace(tokens_per_minute=60) == [0, 0, 60, 60, 120]
    assert pace(tokens_per_minute=20) == [0, 60, 120, 180, 240]  # each is larger than the limit, and goes alone


def test_a_damaged_answer_is_asked_again(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    with judge_server(echo) as server:
        with client(server.url, store=store) as one:
            one.ask(questions(2))
        first, second = store.list(ROOM)
        store.write_bytes(first, b'{"text": 3}')
        store.write_bytes(second, b"\xff")
        with client(server.url, store=store) as one:
            assert sorted(map(str, texts(one.ask(questions(2))))) == ["answer to question 0", "answer to question 1"]
        assert len(server.asked) == 4


def test_other_settings_are_other_questions_and_speed_is_none(tmp_path: Path) -> None:
    config = config_of("http://127.0.0.1:1/v1")
    one = request("q").digest(config)
    same = config.model_copy(update={"concurrency": 9, "budget_tokens": 3, "timeout_seconds": 2.0})
    assert request("q").digest(same) == one
    different = {
        request("q").digest(config.model_copy(update={"model": "other"})),
        request("q").digest(config.model_copy(update={"endpoint": "http://127.0.0.1:2/v1"})),
        request("p").digest(config),
        request("q", number=1).digest(config),
        request("q").digest(config.model_copy(update={"send_seed": False})),
        request("q", number=1).digest(config.model_copy(update={"send_seed": False})),
        request("q", max_tokens=9).digest(config),
    }
    assert len({one, *different}) == 8
    assert config.identity() == config.model_copy(update={"concurrency": 9, "max_retries": 0}).identity()
    assert config.identity() != config.model_copy(update={"budget_tokens": 3}).identity()


def test_the_key_is_sent_and_is_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ATHANOR_ENDPOINT_API_KEY", KEY)
    store = FileStore(tmp_path)

    def repeats(number: int, asked: Asked) -> Reply:
        return Reply(f"your key is {KEY}") if number == 1 else Reply(status=403, body=f"bad {KEY}".encode())

    with judge_server(repeats) as server:
        monkeypatch.setenv("ATHANOR_ENDPOINTS", server.url)
        with client(server.url, store=store, api_key_env="ATHANOR_ENDPOINT_API_KEY") as one:
            outcomes = one.ask(questions(2))
    assert server.asked[0].headers["Authorization"] == f"Bearer {KEY}"
    assert texts(outcomes) == ["your key is ***", REFUSED]
    kept = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert KEY not in caplog.text + str(outcomes) + str(one.account()) + one.last_failure + kept.decode()


def test_an_endpoint_that_is_listed_for_judges_is_asked_by_judges_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATHANOR_JUDGE_ENDPOINTS", "https://judge.example/v1")
    with pytest.raises(ConfigError, match=r"synthesize\.endpoint\.endpoint='https://judge\.example/v1' is not an"):
        client("https://judge.example/v1")
    monkeypatch.setenv("ATHANOR_ENDPOINTS", "https://judge.example/v1")
    client("https://judge.example/v1").close()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"endpoint": "https://u:p@host/v1", "model": "m"}, "without user, password"),
        ({"endpoint": "https://host/v1"}, "model is empty"),
        ({"api_key_env": "AWS_SECRET_ACCESS_KEY"}, "is not a variable for endpoints"),
        ({"budget_cost": 3.0}, "budget_cost=3 needs prices"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        EndpointConfig(**settings)


_ASKING = """
import sys
from pathlib import Path
from stages.artifacts.folder import FileStore
from tests.unit.models.endpoint.test_client import ARTIFACT, ChatClient, Journal, config_of, questions

config = config_of(sys.argv[1], concurrency=2)
journal = Journal(FileStore(Path(sys.argv[2])), config, artifact=ARTIFACT)
with ChatClient(config, field="f", journal=journal) as client:
    client.ask(questions(12))
"""


def test_after_a_kill_only_what_was_under_way_is_asked_again(tmp_path: Path) -> None:
    enough = threading.Event()

    def slow_after(number: int, asked: Asked) -> Reply:
        if number in (7, 8):
            if number == 8:
                enough.set()
            time.sleep(2)
        return echo(number, asked)

    store = FileStore(tmp_path)
    with judge_server(slow_after) as server:
        process = subprocess.Popen([sys.executable, "-c", _ASKING, server.url, str(tmp_path)])
        assert enough.wait(60)
        process.send_signal(signal.SIGKILL)
        process.wait()
        before = [asked.text for asked in server.asked]
        with client(server.url, store=store, concurrency=2) as one:
            assert texts(one.ask(questions(12))) == [f"answer to question {number}" for number in range(12)]
            assert one.account()["found_in_store"] == 6
        after = [asked.text for asked in server.asked[len(before) :]]
    assert len(before) == 8
    assert sorted(after) == sorted(f"question {number}" for number in range(6, 12))


def test_no_prompt_has_more_tokens_than_its_bytes_and_the_marks_of_its_turns() -> None:
    assert request("é").most_prompt_tokens() == 2 + 16
    assert _with_system("ab", "c").most_prompt_tokens() == 3 + 32


def _with_system(system: str, user: str) -> ChatRequest:
    return ChatRequest(({"role": "system", "content": system}, {"role": "user", "content": user}), max_tokens=1)
