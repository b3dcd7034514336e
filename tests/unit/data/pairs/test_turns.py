"""Calls, thinking and weights of a conversation, in the fields that people give them in, become one shape."""

from typing import Any

import pytest

from stages.data.pairs.turns import (
    Unusable,
    as_conversation,
    plain_text,
    read_tools,
    read_turns,
    split_thinking,
    text_fields,
    trained_turns,
)

USER = {"role": "user", "content": "a"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
ANSWER = {"role": "tool", "content": "4"}
SAID = {"role": "assistant", "content": "b"}


def read(*turns: dict[str, Any]) -> list[dict[str, Any]]:
    return read_turns(list(turns), role="role", text="content")


@pytest.mark.parametrize(
    "given",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1, "y": null}'}}]},
        {"role": "assistant", "content": "", "function_call": {"name": "f", "arguments": '{"x": 1}'}},
        {"role": "function_call", "content": '{"name": "f", "arguments": {"x": 1}}'},
        {"role": "tool_call", "content": '[{"name": "f", "parameters": {"x": 1}}]'},
    ],
)
def test_calls_are_read_in_the_fields_that_people_use(given: dict[str, Any]) -> None:
    assert read(given) == [CALLS]


@pytest.mark.parametrize(
    "call", ["f(1)", {"name": ""}, {"name": "f", "arguments": "x"}, {"name": "f", "arguments": [1]}]
)
def test_a_call_without_a_name_or_arguments_has_a_reason(call: Any) -> None:
    with pytest.raises(Unusable, match="malformed_tool_call"):
        read({"role": "assistant", "function_call": call})


def test_tools_may_be_json_and_lose_the_fields_that_only_others_have() -> None:
    assert read_tools('[{"name": "f", "limit": null}]') == [{"name": "f"}]
    assert read_tools(None) == read_tools("") == read_tools([]) == []
    for bad in ("f", [{"description": "?"}], ["f"], {"name": "f"}):
        with pytest.raises(Unusable, match="malformed_tools"):
            read_tools(bad)


def test_a_tools_answer_stands_between_a_call_and_the_next_turn() -> None:
    whole = as_conversation([USER, CALLS, ANSWER, ANSWER, CALLS, ANSWER, SAID, USER, SAID])
    assert len(whole.messages) == 9
    unanswered = as_conversation([USER, SAID, USER, CALLS, ANSWER])
    assert unanswered.messages[-1] == CALLS
    assert unanswered.changes == ("unanswered_last_turn",)


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([USER, CALLS, USER, SAID], "call_without_answer"),
        ([USER, CALLS, SAID], "call_without_answer"),
        ([USER, SAID, ANSWER, SAID], "tool_answer_without_call"),
        ([USER, CALLS, ANSWER, SAID, ANSWER], "wrong_alternation"),
        ([ANSWER, CALLS], "tool_answer_without_call"),
        ([USER, ANSWER, SAID], "tool_answer_without_call"),
    ],
)
def test_tools_in_the_wrong_place_have_a_reason(turns: list[Any], reason: str) -> None:
    with pytest.raises(Unusable, match=reason):
        as_conversation(turns)


@pytest.mark.parametrize(
    "given",
    [
        {"content": "b", "reasoning_content": " t\n"},
        {"content": "b", "thinking": "t"},
        {"content": [{"type": "thinking", "thinking": "t"}, {"type": "text", "text": "b"}]},
        {"content": "<think>\nt\n</think>\n\nb"},
    ],
)
def test_thinking_stands_at_the_begin_of_the_text_wherever_it_was_given(given: dict[str, Any]) -> None:
    (message,) = read({"role": "assistant", **given})
    assert split_thinking(message["content"]) == ("t", "b")


def test_only_a_whole_block_at_the_begin_is_thinking() -> None:
    assert split_thinking("so <think>t</think> b") == ("", "so <think>t</think> b")
    assert split_thinking("<think>t") == ("", "<think>t")
    assert split_thinking("<think>\n\n</think>\n\nb") == ("", "b")
    assert plain_text([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]) == "ab"


def test_which_turns_are_trained() -> None:
    off = {**SAID, "weight": 0}
    assert trained_turns([USER, SAID, USER, SAID], "all") == {1, 3}
    assert trained_turns([USER, SAID, USER, SAID], "last") == {3}
    assert trained_turns([USER, off, USER, SAID], "last") == trained_turns([USER, off, USER, SAID], "weight") == {3}
    for turns, rule in (([USER, off, USER, SAID], "all"), ([USER, SAID, USER, off], "last"), ([USER, off], "weight")):
        with pytest.raises(Unusable, match="untrained_turn"):
            trained_turns(turns, rule)
    (kept,) = read({**SAID, "weight": 0})
    assert kept == off


def test_texts_in_arguments_can_be_replaced() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"to": "me@x.org", "all": [1, {"deep": "d"}]}}}
    message = {"role": "assistant", "content": "c", "tool_calls": [call]}
    for holder, key in text_fields(message):
        holder[key] = holder[key].upper()
    assert message["content"] == "C"
    assert call["function"]["arguments"] == {"to": "ME@X.ORG", "all": [1, {"deep": "D"}]}
