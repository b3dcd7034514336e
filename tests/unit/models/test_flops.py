"""Model FLOPs by hand: 6 for each weight a token meets, 12 a layer and unit of width for each pair of positions."""

from typing import Any

import numpy as np
from transformers import LlamaConfig, LlamaForCausalLM

from stages.data.tokens.packing import TokenSequence, lay_out
from stages.models.flops import FlopCounter

CONFIG = LlamaConfig(
    vocab_size=50,
    hidden_size=8,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    tie_word_embeddings=True,
)
TRUNK = 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16)
"""Two layers of query, key and value of one head of 4, output, and three matrices of the feed-forward layer."""


def sequence(length: int, targets: int, *, shared: int = 0) -> TokenSequence:
    return TokenSequence(np.arange(length), (np.arange(length) >= length - targets).astype(np.int64), shared=shared)


def test_the_formula_by_hand() -> None:
    counter = FlopCounter.of(LlamaForCausalLM(CONFIG))
    assert counter == FlopCounter(trunk_weights=TRUNK, head_weights=50 * 8, attention_width=2 * 8)
    batch = lay_out([sequence(3, 2), sequence(2, 1)])
    compared = (1 + 2 + 3) + (1 + 2)
    assert counter.training(batch) == 6 * (TRUNK * 5 + 400 * 3) + 12 * 16 * compared


def test_a_shared_prompt_is_work_once_but_is_looked_at_by_both() -> None:
    counter = FlopCounter(trunk_weights=0, head_weights=0, attention_width=1)
    batch = lay_out([sequence(4, 1), sequence(5, 2, shared=3)])
    compared = (1 + 2 + 3 + 4) + (4 + 5)
    assert counter.training(batch) == 12 * compared


def test_experts_count_as_many_as_a_token_meets() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes: dict[str, Any] = {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 1,
        "vocab_size": 50,
    }
    model = MixtralForCausalLM(
        MixtralConfig(hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, **sizes)
    )
    attention, experts, router = 8 * 8 + 2 * 8 * 4 + 8 * 8, 2 * 3 * 8 * 16, 4 * 8
    assert FlopCounter.of(model).trunk_weights == 2 * (attention + experts + router)
