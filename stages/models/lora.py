"""Low-rank adapters (peft) inside a transformers model, which stays the model that it was: same class, same methods.

Only adapters, and a reward model's head, are trained. The model without its adapter is the model that training started
from, so DPO and PPO need no second copy of it. peft costs seconds to import, so that happens where an adapter is made.

Shape legend: E experts, R rank, I and O inputs and outputs of a matrix.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from stages.config.errors import ConfigError
from stages.config.train import LoRAConfig

_NAME = "default"
_HEAD = "score"


def add_adapter(model: PreTrainedModel, config: LoRAConfig, *, seed: int) -> PreTrainedModel:
    """Freeze the model and add adapters to the weights that the config names, in place; rank 0 leaves everything as it
    is.

    The adapter starts as zero; its matrix A is random and depends on `seed` alone, its matrix B is zero. A reward
    model's head is trained in full. peft is given full names, because it takes short ones, `all-linear` among them, for
    the names that experts had before transformers stacked them.
    """
    if not config.rank:
        return model
    from peft import LoraConfig, TaskType, inject_adapter_in_model

    modules, parameters = (
        _chosen_modules(model, config.target_modules),
        _chosen_parameters(model, config.target_parameters),
    )
    has_head = hasattr(model, _HEAD)
    settings = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=modules,
        target_parameters=parameters,
        modules_to_save=[_HEAD] if has_head else None,
        task_type=TaskType.SEQ_CLS if has_head else TaskType.CAUSAL_LM,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(settings, model, adapter_name=_NAME)
    for parameter in model.parameters():
        if parameter.requires_grad:  # peft makes adapters of 4-bit matrices in bfloat16
            parameter.data = parameter.data.float()
    _check_adapted(model, {*modules, *parameters})
    return model


def _chosen_modules(model: PreTrainedModel, targets: Sequence[str]) -> list[str]:
    head = model.get_output_embeddings()
    names = [
        name
        for name, part in model.named_modules()
        if isinstance(part, (nn.Linear, Conv1D)) and part is not head and name != _HEAD
    ]
    return _with_ends(targets, names, field="target_modules", everything={"all-linear": names}, model=model)


def _chosen_parameters(model: PreTrainedModel, targets: Sequence[str]) -> list[str]:
    others = {
        f"{name}.{short}": weight
        for name, part in model.named_modules()
        if not isinstance(part, (nn.Linear, Conv1D, nn.Embedding))
        for short, weight in part.named_parameters(recurse=False)
        if weight.ndim in (2, 3)
    }
    stacks = [name for name, weight in others.items() if weight.ndim == 3]
    return _with_ends(targets, list(others), field="target_parameters", everything={"all-experts": stacks}, model=model)


def _with_ends(
    targets: Sequence[str], names: list[str], *, field: str, everything: Mapping[str, list[str]], model: nn.Module
) -> list[str]:
    chosen: set[str] = set()
    for target in targets:
        found = everything.get(target) or [name for name in names if f".{name}".endswith(f".{target}")]
        if not found:
            ends = sorted({re.split(r"\.\d+\.", name)[-1] for name in names})
            raise ConfigError(
                f"lora.{field}={list(targets)}: {type(model).__name__} has none of the kind {target!r}",
                advice=f"Use {', '.join(everything)}, or ends of: {', '.join(ends)}."
                if ends
                else f"Leave {field} empty.",
            )
        chosen |= set(found)
    return sorted(chosen)


def _check_adapted(model: nn.Module, chosen: set[str]) -> None:
    """Raise ConfigError when peft has put adapters elsewhere than asked for: it may confuse one name with another."""
    adapted = set(_adapted(model))
    if adapted != chosen:
        raise ConfigError(
            f"peft puts adapters of {type(model).__name__} on {sorted(adapted - chosen)} instead of "
            f"{sorted(chosen - adapted)}",
            advice="Name other modules in lora.target_modules, such as those of attention.",
        )


def _adapted(model: nn.Module) -> dict[str, tuple[str, Any]]:
    """Adapters with their names inside the model, by what they adapt: a module, or one of its parameters."""
    from peft.tuners.lora import LoraLayer, ParamWrapper

    return {
        _plain(f"{name}.{layer.parameter_name}" if isinstance(layer, ParamWrapper) else name): (name, layer)
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


def _plain(name: str) -> str:
    """Return the name that a parameter had before adapters wrapped its module, once or several times."""
    return ".".join(part for part in name.replace(f".modules_to_save.{_NAME}.", ".").split(".") if part != "base_layer")


def has_adapter(model: nn.Module) -> bool:
    return hasattr(model, "peft_config")


def adapts_parameters(model: nn.Module) -> bool:
    """True when there are adapters that are added to weights in each forward pass, such as those of experts."""
    return has_adapter(model) and bool(model.peft_config[_NAME].target_parameters)  # type: ignore[index, union-attr]


@contextlib.contextmanager
def start_of(trained: nn.Module, copy: nn.Module | None) -> Iterator[nn.Module]:
    """Yield the frozen start of a trained model: its copy or, without one, the model with its adapters switched off."""
    if copy is not None:
        yield copy
        return
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    parts = [part for part in trained.modules() if isinstance(part, (BaseTunerLayer, ModulesToSaveWrapper))]
    was_training = trained.training
    trained.eval()
    # Not by `enable_adapters`, which also switches gradient flags off and on: DDP and FSDP have recorded them.
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
    plain = {
        _plain(name): weight
        for name, weight in (weights | _dequantized(model)).items()
        if not any(part in name for part in (".lora_", ".original_module.", ".weight."))
    }
    for adapted, (name, layer) in _adapted(model).items():
        down, up = (weights[f"{name}.lora_{part}.{_NAME}.weight"].float() for part in ("A", "B"))
        target = adapted if adapted in plain else f"{adapted}.weight"
        plain[target] = plain[target] + layer.scaling[_NAME] * _delta(layer, down, up, ndim=plain[target].ndim)
    return plain


def _delta(layer: Any, down: Tensor, up: Tensor, *, ndim: int) -> Tensor:
    """Return what an adapter adds to its weight, before scaling. Those of a stack of experts are in one matrix: in
    `down` the rows of one expert follow those of another, in `up` the columns of all experts alternate."""
    if ndim == 2:
        return (up @ down).T if layer.fan_in_fan_out else up @ down
    down_ERI = down.unflatten(0, (layer.num_experts, -1))
    up_EOR = up.unflatten(1, (-1, layer.num_experts)).permute(2, 0, 1)
    delta_EOI = up_EOR @ down_ERI
    return delta_EOI.mT if getattr(layer.get_base_layer(), "is_transposed", False) else delta_EOI


def _dequantized(model: nn.Module) -> dict[str, Tensor]:
    """Return the matrices that are kept in 4 bits, in float32; their scales are stored as `...weight.<what>`."""
    from peft.utils.integrations import dequantize_module_weight

    return {
        f"{name}.weight": dequantize_module_weight(part).detach().float().cpu()
        for name, part in model.named_modules()
        if type(part._parameters.get("weight")).__name__
        == "Params4bit"  # its own: wrappers show those of what they wrap
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
