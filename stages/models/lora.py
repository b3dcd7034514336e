"""Low-rank adapters (peft) inside a transformers model, which stays the model that it was: same class, same methods.

Only adapters, and a reward model's head, are trained. The model without its adapter is the model that training started
from, so DPO and PPO need no second copy of it. peft costs seconds to import, so that happens where an adapter is made.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from stages.config.errors import ConfigError
from stages.config.train import LoRAConfig

_NAME = "default"
_HEAD = "score"


def add_adapter(model: PreTrainedModel, config: LoRAConfig, *, seed: int) -> PreTrainedModel:
    """Freeze the model and put adapters beside its linear modules, in place; rank 0 leaves everything as it is.

    The adapter starts as zero and its random half depends on `seed` alone. A reward model's head is trained whole.
    """
    if not config.rank:
        return model
    from peft import LoraConfig, TaskType, inject_adapter_in_model

    targets = list(config.target_modules)
    has_head = hasattr(model, _HEAD)
    settings = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        modules_to_save=[_HEAD] if has_head else None,
        task_type=TaskType.SEQ_CLS if has_head else TaskType.CAUSAL_LM,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(settings, model, adapter_name=_NAME)
        except ValueError as error:
            raise ConfigError(
                f"lora.target_modules={targets} does not fit {type(model).__name__}: {error}",
                advice=f"Use all-linear, or ends of: {', '.join(_linear_names(model))}.",
            ) from error
    return model


def _linear_names(model: nn.Module) -> list[str]:
    return sorted({name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, nn.Linear)})


def has_adapter(model: nn.Module) -> bool:
    return hasattr(model, "peft_config")


@contextlib.contextmanager
def start_of(trained: nn.Module, copy: nn.Module | None) -> Iterator[nn.Module]:
    """Give the frozen start of a trained model: its copy, or, where there is none, the model without its adapter."""
    if copy is not None:
        yield copy
        return
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    parts = [part for part in trained.modules() if isinstance(part, (BaseTunerLayer, ModulesToSaveWrapper))]
    was_training = trained.training
    trained.eval()
    # Not `enable_adapters`: it also takes the gradient flags away and gives them back, under the eyes of DDP and FSDP.
    for part in parts:
        part._disable_adapters = True
    try:
        yield trained
    finally:
        for part in parts:
            part._disable_adapters = False
        trained.train(was_training)


def merged_weights(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of the plain model: each adapter added to its matrix, by the names that the model had
    before."""
    if not has_adapter(model):
        return weights
    from peft.tuners.lora import LoraLayer

    plain = {
        name.replace(f".modules_to_save.{_NAME}.", ".").replace(".base_layer.", "."): weight
        for name, weight in (weights | _dequantized(model)).items()
        if not any(part in name for part in (".lora_", ".original_module.", ".weight."))
    }
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            down, up = (weights[f"{name}.lora_{part}.{_NAME}.weight"] for part in ("A", "B"))
            delta = layer.scaling[_NAME] * (up.float() @ down.float())
            plain[f"{name}.weight"] = plain[f"{name}.weight"] + (delta.T if layer.fan_in_fan_out else delta)  # type: ignore[attr-defined]
    return plain


def _dequantized(model: nn.Module) -> dict[str, Tensor]:
    """The matrices that are kept in 4 bits, in float32; their scales lie beside them as `...weight.<what>`."""
    from peft.utils.integrations import dequantize_module_weight

    return {
        f"{name}.weight": dequantize_module_weight(part).detach().float().cpu()
        for name, part in model.named_modules()
        if type(getattr(part, "weight", None)).__name__ == "Params4bit"
    }


def save_adapter(model: nn.Module, weights: dict[str, Tensor], folder: Path) -> None:
    """Write the adapter alone, as peft does, so that `PeftModel.from_pretrained` puts it on the start model."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    adapter = {
        "base_model.model." + name.replace(f".modules_to_save.{_NAME}.", ".").replace(f".{_NAME}.", "."): weight
        for name, weight in weights.items()
        if ".lora_" in name or ".modules_to_save." in name
    }
    save_file(adapter, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    model.peft_config[_NAME].save_pretrained(folder)  # type: ignore[index, union-attr]


def quantized_loading(config: LoRAConfig) -> dict[str, Any]:
    """Return what `from_pretrained` needs to keep weights in 4 bits; raises ConfigError where nothing can."""
    if config.quantization == "none":
        return {}
    if not torch.cuda.is_available():
        raise ConfigError(
            f"lora.quantization={config.quantization} needs a GPU, and this worker has none",
            advice="Give the stage GPUs (execution.<stage>.gpus_per_worker), or use lora.quantization=none.",
        )
    try:
        import bitsandbytes  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            f"lora.quantization={config.quantization} needs bitsandbytes, which is not installed: {error}",
            advice="Install bitsandbytes into the workers' image, or use lora.quantization=none.",
        ) from error
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": settings, "device_map": {"": torch.cuda.current_device()}}
