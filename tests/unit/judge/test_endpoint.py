"""A judge behind HTTP that fails in every way: what passes is tried again, what does not is counted, and it ends."""

import os
import time
from collections.abc import Callable
from email.utils import formatdate
from typing import Any

import pytest

from stages.config.errors import ConfigError
from stages.config.judging import JudgeConfig
from stages.judge.endpoint import EndpointJudge
from stages.judge.pairwise import (
    AWAY,
    BUDGET,
    CUT,
    GARBAGE,
    REFUSED,
    UNCLEAR,
    JudgeAwayError,
    Match,
    Preferred,
    Question,
    verdicts,
)
from tests.judge_server import Asked, Reply, judge_server

QUESTION = Question("What does sort do?", "It sorts.", "It sorts the list in place.")
KEY = "sk-planted-7f3a"


def judge(url: str, *, waits: list[float] | None = None, **settings: Any) -> EndpointJudge:
    """A judge whose waits between attempts are written down instead of slept through."""
    given = {"model": "m", "timeout_seconds": 2.0, "concurrency": 1, **settings}
    return EndpointJudge(JudgeConfig(endpoint=url, **given), sleep=(waits if waits is not None else []).append)


def failing(times: int, reply: Reply) -> Callable[[int, Asked], Reply]:
    return lambda number, asked: reply if number <= times else Reply("B")


def test_it_asks_with_the_models_name_both_answers_and_no_key_unless_there_is_one() -> None:
    with judge_server() as server, judge(server.url, answer_tokens=7) as asked:
        assert asked.ask([QUESTION]) == [Preferred.SECOND]
    (request,) = server.asked
    assert request.path == "/v1/chat/completions"
    assert request.answers == ("It sorts.", "It sorts the list in place.")
    assert "What does sort do?" in request.body["messages"][0]["content"]
    assert {name: request.body[name] for name in ("model", "temperature", "max_tokens")} == {
        "model": "m",
        "temperature": 0.0,
        "max_tokens": 7,
    }
    assert "Authorization" not in request.headers


@pytest.mark.parametrize(
    "reply",
    [
        Reply(status=429, body=b"slow down"),
        Reply(status=500, body=b"oops"),
        Reply(status=503, body=b""),
        Reply(body=b"<html>gateway</html>"),
        Reply(body=b'{"choices": []}'),
        Reply(body=b'{"choices": [{"mess'),
        Reply(body=b"[" * 100_000),
        Reply(body=b"null"),
        Reply(cut=True),
        Reply(wait=1.2),
        Reply(drip=0.1),
    ],
    ids=["429", "500", "503", "html", "no choices", "half JSON", "nested", "null", "cut", "silence", "drip"],
)
def test_what_may_pass_is_tried_again_and_counted(reply: Reply) -> None:
    waits: list[float] = []
    with judge_server(failing(2, reply)) as server, judge(server.url, waits=waits, timeout_seconds=0.6) as asked:
        started = time.monotonic()
        assert asked.ask([QUESTION]) == [Preferred.SECOND]
    assert len(server.asked) == asked.requests == 3
    assert sum(asked.retried.values()) == 2
    assert len(waits) == 2
    assert 0 < waits[0] < waits[1] <= 1.0  # half a second, then one, each less a random part
    assert time.monotonic() - started < 4


def test_it_waits_as_long_as_the_endpoint_asks_but_not_for_ever() -> None:
    for header, least, most in (
        ("7", 7, 7),
        (formatdate(time.time() + 20, usegmt=True), 15, 21),
        ("86400", 120, 120),
        ("-5", 0, 1),
        ("soon", 0, 1),
        ("nan", 0, 1),
    ):
        waits: list[float] = []
        reply = Reply(status=429, headers={"Retry-After": header})
        with judge_server(failing(1, reply)) as server, judge(server.url, waits=waits) as asked:
            assert asked.ask([QUESTION]) == [Preferred.SECOND]
        assert least <= waits[0] <= most, header


