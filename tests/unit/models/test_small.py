"""The packing check on a small model says what it says on the whole one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    Llama4TextConfig,
    LlamaConfig,
    Mamba2Config,
    MistralConfig,
    MixtralConfig,
    Olmo3Config,
    PretrainedConfig,
    Qwen3Config,
)

from stages.config.errors import ConfigError
from stages.models.small import check_small_packing


def of(config: PretrainedConfig, folder: Path) -> Path:
    """A folder with a configuration of full size; nothing reads its weights."""
    config.save_pretrained(folder)
    save_file({"x": torch.ones(1)}, folder / "model.safetensors")
    return folder


LARGE: list[Callable[[], PretrainedConfig]] = [
    LlamaConfig, Qwen3Config, MistralConfig, MixtralConfig, Olmo3Config, Gemma3TextConfig, GPT2Config, FalconConfig
]  # fmt: skip


@pytest.mark.parametrize("config", LARGE)
def test_architectures_of_billions_of_parameters_are_tried_small(config: Any, tmp_path: Path) -> None:
    assert check_small_packing(of(config(), tmp_path)) == ""


CAPPED = [lambda: GraniteConfig(logits_scaling=8.0), CohereConfig, Gemma2Config]


@pytest.mark.parametrize("config", CAPPED)
def test_logits_that_are_scaled_or_capped_are_found_with_random_weights(config: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="its logits are scaled, capped or shifted"):
        check_small_packing(of(config(), tmp_path))


def test_layers_that_do_not_run_without_their_head_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="its layers cannot be run without its head"):
        check_small_packing(of(Llama4TextConfig(), tmp_path))


def test_what_cannot_be_made_small_is_said(tmp_path: Path) -> None:
    assert "RuntimeError" in check_small_packing(of(Mamba2Config(num_heads=128), tmp_path))
