"""The built-in suites on models whose scores are known by hand."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from stages.data.tokens.packing import RowBudget
from stages.judge.bench import Bench, open_bench
from stages.judge.builtin.language import Language, _windows
from stages.judge.builtin.replies import Margins, Pairs, Preferences, Responses
from stages.judge.builtin.sampled import Divergence, Length, Sampler, repeated_share
from stages.judge.forward import Forward
from stages.judge.heldout import TOO_LONG, Heldout, Prompt, Skipped
from stages.judge.suite import Measurement, Subject
from tests.judging import SMALL, evaluation, make_world


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return open_bench(evaluation(make_world(tmp_path_factory.mktemp("run"))))


@pytest.fixture
def heldout(bench: Bench) -> Heldout:
    return bench.heldout


@pytest.fixture
def forward(bench: Bench) -> Forward:
    return Forward(torch.device("cpu"), RowBudget(64, 4))


@pytest.fixture
def subject(bench: Bench) -> Subject:
    return bench.subjects.open("sft")


@pytest.fixture
def uniform(subject: Subject) -> Iterator[Subject]:
    """A model that finds every token equally likely."""
    model: Any = subject.model
    weight = model.get_output_embeddings().weight.data
    before = weight.clone()
    weight.zero_()
    yield subject
    weight.copy_(before)


def values(measured: Measurement) -> list[float]:
    return [score.value for score in measured.scores]


def test_bits_per_byte_of_a_uniform_model_are_tokens_times_log2_v(
    heldout: Heldout, forward: Forward, uniform: Subject
) -> None:
    found = Language(heldout, forward).measure(uniform).scores
    vocabulary = uniform.model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
    for document, score in zip(heldout.documents, found, strict=True):
        ids = heldout.tokenizer.backend.encode(document.text, add_special_tokens=False).ids
        assert score.tokens == len(ids)
        assert score.value == pytest.approx(len(ids) * math.log2(vocabulary) / len(document.text.encode()), rel=1e-5)


@pytest.mark.parametrize("length", [0, 1, 2, 7, 8, 9, 15, 16, 40])
def test_windows_predict_every_token_but_the_first_exactly_once(length: int) -> None:
    ids = np.arange(length)
    windows = _windows(ids, 8)
    assert [int(token) for window in windows for token in window.ids[1:]] == list(range(1, length))
    assert all(len(window.ids) <= 8 for window in windows)


def test_nats_per_byte_of_a_uniform_model_are_targets_times_ln_v(
    heldout: Heldout, forward: Forward, uniform: Subject
) -> None:
    vocabulary = uniform.model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
    for reply, score in zip(heldout.conversations, Responses(heldout, forward).measure(uniform).scores, strict=True):
        text = reply.chat.messages[-1]["content"] if reply.chat else ""
        assert reply.num_bytes == len(text.encode())
        assert score.value == pytest.approx(score.tokens * math.log(vocabulary) / reply.num_bytes, rel=1e-5)


def test_swapping_chosen_and_rejected_gives_one_minus_the_accuracy(
    heldout: Heldout, forward: Forward, subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = values(Pairs(heldout, forward).measure(subject))
    swapped = [replace(pair, chosen=pair.rejected, rejected=pair.chosen) for pair in heldout.pairs]
    monkeypatch.setattr(heldout, "pairs", swapped)
    after = values(Pairs(heldout, forward).measure(subject))
    assert after == [1 - value for value in before]
    assert set(before) <= {0.0, 0.5, 1.0}


def test_a_uniform_model_prefers_the_reply_with_fewer_tokens_a_byte(
    heldout: Heldout, forward: Forward, uniform: Subject
) -> None:
    for pair, value in zip(heldout.pairs, values(Pairs(heldout, forward).measure(uniform)), strict=True):
        chosen, rejected = (side.tokens.loss_mask.sum() / side.num_bytes for side in (pair.chosen, pair.rejected))
        assert chosen != rejected
        assert value == float(chosen < rejected)


def test_a_prompt_that_cannot_be_asked_changes_no_answer_to_another(
    heldout: Heldout, subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sampler_of(heldout).of(subject)
    first, ask = heldout.prompts[0], heldout.prompt_ids

    def without_the_first(prompt: Prompt, subject: Subject, *, max_response_length: int) -> np.ndarray:
        if prompt is first:
            raise Skipped(TOO_LONG)
        return ask(prompt, subject, max_response_length=max_response_length)

    monkeypatch.setattr(heldout, "prompt_ids", without_the_first)
    rest = sampler_of(heldout).of(subject)
    assert [one.ids.tolist() for one in rest.answers] == [one.ids.tolist() for one in whole.answers[1:]]
    assert rest.skipped == {TOO_LONG: 1}


def test_a_tie_counts_one_half(
    heldout: Heldout, forward: Forward, subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heldout, "pairs", [replace(pair, rejected=pair.chosen) for pair in heldout.pairs])
    assert values(Pairs(heldout, forward).measure(subject)) == [0.5] * 6


def test_a_model_prefers_nothing_more_than_itself(heldout: Heldout, forward: Forward, subject: Subject) -> None:
    margins = Margins(heldout, forward)
    found = Preferences(heldout, margins, lambda: subject, subject.identity).measure(subject)
    assert values(found) == [0.5] * 6
    sampler = sampler_of(heldout)
    assert values(Divergence(sampler, forward, lambda: subject, subject.identity).measure(subject)) == [0.0] * 6


def test_a_model_of_no_numbers_is_skipped_with_a_reason(heldout: Heldout, forward: Forward, uniform: Subject) -> None:
    uniform.model.get_output_embeddings().weight.data.fill_(math.nan)  # type: ignore[operator]
    for suite in (Language(heldout, forward), Responses(heldout, forward), Pairs(heldout, forward)):
        found = suite.measure(uniform)
        assert found.scores == []
        assert found.skipped == {"not_finite": len(suite)}


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0.0),
        ("only three words", 0.0),
        ("a b c d", 0.0),
        ("a b c d a b c d", 1 / 5),  # abcd bcda cdab dabc abcd: the last of five
        ("no no no no no no", 2 / 3),  # the same gram three times
        ("No, no, no, no,", 3 / 5),  # commas are words: five grams of two kinds
    ],
)
def test_repetition_by_hand(text: str, share: float) -> None:
    assert repeated_share(text) == pytest.approx(share)


def test_length_counts_bytes_and_tokens(heldout: Heldout, subject: Subject) -> None:
    for score in Length(sampler_of(heldout)).measure(subject).scores:
        assert score.value == len(score.response.encode())
        assert 1 <= score.tokens <= 4


def test_an_answer_in_the_scorers_tokens_is_the_held_out_conversation_that_says_it(heldout: Heldout) -> None:
    replies = {str(reply.chat.messages[:-1]): reply for reply in heldout.conversations if reply.chat}
    seen = 0
    for prompt in heldout.prompts:
        reply = replies.get(str(prompt.chat.messages)) if prompt.chat else None
        if reply is None or reply.chat is None:
            continue
        seen += 1
        text = reply.chat.messages[-1]["content"]
        ended, cut = (heldout.as_answered(prompt, text, ended=ended) for ended in (True, False))
        assert ended.ids.tolist() == reply.tokens.ids.tolist()
        assert cut.ids.tolist() == reply.tokens.ids.tolist()[:-1]  # without the end token
    assert seen


def test_digests_tell_items_and_settings_apart(heldout: Heldout, forward: Forward) -> None:
    suites = [Length(sampler_of(heldout)), Length(sampler_of(heldout, temperature=0.5)), Pairs(heldout, forward)]
    assert len({suite.digest for suite in suites}) == len(suites)
    assert Length(sampler_of(heldout)).digest == suites[0].digest


def sampler_of(heldout: Heldout, *, temperature: float = 1.0) -> Sampler:
    return Sampler(
        heldout,
        heldout.prompts,
        max_response_length=SMALL.max_response_length,
        temperature=temperature,
        seed=0,
        beat=lambda: None,
    )
