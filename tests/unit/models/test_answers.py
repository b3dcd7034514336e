"""Answers: batches and numbers of responses, whoever computes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from stages.data.tokens.views import TokensArtifact
from stages.models.answers import Answerer, InProcess
from stages.models.build import new_causal_lm
from stages.models.generation import Draws, Sampling, generate, token_columns
from tests.small_world import MODEL, make_tokens

SAMPLING = Sampling(max_response_length=5, eos_id=1, pad_id=2)


@dataclass
class Echo:
    """Answers with the prompt's first token and the response's number; remembers the batches."""

    sizes: list[int] = field(default_factory=list)
    streams: set[tuple[int, int]] = field(default_factory=set)

    def respond(self, prompts: Sequence[np.ndarray], sampling: Sampling, draws: Draws) -> list[np.ndarray]:
        self.sizes.append(len(prompts))
        self.streams.add((draws.seed, draws.stream))
        return [np.array([prompt[0], number]) for prompt, number in zip(prompts, draws.indices, strict=True)]


PROMPTS = [np.array([10 + i, 7]) for i in range(7)]


def test_every_prompt_gets_the_number_of_its_place_however_batches_are_cut() -> None:
    expected = [[10 + i, i] for i in range(7)]
    for size, sizes in ((3, [3, 3, 1]), (64, [7])):
        backend = Echo()
        answers = Answerer(backend, SAMPLING, seed=4, stream=9, batch_size=size).answers(PROMPTS)
        assert [answer.tolist() for answer in answers] == expected
        assert backend.sizes == sizes
        assert backend.streams == {(4, 9)}


def test_no_prompts_have_no_answers() -> None:
    assert Answerer(Echo(), SAMPLING, seed=0).answers([]) == []


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Sampling]:
    home = tmp_path_factory.mktemp("world")
    folder = Path(make_tokens(home).uri.removeprefix("file://"))
    tokens = TokensArtifact(folder)
    return new_causal_lm(MODEL, tokens, seed=3).eval(), Sampling(8, eos_id=tokens.eos_id, pad_id=tokens.pad_id)


def test_a_model_in_process_answers_alike_in_batches_of_any_size(model) -> None:
    backend = InProcess(model[0], torch.device("cpu"))
    together = Answerer(backend, model[1], seed=1).answers(PROMPTS)
    alone = Answerer(backend, model[1], seed=1, batch_size=1).answers(PROMPTS)
    assert [one.tolist() for one in together] == [one.tolist() for one in alone]


def test_columns_arrive_one_by_one_and_are_the_responses(model) -> None:
    """Whoever streams sees the tokens that `generate` returns, without waiting for the end."""
    draws = Draws(seed=1, stream=0, indices=range(7))
    stream = token_columns(model[0], PROMPTS, model[1], draws)
    first = next(stream)
    assert first.shape == (7,)
    table = torch.stack([first, *stream], dim=1)
    for tokens, response in zip(table, generate(model[0], PROMPTS, model[1], draws), strict=True):
        assert tokens[: len(response)].tolist() == response.tolist()
        assert set(tokens[len(response) :].tolist()) <= {model[1].pad_id}


def test_gradients_stay_on_for_whoever_consumes_the_columns(model) -> None:
    for _ in token_columns(model[0], PROMPTS, model[1], Draws(seed=1, stream=0, indices=range(7))):
        assert torch.is_grad_enabled()


def test_temperature_zero_takes_the_most_probable_token_whatever_is_drawn(model) -> None:
    greedy = Sampling(3, eos_id=model[1].eos_id, pad_id=model[1].pad_id, temperature=0.0)
    one, other = (generate(model[0], PROMPTS, greedy, Draws(seed, stream=0, indices=range(7))) for seed in (1, 2))
    assert [response.tolist() for response in one] == [response.tolist() for response in other]
    for prompt, response in zip(PROMPTS, one, strict=True):
        logits = model[0](input_ids=torch.as_tensor(prompt)[None]).logits[0, -1]
        assert response[0] == logits.argmax()
