"""Attention within packed documents equals attention of each alone, in values and gradients; so do shared prompts."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from stages.data.tokens.packing import Packed, TokenSequence, lay_out
from stages.data.tokens.views import Pair
from stages.models.attention import attend_within_documents, attends_within_documents
from stages.models.forward import hidden_states, segment_logprobs, target_logprobs
from stages.train.pairs import both_answers

_SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**_SIZES, initializer_range=0.2))
    attend_within_documents(model)
    assert attends_within_documents(model)
    return model


def random_sequence(length: int, *, seed: int, prompt: int = 1) -> TokenSequence:
    ids = np.random.default_rng(seed).integers(1, 50, size=length)
    return TokenSequence(ids, (np.arange(length) >= prompt).astype(np.int64))


def gradients(model: nn.Module) -> list[Tensor]:
    grads = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    return grads


@pytest.mark.parametrize("lengths", [(5, 1, 17), (300, 128, 129)], ids=["short", "longer than a block of queries"])
def test_packed_equals_plain_sdpa_on_each_document(model: LlamaForCausalLM, lengths: tuple[int, ...]) -> None:
    sequences = [random_sequence(length, seed=i) for i, length in enumerate(lengths)]
    packed = hidden_states(model, lay_out(sequences))
    weights = torch.randn_like(packed)
    (packed * weights).sum().backward()
    ours = gradients(model)
    model.set_attn_implementation("sdpa")
    alone = torch.cat([model.model(torch.from_numpy(one.ids)[None]).last_hidden_state for one in sequences], dim=1)
    (alone * weights).sum().backward()
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(ours, gradients(model), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("prompt", [1, 6, 140])
def test_a_shared_prompt_changes_neither_logprobs_nor_gradients(model: LlamaForCausalLM, prompt: int) -> None:
    start = random_sequence(prompt, seed=1)
    chosen, rejected = (
        TokenSequence(np.concatenate([start.ids, answer]), np.repeat([0, 1], [prompt, len(answer)]))
        for answer in (np.array([4, 5, 6, 7]), np.array([4, 9]))
    )
    apart = lay_out([random_sequence(9, seed=2), *both_answers(Pair(chosen, rejected), share_prompt=False)])
    together = lay_out([random_sequence(9, seed=2), *both_answers(Pair(chosen, rejected), share_prompt=True)])
    assert together.num_tokens == apart.num_tokens - prompt

    def run(batch: Packed) -> tuple[Tensor, list[Tensor]]:
        logprobs_S = segment_logprobs(model, batch)
        (logprobs_S * torch.tensor([1.0, 2.0, -3.0])).sum().backward()
        return logprobs_S.detach(), gradients(model)

    (expected, expected_grads), (logprobs, grads) = run(apart), run(together)
    torch.testing.assert_close(logprobs, expected, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_answers_that_begin_alike_share_the_prompt_alone() -> None:
    """Prompt 7 8, answers 4 5 6 and 4 9: the 4 is a target of both and stays in both."""
    chosen = TokenSequence(np.array([7, 8, 4, 5, 6]), np.array([0, 0, 1, 1, 1]))
    rejected = TokenSequence(np.array([7, 8, 4, 9]), np.array([0, 0, 1, 1]))
    assert both_answers(Pair(chosen, rejected), share_prompt=True)[1].shared == 2


def test_a_model_with_a_window_keeps_its_attention_and_gets_padded_rows() -> None:
    torch.manual_seed(0)
    windowed = MistralForCausalLM(MistralConfig(**_SIZES, sliding_window=3, initializer_range=0.2))
    attend_within_documents(windowed)
    assert not attends_within_documents(windowed)
    sequences = [random_sequence(4, seed=0), random_sequence(9, seed=1), random_sequence(6, seed=2, prompt=3)]
    together = target_logprobs(windowed, lay_out(sequences)).logprobs_N
    alone = torch.cat([target_logprobs(windowed, lay_out([one])).logprobs_N for one in sequences])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    shared = replace(sequences[2], shared=3)
    prefix = TokenSequence(sequences[2].ids[:5], np.zeros(5, dtype=np.int64))
    after_prefix = target_logprobs(windowed, lay_out([prefix, shared])).logprobs_N
    torch.testing.assert_close(after_prefix, alone[-3:], rtol=1e-4, atol=1e-5)