@pytest.mark.parametrize(
    ("reply", "reason", "requests"),
    [
        (Reply(status=400, body=b"context length exceeded"), REFUSED, 1),
        (Reply(status=500), AWAY, 3),
        (Reply(body=b"{}"), GARBAGE, 3),
        (Reply("I would say that A is a fine letter"), UNCLEAR, 1),
        (Reply("Let me think about this", finish_reason="length"), CUT, 1),
        (Reply(None, finish_reason="length"), CUT, 1),
        (Reply(None), UNCLEAR, 1),
    ],
    ids=["400", "500", "garbage", "unclear", "cut off", "only thought", "nothing"],
)
def test_what_stays_is_a_reason_that_is_counted(reply: Reply, reason: str, requests: int) -> None:
    with judge_server(lambda number, asked: reply) as server, judge(server.url, max_retries=2) as asked:
        assert asked.ask([QUESTION]) == [reason]
        assert len(server.asked) == requests


def test_an_endpoint_that_is_away_is_not_asked_for_every_item() -> None:
    with judge_server(lambda number, asked: Reply(status=503)) as server, judge(server.url, max_retries=1) as asked:
        assert asked.ask([QUESTION] * 50) == [AWAY] * 50
        assert len(server.asked) == 6  # three questions, twice each


def test_refusals_of_single_questions_do_not_make_it_away_but_a_wrong_key_does() -> None:
    for status, requests in ((400, 20), (401, 3)):
        with judge_server(lambda number, asked, status=status: Reply(status=status)) as server:
            with judge(server.url) as asked:
                answers = asked.ask([QUESTION] * 20)
        assert len(server.asked) == requests
        assert answers.count(REFUSED) == requests


def test_a_success_in_between_means_that_it_is_not_away() -> None:
    def two_of_three(number: int, asked: Asked) -> Reply:
        return Reply("B") if number % 3 == 0 else Reply(status=503)

    with judge_server(two_of_three) as server, judge(server.url, max_retries=0) as asked:
        answers = asked.ask([QUESTION] * 12)
    assert answers == [AWAY, AWAY, Preferred.SECOND] * 4


def test_the_budget_counts_every_request_and_ends_the_questions() -> None:
    with judge_server(failing(1, Reply(status=500))) as server, judge(server.url, max_requests=4) as asked:
        assert asked.ask([QUESTION] * 6) == [Preferred.SECOND] * 3 + [BUDGET] * 3
        assert len(server.asked) == 4
    with judge_server() as server, judge(server.url, max_minutes=1e-9) as asked:
        assert asked.ask([QUESTION] * 2) == [BUDGET] * 2
        assert not server.asked


def test_no_more_requests_are_open_than_allowed_and_answers_keep_their_order() -> None:
    questions = [Question("q", "x" * (1 + number % 2 * 8), "y" * 4) for number in range(24)]

    def slow(number: int, asked: Asked) -> Reply:
        first, second = asked.answers
        return Reply("A" if len(first) > len(second) else "B", wait=0.03)

    with judge_server(slow) as server, judge(server.url, concurrency=3) as asked:
        assert asked.ask(questions) == [Preferred.SECOND, Preferred.FIRST] * 12
    assert 2 <= server.most_at_once() <= 3


def test_no_server_at_all_is_away_with_the_reason() -> None:
    with judge_server() as server:
        url = server.url
    with judge(url, max_retries=1) as asked:
        with pytest.raises(JudgeAwayError, match="ConnectError"):
            asked.require_reachable()
    with judge_server(lambda number, asked: Reply(status=401, body=b"bad key")) as server, judge(server.url) as asked:
        with pytest.raises(JudgeAwayError, match=r"HTTP 401 'bad key'"):
            asked.require_reachable()
    with judge_server() as server, judge(server.url) as asked:
        asked.require_reachable()


def test_a_redirect_is_not_followed_because_the_key_would_go_along(monkeypatch: pytest.MonkeyPatch) -> None:
    with judge_server() as other:
        reply = Reply(status=307, headers={"Location": f"{other.url}/chat/completions"})
        with judge_server(lambda number, asked: reply) as server, judge(server.url) as asked:
            assert asked.ask([QUESTION]) == [REFUSED]
        assert not other.asked


def test_the_key_comes_from_its_variable_and_is_never_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ATHANOR_JUDGE_API_KEY", KEY)
    echo = Reply(status=403, body=f"invalid key {KEY}".encode())
    with judge_server(lambda number, asked: echo) as server:
        monkeypatch.setenv("ATHANOR_JUDGE_ENDPOINTS", server.url)
        with judge(server.url, api_key_env="ATHANOR_JUDGE_API_KEY") as asked:
            with pytest.raises(JudgeAwayError) as raised:
                asked.require_reachable()
    assert server.asked[0].headers["Authorization"] == f"Bearer {KEY}"
    assert "invalid key ***" in str(raised.value)
    assert KEY not in caplog.text + str(raised.value) + asked.identity


