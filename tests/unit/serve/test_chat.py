"""The chat in a terminal: turns, commands, ctrl-c, and a context that is full."""

import dataclasses
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from stages.config.errors import ConfigError
from stages.serve.chat import Chat, Settings, talk
from stages.serve.engine import Worker
from stages.serve.loading import ServedModel
from tests.unit.serve.test_batch import alone

GREEDY = Settings(temperature=0.0, length=6)


def chatting(served: ServedModel, settings: Settings = GREEDY, *, system: str = "") -> tuple[Chat, io.StringIO]:
    out = io.StringIO()
    return Chat(Worker(served, max_batch=1), settings, system=system, out=out), out


def expected(served: ServedModel, *turns: str, length: int = 6) -> str:
    """The answer to a conversation, by ids."""
    roles = ("user", "assistant")
    messages = [{"role": roles[place % 2], "content": text} for place, text in enumerate(turns)]
    prompt = served.chat.encode_prompt(messages).tolist()
    ids = alone(served, prompt, temperature=0.0, max_tokens=length, end_ids=served.end_ids)
    return served.tokenizer.backend.decode(ids, skip_special_tokens=True)


def said(chat: Chat) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"]) for turn in chat.talk.messages()]


@contextmanager
def interrupted_at(served: ServedModel, step: int) -> Iterator[None]:
    """Ctrl-c in the middle of one of the model's steps."""
    left = step

    def count(*_: object) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt

    hook = served.model.register_forward_pre_hook(count)
    try:
        yield
    finally:
        hook.remove()


def test_every_turn_sees_the_ones_before_it(served: ServedModel) -> None:
    chat, _ = chatting(served)
    talk(chat, iter(["sort?\n", "\n", "merge?\n"]), io.StringIO())
    first = expected(served, "sort?")
    second = expected(served, "sort?", first, "merge?")
    assert said(chat) == [("user", "sort?"), ("assistant", first), ("user", "merge?"), ("assistant", second)]
    assert second != expected(served, "merge?"), "otherwise the first turn did not matter"


def test_reset_and_system_begin_anew(served: ServedModel) -> None:
    chat, out = chatting(served, system="Be brief.")
    talk(chat, iter(["sort?"]), out)
    assert said(chat)[0] == ("system", "Be brief.")
    talk(chat, iter(["/reset"]), out)
    assert said(chat) == [("system", "Be brief.")]
    talk(chat, iter(["/system Say more.", "sort?", "/system"]), out)
    assert said(chat) == []
    assert "system message set" in out.getvalue()
    assert "no system message any more" in out.getvalue()


def test_settings_change_the_next_answer(served: ServedModel) -> None:
    chat, out = chatting(served)
    talk(chat, iter(["/length 2", "sort?", "/reset", "/temperature 1", "/seed 3", "sort?", "/reset", "sort?"]), out)
    assert "cut at 2 tokens; /length allows more" in out.getvalue()
    seeded = said(chat)[1][1]
    chat, _ = chatting(served, Settings(temperature=1.0, length=2, seed=3))
    chat.ask("sort?")
    assert said(chat)[1][1] == seeded


def test_ctrl_c_ends_the_answer_and_the_chat_continues(served: ServedModel) -> None:
    chat, out = chatting(served)
    with interrupted_at(served, 4):
        chat.ask("sort?")
    partial = expected(served, "sort?", length=3).removesuffix("\ufffd")
    assert "(interrupted)" in out.getvalue()
    assert said(chat) == [("user", "sort?"), ("assistant", partial)]
    assert len(partial) < len(expected(served, "sort?"))
    chat.ask("merge?")
    assert said(chat)[-1] == ("assistant", expected(served, "sort?", partial, "merge?"))


def test_a_full_context_is_said_and_the_question_is_not_asked(served: ServedModel) -> None:
    chat, out = chatting(served, Settings(temperature=0.0, length=100))
    talk(chat, iter(["sort?", "and then?"]), out)
    told = out.getvalue()
    assert "the context of 64 is full; /reset begins anew" in told
    assert "(the context is full: the conversation has" in told
    assert [role for role, _ in said(chat)] == ["user", "assistant"]
    talk(chat, iter(["/reset", "sort?"]), out)
    assert [role for role, _ in said(chat)] == ["user", "assistant"]


def test_an_answer_of_nothing_is_part_of_the_conversation_too(served: ServedModel) -> None:
    silent = dataclasses.replace(served, end_ids=frozenset(range(served.tokenizer.vocab_size)))
    chat, _ = chatting(silent)
    talk(chat, iter(["sort?", "merge?"]), io.StringIO())
    assert said(chat) == [("user", "sort?"), ("assistant", ""), ("user", "merge?"), ("assistant", "")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/temperature hot", "/temperature 'hot' is no number"),
        ("/temperature 3", "temperature=3.0; allowed: 0 to 2"),
        ("/temperature nan", "temperature=nan; allowed: 0 to 2"),
        ("/length 0", "length=0; allowed: at least 1 token"),
        ("/length inf", "/length 'inf' is no whole number"),
        ("/wipe", "/wipe is no command /help lists them."),
    ],
)
def test_what_is_no_command_is_said_and_changes_nothing(served: ServedModel, line: str, message: str) -> None:
    chat, out = chatting(served)
    talk(chat, iter([line]), out)
    assert message in out.getvalue()
    assert chat.settings == GREEDY


def test_exit_ends_the_chat_before_the_next_line(served: ServedModel) -> None:
    chat, out = chatting(served)
    talk(chat, iter(["/help", "/exit", "sort?"]), out)
    assert said(chat) == []
    assert "/temperature NUMBER" in out.getvalue()


def test_control_characters_of_a_model_do_not_reach_the_terminal(served: ServedModel) -> None:
    """This one writes bytes at random."""
    chat, out = chatting(served, Settings(temperature=1.0, length=40, seed=0))
    chat.ask("sort?")
    written = said(chat)[1][1]
    assert re.search(r"[\x00-\x08\x0e-\x1f\x7f-\x9f]", written), "otherwise this shows nothing"
    assert not re.search(r"[\x00-\x08\x0e-\x1f\x7f-\x9f]", out.getvalue())


def test_settings_no_model_can_have_are_refused() -> None:
    with pytest.raises(ConfigError, match="top_p=0"):
        Settings(top_p=0)
