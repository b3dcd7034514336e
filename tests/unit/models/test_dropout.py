"""Where models of transformers keep their dropout, and that of adapters, which is none when training starts."""

from typing import Any

import pytest
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from stages.config.train import LoRAConfig
from stages.models.dropout import largest_dropout
from stages.models.lora import add_adapter

SMALL: dict[str, Any] = {"vocab_size": 32}
LLAMA: dict[str, Any] = {**SMALL, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
LLAMA |= {"num_attention_heads": 2}


@pytest.mark.parametrize(
    ("config", "rate"),
    [
        (GPT2Config(**SMALL, n_embd=16, n_layer=1, n_head=2), 0.1),
        (GPT2Config(**SMALL, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0, attn_pdrop=0, embd_pdrop=0), 0.0),
        (LlamaConfig(**LLAMA), 0.0),
        (LlamaConfig(**LLAMA, attention_dropout=0.25), 0.25),
    ],
)
def test_the_dropout_of_a_model_is_found_wherever_it_keeps_it(config: object, rate: float):
    model = AutoModelForCausalLM.from_config(config)
    assert largest_dropout([model]) == rate
    if isinstance(config, LlamaConfig):
        adapted = add_adapter(model, LoRAConfig(rank=2, dropout=0.5), seed=0)
        assert largest_dropout([adapted]) == rate
