"""A GGUF file, as llama.cpp reads it, becomes a Hugging Face folder: weights out of their blocks, tokenizer, template.

transformers does the conversion. What it passes over in silence is checked here, because a model that is nearly right
is worse than none: tensors that it does not use, frequencies of the positions, how text is cut before it is merged.
Quantised numbers do not become more exact by that: the folder holds what the file says, and a model that was quantised
to 4 bits trains from those values.
"""

import math
import tempfile
from pathlib import Path
from typing import Any, Literal

from stages.artifacts.manifests import hash_file
from stages.config.errors import ConfigError
from stages.models.folder import is_malformed, told
from stages.models.gguf_header import GgufHeader, read_header

_GIVE_FOLDER = "Give the model's Hugging Face folder or hub id instead."
_LOADED_AS = "model.gguf"
_DIGITS_APART = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva"})
"""Values of tokenizer.ggml.pre for which llama.cpp cuts text as GPT-2 does, with every digit by itself
(llama.cpp, src/llama-vocab.cpp). transformers 5 does not know them, and leaves numbers whole."""
_AS_GPT2 = frozenset({"gpt-2", "mpt", "olmo", "jais", "trillion", "phi-2", "default", ""})
"""Those for which it cuts as GPT-2 does, which is what transformers falls back to. `default`, or none, is an old file
that does not say; llama.cpp warns that its answers may be worse."""
_SCALED_DIFFERENTLY = (
    "attention.scale",
    "attention.clamp_kqv",
    "embedding_scale",
    "residual_scale",
    "logit_scale",
)
"""Settings that change what a Llama-style model computes, and that transformers does not read from a GGUF file."""
# Llama 3.1 and its successors (transformers, modeling_rope_utils: _compute_llama3_parameters).
_ORIGINAL = "original_max_position_embeddings"
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, _ORIGINAL: 8192}
_SAME_FREQUENCY = 1e-3


def convert_gguf(file: Path, folder: Path, *, dtype: Literal["bf16", "fp32"] = "bf16") -> dict[str, Any]:
    """Write the model of a GGUF file into `folder` as `save_pretrained` does, and return where it comes from.

    Raises ConfigError for a file that is damaged or that transformers would not read as llama.cpp does.
    """
    header = read_header(file)
    _check_readable(header, file)
    with tempfile.TemporaryDirectory(prefix="athanor-gguf-") as scratch:
        # Alone in a folder: transformers would also look at whatever lies next to the file.
        (Path(scratch) / _LOADED_AS).symlink_to(file.resolve())
        tokenizer = _tokenizer(scratch, header, file)
        model = _model(scratch, file, dtype)
    _check_weights(model, header, file)
    _set_positions(model.config, header, file)
    _forget_the_file(model)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {**facts_of(header), "sha256": hash_file(file), "dtype": dtype}


def outline_gguf(file: Path, folder: Path) -> None:
    """Write what `convert_gguf` writes, without the weights; raises ConfigError for what it refuses by the header."""
    from transformers import AutoConfig

    header = read_header(file)
    _check_readable(header, file)
    with tempfile.TemporaryDirectory(prefix="athanor-gguf-") as scratch:
        (Path(scratch) / _LOADED_AS).symlink_to(file.resolve())
        tokenizer = _tokenizer(scratch, header, file)
        try:
            config = AutoConfig.from_pretrained(scratch, gguf_file=_LOADED_AS, trust_remote_code=False)
        except BaseException as error:
            if not is_malformed(error):
                raise
            raise ConfigError(
                f"{file}: transformers makes no configuration of it: {_told(error, scratch, file)}", advice=_GIVE_FOLDER
            ) from error
    _set_positions(config, header, file)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def facts_of(header: GgufHeader) -> dict[str, Any]:
    """What a header says about the model's origin, for the ledger; None where it says nothing."""
    general = {
        name: header.settings.get(f"general.{name}")
        for name in ("name", "organization", "license", "basename", "size_label", "finetune", "quantized_by")
    }
    return {
        **general,
        "architecture": header.architecture,
        "parameters": header.num_parameters,
        "context_length": header.of_architecture("context_length"),
        "tensors": len(header.tensors),
        "tensor_types": header.types(),
        "pre_tokenizer": header.settings.get("tokenizer.ggml.pre"),
        "chat_template": "tokenizer.chat_template" in header.settings,
    }