@pytest.mark.parametrize("around", ["\n", " \r\n"])
def test_a_key_with_a_line_end_is_sent_without_it(monkeypatch: pytest.MonkeyPatch, around: str) -> None:
    monkeypatch.setenv("ATHANOR_JUDGE_API_KEY", KEY + around)
    with judge_server() as server:
        monkeypatch.setenv("ATHANOR_JUDGE_ENDPOINTS", server.url)
        with judge(server.url, api_key_env="ATHANOR_JUDGE_API_KEY") as asked:
            asked.require_reachable()
    assert server.asked[0].headers["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("key", [f"{KEY}\nx", f"é{KEY}", f"{KEY}\x00", f"{KEY}\u200b"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_told(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setattr("os.environ", {**os.environ, "ATHANOR_JUDGE_API_KEY": key})
    monkeypatch.setitem(os.environ, "ATHANOR_JUDGE_ENDPOINTS", "https://judge.example/v1")
    with pytest.raises(ConfigError, match="api_key_env='ATHANOR_JUDGE_API_KEY' holds characters") as raised:
        judge("https://judge.example/v1", api_key_env="ATHANOR_JUDGE_API_KEY")
    assert KEY not in f"{raised.value} {raised.value.advice}"


@pytest.mark.parametrize("before", range(150, 201, 5))
def test_a_key_that_an_answer_repeats_is_masked_before_the_answer_is_cut(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, before: int
) -> None:
    monkeypatch.setenv("ATHANOR_JUDGE_API_KEY", KEY)
    reply = Reply(status=403, body=b"x" * before + KEY.encode())
    with judge_server(lambda number, asked: reply) as server:
        monkeypatch.setenv("ATHANOR_JUDGE_ENDPOINTS", server.url)
        with judge(server.url, api_key_env="ATHANOR_JUDGE_API_KEY") as asked:
            with pytest.raises(JudgeAwayError) as raised:
                asked.require_reachable()
    assert KEY[:4] not in caplog.text + str(raised.value)


def test_what_the_library_says_of_a_header_is_not_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("stages.models.endpoint.client.key_of", lambda config, field: f"{KEY}\n")
    with judge_server() as server:
        monkeypatch.setenv("ATHANOR_JUDGE_ENDPOINTS", server.url)
        with judge(server.url, api_key_env="ATHANOR_JUDGE_API_KEY") as asked:
            with pytest.raises(JudgeAwayError, match="LocalProtocolError") as raised:
                asked.require_reachable()
    assert KEY not in caplog.text + str(raised.value)


def test_a_key_that_is_not_there_and_an_endpoint_that_is_not_allowed_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("ATHANOR_JUDGE_API_KEY", raising=False)
    monkeypatch.setenv("ATHANOR_JUDGE_ENDPOINTS", "https://judge.example/v1")
    with pytest.raises(ConfigError, match="api_key_env='ATHANOR_JUDGE_API_KEY' is not set where Ray's processes run"):
        judge("https://judge.example/v1", api_key_env="ATHANOR_JUDGE_API_KEY")
    with pytest.raises(ConfigError, match=r"is not an endpoint that may be asked; allowed: https://judge.example/v1"):
        judge("https://elsewhere.example/v1")
    with pytest.raises(ConfigError, match="is not an endpoint that may be sent a key"):
        judge("http://127.0.0.1:1/v1", api_key_env="ATHANOR_JUDGE_API_KEY")


def test_a_judge_that_prefers_the_longer_answer_does_so_in_both_orders() -> None:
    matches = [Match("q", "a longer answer", "short"), Match("q", "short", "a longer answer"), Match("q", "as", "is")]
    with judge_server() as server, judge(server.url, concurrency=4) as asked:
        found = verdicts(asked, matches)
    assert [one.value for one in found] == [1.0, 0.0, 0.5]
    assert [one.asked for one in found] == [2, 2, 0]
    assert len(server.asked) == 6
