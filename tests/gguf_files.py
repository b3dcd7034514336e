"""Small GGUF files, written by llama.cpp's own library from models that transformers made."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import dequantize, quantize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' "
    "+ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""As SmolLM2 and other ChatML models have it, without a default system prompt."""
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.layers": "blk",
}


def small_tokenizer() -> Tokenizer:
    """Byte-level BPE that takes every digit apart, as SmolLM2's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([Path(__file__).read_text()], trainer)
    return tokenizer


def small_llama(*, tied: bool = True, **options: Any) -> LlamaForCausalLM:
    """Widths are multiples of 32, so that every matrix can be quantised in blocks."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        tie_word_embeddings=tied,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        **options,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.add_(0.1 * torch.randn(weight.shape))
    return model


def _permuted(weight: Tensor, heads: int) -> Tensor:
    """Rows of a rotary projection in llama.cpp's order (its convert_hf_to_gguf.py, LlamaModel.permute)."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    *,
    quantization: GGMLQuantizationType = GGMLQuantizationType.Q8_0,
    architecture: str = "llama",
    without: tuple[str, ...] = (),
    settings: Callable[[GGUFWriter], None] = lambda writer: None,
    more: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Write a model as llama.cpp's converter does, and round the model's own matrices to what the file holds.

    `without` names tensors and groups of settings (`tokenizer`, `eos`) to leave out, `more` tensors to add.
    """
    config: Any = model.config
    writer = GGUFWriter(path, architecture)
    writer.add_name("Small llama")
    writer.add_license("apache-2.0")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    if "tokenizer" not in without:
        _add_tokenizer(writer, with_end="eos" not in without)
    settings(writer)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for ours, theirs in _NAMES.items():
            name = name.replace(ours, theirs)
        if name in without:
            continue
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        part = name.split(".")[-2]
        values = (_permuted(weight, heads[part]) if part in heads else weight).numpy()
        if values.ndim == 1:
            writer.add_tensor(name, values)
            continue
        blocks = quantize(values, quantization)
        writer.add_tensor(name, blocks, raw_dtype=quantization)
        _round(weight, dequantize(blocks, quantization), heads.get(part))
    for name, values in (more or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _round(weight: Tensor, held: np.ndarray, heads: int | None) -> None:
    values = torch.from_numpy(held).reshape(weight.shape)
    if heads:  # back from llama.cpp's order
        pairs = values.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
        values = pairs.swapaxes(1, 2).reshape(weight.shape)
    weight.copy_(values)


def _add_tokenizer(writer: GGUFWriter, *, with_end: bool) -> None:
    made = json.loads(small_tokenizer().to_str())["model"]
    vocabulary = sorted(made["vocab"], key=made["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocabulary)
    writer.add_token_types([TokenType.CONTROL if token in SPECIAL else TokenType.NORMAL for token in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in made["merges"]])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    if with_end:
        writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
