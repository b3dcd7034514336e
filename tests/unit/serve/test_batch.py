"""Answers that are written together are the answers that each would be alone."""

import copy
import dataclasses
import math
import threading
from typing import Any

import numpy as np
import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from stages.models.generation import Draws, Sampling, generate
from stages.serve import batch
from stages.serve.answer import Answer, Choice, Piece
from stages.serve.batch import chosen_tokens
from stages.serve.engine import Engine, Worker
from stages.serve.loading import ServedModel

PROMPTS = [[0, 5, 9, 30], [0, 7], [0, *range(40, 60)]]


def answer_to(served: ServedModel, prompt: list[int], *, number: int = 0, **choice: Any) -> Answer:
    pieces: list[Piece] = []
    made = Choice(**{"max_tokens": 12, "top_logprobs": 0, **choice})
    ids = np.asarray(prompt, dtype=np.int64)
    answer = Answer(ids, made, emit=pieces.append, tokenizer=served.tokenizer.backend, number=number)
    answer.pieces = pieces  # type: ignore[attr-defined]
    return answer


def pieces_of(answer: Answer) -> list[Piece]:
    return answer.pieces  # type: ignore[attr-defined]


def tokens_of(answer: Answer) -> list[int]:
    return [score.token for piece in pieces_of(answer) for score in piece.scores]


def finish(worker: Worker, answers: list[Answer]) -> None:
    while not all(answer.is_done or answer.cancelled for answer in answers):
        assert worker.turn()


def alone(served: ServedModel, prompt: list[int], **choice: Any) -> list[int]:
    answer = answer_to(served, prompt, **choice)
    worker = Worker(served, max_batch=1)
    worker.add([answer])
    finish(worker, [answer])
    return tokens_of(answer)


def test_greedy_tokens_are_those_of_the_pipelines_own_generation(served: ServedModel) -> None:
    answers = [answer_to(served, prompt, temperature=0.0) for prompt in PROMPTS]
    worker = Worker(served, max_batch=8)
    for answer in answers:
        worker.add([answer])
    finish(worker, answers)
    sampling = Sampling(12, eos_id=-1, pad_id=served.tokenizer.pad_id, temperature=0.0)
    expected = generate(served.model, [np.asarray(prompt) for prompt in PROMPTS], sampling, Draws(0, 0, range(3)))
    assert [tokens_of(answer) for answer in answers] == [one.tolist() for one in expected]
    assert len({tuple(tokens_of(answer)) for answer in answers}) == 3, "otherwise the prompts did not matter"