def _check_readable(header: GgufHeader, file: Path) -> None:
    """Refuse what transformers would refuse later, or would read as something else."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    known = {name.replace("_", "-") for name in GGUF_SUPPORTED_ARCHITECTURES} - {"general", "tokenizer"}
    if header.architecture.replace("_", "-") not in known | {"qwen2moe", "qwen3moe", "qwen35", "qwen35moe"}:
        raise ConfigError(
            f"{file}: transformers cannot read architecture {header.architecture!r} from a GGUF file; it can read "
            f"{', '.join(sorted(known))}",
            advice=_GIVE_FOLDER,
        )
    if header.of_architecture("expert_count") and header.architecture == "llama":
        raise ConfigError(
            f"{file}: transformers reads no experts of architecture 'llama' from a GGUF file (Mixtral)",
            advice=_GIVE_FOLDER,
        )
    if odd := [name for name in _SCALED_DIFFERENTLY if header.of_architecture(name) not in (None, 0, 0.0, 1, 1.0)]:
        raise ConfigError(
            f"{file} sets {', '.join(f'{header.architecture}.{name}' for name in odd)}, which transformers does not "
            "read from a GGUF file; the model would compute something else",
            advice=_GIVE_FOLDER,
        )
    scaling = header.of_architecture("rope.scaling.type")
    if scaling not in (None, "none") and header.architecture != "gpt-oss":
        raise ConfigError(
            f"{file} scales its positions ({header.architecture}.rope.scaling.type={scaling!r}), which transformers "
            "does not read from a GGUF file",
            advice=_GIVE_FOLDER,
        )
    if long := [tensor.name for tensor in header.tensors if tensor.name.startswith("rope_factors_")]:
        raise ConfigError(
            f"{file} scales its positions by {', '.join(long)}, which transformers does not read from a GGUF file",
            advice=_GIVE_FOLDER,
        )


def _tokenizer(scratch: str, header: GgufHeader, file: Path) -> Any:
    from transformers import AutoTokenizer
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    found = header.settings.get("tokenizer.ggml.pre", "")
    cut_as_known = found in GGUF_PRE_TOKENIZER_SPLITS or found in _AS_GPT2 | _DIGITS_APART
    if header.settings["tokenizer.ggml.model"] == "gpt2" and not cut_as_known:
        raise ConfigError(
            f"{file}: its text is cut into words as {found!r} (tokenizer.ggml.pre), which transformers does not know; "
            "other tokens would come out",
            advice=_GIVE_FOLDER,
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=_LOADED_AS, trust_remote_code=False)
    except BaseException as error:
        if not is_malformed(error):
            raise
        raise ConfigError(
            f"{file}: transformers makes no tokenizer of it: {_told(error, scratch, file)}", advice=_GIVE_FOLDER
        ) from error
    if header.settings["tokenizer.ggml.model"] == "gpt2" and found in _DIGITS_APART:
        _split_digits(tokenizer)
    template = header.settings.get("tokenizer.chat_template")
    if template is not None and tokenizer.chat_template != template:
        raise ConfigError(f"{file}: the tokenizer came out with another chat template than the file's", advice="")
    return tokenizer


def _split_digits(tokenizer: Any) -> None:
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def _model(scratch: str, file: Path, dtype: Literal["bf16", "fp32"]) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    try:
        # Each tensor is rounded as soon as it is unpacked, so a bf16 model needs half of the memory of a float32 one.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            scratch,
            gguf_file=_LOADED_AS,
            dtype=torch.bfloat16 if dtype == "bf16" else torch.float32,
            output_loading_info=True,
            trust_remote_code=False,
        )
    except BaseException as error:
        if not is_malformed(error):
            raise
        raise ConfigError(
            f"{file}: transformers makes no model of it: {_told(error, scratch, file)}", advice=_GIVE_FOLDER
        ) from error
    model, loading = loaded
    # transformers would fill missing weights with random numbers.
    if missing := sorted(loading["missing_keys"]):
        raise ConfigError(f"{file} lacks weights: {', '.join(missing[:5])}", advice=_GIVE_FOLDER)
    if wrong := sorted(str(entry) for entry in loading["mismatched_keys"]):
        raise ConfigError(f"{file} has weights of another shape: {', '.join(wrong[:5])}", advice=_GIVE_FOLDER)
    return model


def _check_weights(model: Any, header: GgufHeader, file: Path) -> None:
    """Every number of the file is in the model: transformers passes over tensors whose names it does not know."""
    read = sum(parameter.numel() for parameter in model.parameters())  # tied ones count once, as in the file
    if read != header.num_parameters:
        raise ConfigError(
            f"{file} holds {header.num_parameters} numbers, and {type(model).__name__} has {read} parameters: "
            "transformers does not read this variant of the architecture",
            advice=_GIVE_FOLDER,
        )


def _set_positions(config: Any, header: GgufHeader, file: Path) -> None:
    """Take over rope_freqs, by which llama.cpp divides the frequencies of Llama 3.1 and later."""
    if not any(tensor.name == "rope_freqs.weight" for tensor in header.tensors):
        return
    from gguf import GGUFReader

    tensor = next(tensor for tensor in GGUFReader(file).tensors if tensor.name == "rope_freqs.weight")
    divisors = [float(value) for value in tensor.data.reshape(-1)]
    theta, factor = float(config.rope_parameters["rope_theta"]), max(divisors)
    expected = _llama3_divisors(theta, len(divisors), factor=factor)
    if any(abs(found - wanted) > _SAME_FREQUENCY * wanted for found, wanted in zip(divisors, expected, strict=True)):
        raise ConfigError(
            f"{file} scales its positions by rope_freqs in a way that is not Llama 3's", advice=_GIVE_FOLDER
        )
    if factor > 1:
        config.rope_parameters = {"rope_type": "llama3", "rope_theta": theta, "factor": factor, **_LLAMA3}


def _llama3_divisors(theta: float, count: int, *, factor: float) -> list[float]:
    """By what Llama 3.1 divides each frequency: 1 for short waves, `factor` for long ones, smoothly between."""
    low, high, original = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"], _LLAMA3[_ORIGINAL]
    divisors = []
    for index in range(count):
        wavelength = 2 * math.pi * theta ** (index / count)
        share = (original / wavelength - low) / (high - low)
        smooth = min(1.0, max(0.0, share))
        divisors.append(1 / ((1 - smooth) / factor + smooth))
    return divisors


def _forget_the_file(model: Any) -> None:
    """Take the marks of quantisation off, with which transformers neither trains nor saves a model."""
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.name_or_path = ""
    model.config.architectures = [type(model).__name__]


def _told(error: BaseException, scratch: str, file: Path) -> str:
    return told(error).replace(f"{scratch}/{_LOADED_AS}", str(file)).replace(scratch, str(file.parent))
