"""A chat template that does not end, or that fails in a way of its own, is the configuration's fault."""

import mmap
import resource
import sys
import threading
import time
from collections import Counter

import pytest
from tokenizers import Tokenizer, models

from stages.config.errors import ConfigError
from stages.data.pairs.turns import Unusable
from stages.data.tokens.bounded import Endless, bounded
from stages.data.tokens.chat import CHAT_TEMPLATE, ChatEncoder

NAMES = {"bos_token": "<|bos|>", "eos_token": "<|end|>", "pad_token": "<|end|>"}

ENDLESS = {
    "a macro that calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a loop in a loop in a loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a text that doubles": "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}"
    "{% endfor %}",
    "a text of 100 GB": "{{ 'a' * 10 ** 11 }}",
    "a text of 100 GB in other words": "{{ 'a' * 100000000000 }}",
    "lists of lists": "{% set n = namespace(x=['a']) %}{% for i in range(40) %}{% set n.x = [n.x, n.x, n.x, n.x] %}"
    "{% endfor %}{{ n.x }}",
    "a number that squares itself": "{% set n = namespace(x=10) %}{% for i in range(40) %}{% set n.x = n.x * n.x %}"
    "{% endfor %}",
    "a power": "{{ 9**9**9 }}",
    "brackets": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
}
FAILING = {
    "blocks": "{% for a in [1] %}" * 60 + "{% endfor %}" * 60,
    "an exception": "{{ raise_exception('no') }}",
    "no method": "{{ messages.nothing() }}",
    "a division": "{{ 1 // 0 }}",
    "an unknown filter": "{{ messages | nothing }}",
    "no syntax": "{% for %}",
    "a wrong argument": "{{ range('a') }}",
    "too large a range": "{% for i in range(10000000) %}{% endfor %}",
}


def encoder(template: str) -> ChatEncoder:
    return ChatEncoder(Tokenizer(models.BPE()), template, NAMES, origin="/models/hostile")


@pytest.mark.parametrize("template", ENDLESS.values(), ids=ENDLESS)
@pytest.mark.timeout(120)
def test_a_template_without_an_end_is_refused(template: str) -> None:
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(ConfigError, match=r"the chat template of /models/hostile (does not end|computes powers)"):
        encoder(template + CHAT_TEMPLATE).check()
    assert resource.getrlimit(resource.RLIMIT_AS) == limits


def test_lists_of_lists_are_refused_before_they_are_written_out() -> None:
    """As text they would fill the memory that a template may have, which takes half a minute."""
    with pytest.raises(ConfigError, match="its variables are larger than"):
        encoder(ENDLESS["lists of lists"] + CHAT_TEMPLATE)


@pytest.mark.parametrize("template", FAILING.values(), ids=FAILING)
@pytest.mark.timeout(60)
def test_a_template_that_fails_is_refused(template: str) -> None:
    with pytest.raises(ConfigError, match=r"the chat template of /models/hostile (cannot hold|does not end)"):
        encoder(template + CHAT_TEMPLATE).check()


def test_what_the_template_itself_says_is_in_the_error() -> None:
    with pytest.raises(ConfigError, match=r"refused_by_template \(only one question\)"):
        encoder("{% if messages | length > 1 %}{{ raise_exception('only one question') }}{% endif %}" + CHAT_TEMPLATE)


def test_steps_are_counted_alike_on_every_machine_and_tracing_ends_with_them() -> None:
    before = sys.gettrace()
    seen = Counter[str]()

    def calls(number: int) -> None:
        for _ in range(number):
            seen.update(["call"])

    bounded(lambda: calls(10), steps=100)
    with pytest.raises(Endless):
        bounded(lambda: calls(1000), steps=100)
    assert sys.gettrace() is before
    assert seen["call"] < 200


def test_a_long_conversation_is_far_from_the_limit() -> None:
    many = [{"role": ("user", "assistant")[place % 2], "content": "a"} for place in range(2000)]
    made = ChatEncoder(Tokenizer(models.BPE()), CHAT_TEMPLATE, NAMES)
    assert len(made.encode(many).ids) == 0  # of a vocabulary without pieces
    with pytest.raises(Unusable, match="reserved_character"):
        made.encode([{"role": "user", "content": "\ue000"}, {"role": "assistant", "content": "a"}])


def test_other_threads_have_room_while_a_template_runs() -> None:
    def import_something_large() -> None:
        done.append(len(mmap.mmap(-1, 512 << 20)))  # as the libraries that the tracking thread imports meanwhile

    def render() -> None:
        other = threading.Thread(target=import_something_large)
        other.start()
        other.join()

    done: list[int] = []
    bounded(render)
    assert done == [512 << 20]


def test_two_threads_at_once_leave_the_limit_as_it_was() -> None:
    limits = resource.getrlimit(resource.RLIMIT_AS)
    second_began, first_ended = threading.Event(), threading.Event()

    def first() -> None:
        bounded(lambda: second_began.wait(0.5))
        first_ended.set()

    def second() -> None:
        bounded(lambda: (second_began.set(), first_ended.wait(0.5)))

    threads = [threading.Thread(target=run) for run in (first, second)]
    try:
        for thread in threads:
            thread.start()
            time.sleep(0.1)
        for thread in threads:
            thread.join()
        assert resource.getrlimit(resource.RLIMIT_AS) == limits
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