@pytest.mark.parametrize("part", [3, 256])
def test_an_answer_is_the_same_when_others_join_and_leave(
    served: ServedModel, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    """The first is long, the second ends before the third comes, and prompts are read whole or in parts."""
    expected = [
        alone(served, prompt, seed=3, max_tokens=count) for prompt, count in zip(PROMPTS, (30, 4, 9), strict=True)
    ]
    monkeypatch.setattr(batch, "PROMPT_PART", part)
    first, second, third = (
        answer_to(served, prompt, seed=3, max_tokens=count) for prompt, count in zip(PROMPTS, (30, 4, 9), strict=True)
    )
    worker = Worker(served, max_batch=4)
    worker.add([first])
    for _ in range(5):
        worker.turn()
    worker.add([second])
    finish(worker, [second])
    worker.add([third])
    finish(worker, [first, third])
    assert [tokens_of(first), tokens_of(second), tokens_of(third)] == expected
    assert list(map(len, expected)) == [30, 4, 9]


def test_only_so_many_answers_are_written_at_once_and_the_others_wait(served: ServedModel) -> None:
    answers = [answer_to(served, prompt, temperature=0.0, max_tokens=6) for prompt in PROMPTS]
    worker = Worker(served, max_batch=2)
    for answer in answers:
        worker.add([answer])
    for _ in range(3):
        worker.turn()
    assert [bool(answer.num_tokens) for answer in answers] == [True, True, False]
    finish(worker, answers)
    assert [tokens_of(answer) for answer in answers] == [
        alone(served, p, temperature=0.0, max_tokens=6) for p in PROMPTS
    ]


def test_several_answers_to_one_prompt_draw_their_own_numbers_and_a_seed_repeats_them(served: ServedModel) -> None:
    def asked() -> list[list[int]]:
        answers = [answer_to(served, PROMPTS[0], seed=11, number=number) for number in range(3)]
        worker = Worker(served, max_batch=8)
        worker.add(answers)
        finish(worker, answers)
        return [tokens_of(answer) for answer in answers]

    first = asked()
    assert first == asked()
    assert len(set(map(tuple, first))) == 3
    assert first[0] == alone(served, PROMPTS[0], seed=11)


def test_a_cancelled_answer_leaves_and_the_others_do_not_notice(served: ServedModel) -> None:
    kept, left = (answer_to(served, prompt, seed=1) for prompt in PROMPTS[:2])
    waiting = answer_to(served, PROMPTS[2], seed=1)
    worker = Worker(served, max_batch=2)
    for answer in (kept, left, waiting):
        worker.add([answer])
    for _ in range(4):
        worker.turn()
    written = left.num_tokens
    left.cancelled = waiting.cancelled = True
    finish(worker, [kept])
    assert tokens_of(kept) == alone(served, PROMPTS[0], seed=1)
    assert (left.num_tokens, waiting.num_tokens) == (written, 0)
    assert not worker.turn(), "nothing is left to do"


def test_an_echoed_prompt_has_the_models_own_logprobs(served: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = PROMPTS[2]
    with torch.no_grad():
        logits = served.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    for part in (4, 256):
        monkeypatch.setattr(batch, "PROMPT_PART", part)
        answer = answer_to(served, ids, echo=True, max_tokens=0, top_logprobs=2)
        worker = Worker(served, max_batch=1)
        worker.add([answer])
        finish(worker, [answer])
        assert answer.prompt_scores[0].logprob is None
        found = [score.logprob for score in answer.prompt_scores[1:]]
        expected = [float(logits[place, token]) for place, token in enumerate(ids[1:])]
        assert found == pytest.approx(expected, abs=1e-5)
        best = logits.topk(2).indices.tolist()
        assert [[token for token, _ in score.top] for score in answer.prompt_scores[1:]] == best[:-1]
        assert pieces_of(answer) == [Piece("", (), "length")]


def with_model(served: ServedModel, model: Any) -> ServedModel:
    return dataclasses.replace(served, model=model)


def test_a_model_that_fails_ends_its_answer_with_the_reason_and_no_other(served: ServedModel) -> None:
    """As memory that is too small for one long prompt does."""
    model = copy.deepcopy(served.model)

    def refuse_nine(_module: Any, _args: Any, given: dict[str, Any]) -> None:
        if (given["input_ids"] == 9).any():
            raise RuntimeError("no memory for token 9")

    model.register_forward_pre_hook(refuse_nine, with_kwargs=True)
    worker = Worker(with_model(served, model), max_batch=4)
    early, bad, late = (answer_to(served, prompt, temperature=0.0) for prompt in ([0, 5], [0, 9], [0, 7]))
    for answer in (early, bad, late):
        worker.add([answer])
    finish(worker, [early, bad, late])
    assert pieces_of(bad) == [Piece(error="the model sft failed: RuntimeError: no memory for token 9")]
    assert tokens_of(early) == alone(served, [0, 5], temperature=0.0)
    assert tokens_of(late) == alone(served, [0, 7], temperature=0.0)


def test_memory_that_is_too_small_for_another_answer_ends_those_that_it_was_for(
    served: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    worker = Worker(served, max_batch=4)
    first, second = (answer_to(served, prompt, temperature=0.0) for prompt in PROMPTS[:2])
    worker.add([first])
    worker.turn()
    monkeypatch.setattr(batch, "joined", full)
    worker.add([second])
    finish(worker, [first, second])
    for answer in (first, second):
        assert pieces_of(answer)[-1].error == "the model sft failed: RuntimeError: out of memory"
    later = answer_to(served, PROMPTS[2], temperature=0.0)
    worker.add([later])
    finish(worker, [later])
    assert tokens_of(later) == alone(served, PROMPTS[2], temperature=0.0)


@pytest.mark.timeout(60)
def test_no_error_ends_the_thread_that_computes(served: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(served, max_batch=4)
    engine = Engine([worker])
    ended = threading.Event()

    def ask(prompt: list[int]) -> Answer:
        answer = answer_to(served, prompt, temperature=0.0)
        kept = answer.emit

        def emit(piece: Piece) -> None:
            kept(piece)
            if piece.is_last:
                ended.set()

        answer.emit = emit
        ended.clear()
        engine.call(lambda: worker.add([answer]))
        assert ended.wait(20)
        return answer

    def broken() -> bool:
        raise ValueError("nobody thought of this")

    engine.start()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(worker, "turn", broken)
            answer = ask(PROMPTS[0])
        assert pieces_of(answer) == [Piece(error="the model sft failed: ValueError: nobody thought of this")]
        assert tokens_of(ask(PROMPTS[1])) == alone(served, PROMPTS[1], temperature=0.0)
        assert engine.is_running
    finally:
        engine.stop()
    assert not engine.is_running


def test_a_model_that_gives_nan_says_so_instead_of_writing(served: ServedModel) -> None:
    model = copy.deepcopy(served.model)
    with torch.no_grad():
        model.get_input_embeddings().weight[3] = math.nan
    answer = answer_to(served, [0, 5])
    worker = Worker(with_model(served, model), max_batch=1)
    worker.add([answer])
    finish(worker, [answer])
    assert [piece.error for piece in pieces_of(answer)] == ["the model sft failed: the model's logits are NaN"]


def test_a_model_with_a_sliding_window_writes_what_transformers_writes(served: ServedModel) -> None:
    """Its cache forgets, so answers cannot share one; they are written next to each other all the same."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=served.tokenizer.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=6, initializer_range=0.3, eos_token_id=None,
    )  # fmt: skip
    windowed = with_model(served, MistralForCausalLM(config).eval())
    answers = [answer_to(served, prompt, temperature=0.0) for prompt in PROMPTS]
    worker = Worker(windowed, max_batch=8)
    for answer in answers:
        worker.add([answer])
    finish(worker, answers)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = torch.tensor([prompt])
        whole = windowed.model.generate(ids, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(ids))
        assert tokens_of(answer) == whole[0, len(prompt) :].tolist()


def test_tokens_are_chosen_by_temperature_share_and_draw() -> None:
    """Probabilities 0.5, 0.3, 0.2 in the order of tokens 1, 2, 0."""
    logits = torch.tensor([0.2, 0.5, 0.3]).log()

    def chosen(draw: float, *, temperature: float = 1.0, top_p: float = 1.0) -> int:
        values = (temperature, top_p, draw)
        temperature_S, top_p_S, draws_S = (torch.tensor([value]) for value in values)
        return int(chosen_tokens(logits[None], temperature_S=temperature_S, top_p_S=top_p_S, draws_S=draws_S))

    # by token: [0, 0.2) is token 0, [0.2, 0.7) token 1, [0.7, 1) token 2
    assert [chosen(draw) for draw in (0.19, 0.21, 0.69, 0.71)] == [0, 1, 1, 2]
    assert chosen(0.99, temperature=0.0) == 1
    # squares over their sum, 0.38: [0, 0.105) is token 0, [0.105, 0.763) token 1
    assert [chosen(draw, temperature=0.5) for draw in (0.10, 0.11, 0.76, 0.77)] == [0, 1, 1, 2]
    # 0.8 is reached by tokens 1 and 2: [0, 0.625) is token 1; 0.5 by token 1 alone; the first always counts
    assert [chosen(draw, top_p=0.8) for draw in (0.0, 0.62, 0.63, 0.99)] == [1, 1, 2, 2]
    assert [chosen(draw, top_p=0.5) for draw in (0.0, 0.99)] == [1, 1]
    assert chosen(0.99, top_p=1e-6) == 1


def test_rows_of_one_step_keep_their_own_settings() -> None:
    logits = torch.tensor([[0.2, 0.5, 0.3]] * 3).log()
    found = chosen_tokens(
        logits,
        temperature_S=torch.tensor([0.0, 1.0, 1.0]),
        top_p_S=torch.tensor([1.0, 1.0, 0.5]),
        draws_S=torch.tensor([0.1, 0.1, 0.1]),
    )
    assert found.tolist() == [1, 0, 1]
