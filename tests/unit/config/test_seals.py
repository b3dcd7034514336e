"""Sealed keys: only the right job, with the right sealing key, in time, gets them back; and what is wrong is told."""

import base64
import time

import pytest

from stages.config.errors import Category, ConfigError
from stages.config.seals import (
    MAX_AGE_SECONDS,
    SEAL_KEY,
    SealExpiredError,
    name_of_key,
    open_seal,
    require_sealing,
    seal,
)

FIRST, SECOND = (base64.urlsafe_b64encode(bytes([number]) * 32).decode() for number in (1, 2))
KEYS = {"llm": "sk-planted-1", "judge": "sk-planted-2"}


@pytest.fixture(autouse=True)
def sealing_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SEAL_KEY, FIRST)


def test_what_was_sealed_comes_back_for_its_job() -> None:
    opened = open_seal(seal(KEYS, job="athanor-evaluate-1"))
    opened.require_for("athanor-evaluate-1")
    assert opened.keys == KEYS


def test_no_key_is_readable_in_the_seal_or_in_what_is_printed_of_it() -> None:
    sealed = seal(KEYS, job="j")
    name, _, token = sealed.partition(".")
    everything = sealed + base64.urlsafe_b64decode(token).decode("latin-1") + repr(open_seal(sealed))
    assert not [word for word in (*KEYS.values(), FIRST) if word in everything]
    assert name == name_of_key(FIRST)
    assert seal(KEYS, job="j") != sealed  # two jobs with one key cannot be told to have one


def test_a_seal_of_another_job_is_refused() -> None:
    with pytest.raises(ConfigError, match="sealed for job 'athanor-sft-1', and this is 'athanor-sft-2'"):
        open_seal(seal(KEYS, job="athanor-sft-1")).require_for("athanor-sft-2")


@pytest.mark.parametrize(
    ("age", "good"),
    [(0, True), (MAX_AGE_SECONDS - 2, True), (MAX_AGE_SECONDS + 2, False), (-290, True), (-310, False)],
)
def test_a_seal_is_good_for_a_day_and_clocks_may_differ_by_five_minutes(age: float, good: bool) -> None:
    """86,400 seconds after it was made; a clock that is behind sees it up to 300 seconds before."""
    now = time.time()
    opened = open_seal(seal(KEYS, job="j", now=now))
    if good:
        opened.require_for("j", now=now + age)
        return
    with pytest.raises(SealExpiredError, match="allowed are 0 to 86400 s") as raised:
        opened.require_for("j", now=now + age)
    assert raised.value.category is Category.INFRASTRUCTURE  # the retry seals anew


def test_another_sealing_key_is_told_by_the_names_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    sealed = seal(KEYS, job="j")
    monkeypatch.setenv(SEAL_KEY, SECOND)
    with pytest.raises(ConfigError) as raised:
        open_seal(sealed)
    assert f"with key '{name_of_key(FIRST)}', and {SEAL_KEY} where Ray's processes run is {name_of_key(SECOND)}" in str(
        raised.value
    )
    assert FIRST not in str(raised.value)


def test_sealing_keys_are_changed_without_a_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray first gets `new,old`, then Airflow the new one, then Ray the new one alone."""
    of_old = seal(KEYS, job="j")
    monkeypatch.setenv(SEAL_KEY, f"{SECOND}, {FIRST}")
    of_new = seal(KEYS, job="j")
    assert open_seal(of_old).keys == open_seal(of_new).keys == KEYS
    monkeypatch.setenv(SEAL_KEY, SECOND)
    assert open_seal(of_new).keys == KEYS


def test_one_changed_character_is_noticed() -> None:
    sealed = seal(KEYS, job="j")
    middle = len(sealed) // 2
    changed = sealed[:middle] + ("A" if sealed[middle] != "A" else "B") + sealed[middle + 1 :]
    for damaged in (changed, sealed[:-8], f"{name_of_key(FIRST)}."):
        with pytest.raises(ConfigError, match="is damaged"):
            open_seal(damaged)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("", "is not set where Airflow's tasks run"),
        ("not a key", "key 1 is no base64; it must be 32 bytes"),
        (base64.urlsafe_b64encode(b"short").decode(), "key 1 is 5 bytes; it must be 32 bytes"),
        (f"{FIRST},", "key 2 is 0 bytes"),
    ],
)
def test_a_sealing_key_that_is_none_is_refused_and_not_repeated(
    value: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SEAL_KEY, value)
    for act in (require_sealing, lambda: seal(KEYS, job="j")):
        with pytest.raises(ConfigError, match=said) as raised:
            act()
        assert not value or value not in f"{raised.value} {raised.value.advice}"
