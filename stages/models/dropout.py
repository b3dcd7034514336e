"""Whether a model drops anything at random while it is trained, which decides what can be known of its first step."""

from collections.abc import Iterable

from torch import nn

_ADAPTERS = "lora_dropout"
"""peft's name of the dropout in front of an adapter, which is zero when training starts."""


def largest_dropout(models: Iterable[nn.Module]) -> float:
    """The largest probability in any of them, adapters apart.

    Models of transformers drop by a module of torch, or by a number of their own that they pass to a function, such as
    the `attention_dropout` of Llama.
    """
    return max((rate for model in models for rate in _rates(model)), default=0.0)


def _rates(model: nn.Module) -> Iterable[float]:
    for name, module in model.named_modules():
        if _ADAPTERS in name.split("."):
            continue
        if isinstance(module, nn.modules.dropout._DropoutNd):
            yield float(module.p)
        for key, value in vars(module).items():
            if "dropout" in key and isinstance(value, float):
                yield value
