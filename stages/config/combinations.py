"""Settings of a training that do not go with how it runs, as far as the configuration alone tells.

`resolve` refuses them before anything is spent. The engines refuse them again, because a stage can be started by hand.
"""

from collections.abc import Iterator

from stages.config.execution import Engine, ExecutionConfig
from stages.config.train import Algorithm, LoRAConfig, PostTrainConfig, SFTConfig, TrainConfig

_NO_ADAPTER = LoRAConfig()


def contradictions(
    stage: str, train: TrainConfig, execution: ExecutionConfig, *, experts: int
) -> Iterator[tuple[str, str]]:
    """What is wrong and what to do, for each pair of settings that cannot be. `experts` are those of a model that the
    run makes."""
    where, lora = f"execution.{stage}", train.lora if isinstance(train, PostTrainConfig) else _NO_ADAPTER
    on_gpu, deepspeed = execution.gpus_per_worker > 0, execution.engine is Engine.DEEPSPEED
    if train.precision == "fp16" and not on_gpu:
        yield (
            f"{stage}.precision='fp16' needs {where}.gpus_per_worker, got 0: processors emulate float16",
            "Use precision=bf16 or fp32, or give the workers GPUs.",
        )
    if deepspeed:
        yield from _not_in_deepspeed(stage, train)
    if lora.quantization != "none" and not on_gpu:
        yield (
            f"{stage}.lora.quantization={lora.quantization} needs {where}.gpus_per_worker, got 0",
            f"Give the stage GPUs, or use {stage}.lora.quantization=none.",
        )
    if lora.quantization != "none" and (execution.engine is Engine.FSDP or (deepspeed and execution.zero_stage == 3)):
        yield (
            f"{stage}.lora.quantization={lora.quantization} does not go with {where}.engine={execution.engine}, which "
            "cuts weights into shards: packed ones would lose their scales",
            f"Use {where}.engine=ddp, or {stage}.lora.quantization=none.",
        )
    if execution.compile and lora.target_parameters:
        yield (
            f"{where}.compile=true does not go with {stage}.lora.target_parameters, whose adapters are put into the "
            "weights and taken out again in every forward pass",
            f"Use {where}.compile=false.",
        )
    if execution.workers_per_copy > 1:
        yield from _not_cut(stage, train, execution, lora, experts)


def _not_in_deepspeed(stage: str, train: TrainConfig) -> Iterator[tuple[str, str]]:
    optimizer, engine = train.optimizer, f"execution.{stage}.engine=deepspeed"
    if train.precision == "fp16":
        yield (
            f"{stage}.precision='fp16' does not go with {engine}: the loss is scaled by PyTorch's engines only",
            "Use engine=fsdp, or precision=bf16 or fp32.",
        )
    # ZeRO steps on flat partitions and decides about a step by itself.
    asked = {
        "algorithm=muon": optimizer.algorithm is Algorithm.MUON,
        f"ema_decay={optimizer.ema_decay}": optimizer.ema_decay > 0,
        f"spike_window={optimizer.spike_window}": optimizer.spike_window > 0,
    }
    for setting in (setting for setting, is_asked in asked.items() if is_asked):
        yield f"{stage}.optimizer.{setting} does not go with {engine}", "Use engine=fsdp."


def _not_cut(
    stage: str, train: TrainConfig, execution: ExecutionConfig, lora: LoRAConfig, experts: int
) -> Iterator[tuple[str, str]]:
    tensor, pipeline = (
        f"execution.{stage}.{name}={getattr(execution, name)}" for name in ("tensor_parallel", "pipeline_parallel")
    )
    if execution.tensor_parallel > 1 and train.optimizer.algorithm is Algorithm.MUON:
        yield (
            f"{stage}.optimizer.algorithm=muon needs whole matrices, which {tensor} cuts",
            "Use engine=fsdp, whose ranks gather them, or algorithm=adamw.",
        )
    if lora.rank:
        yield (
            f"{stage}.lora.rank={lora.rank} does not go with {tensor} and {pipeline}: an adapter is not cut",
            f"Use engine=fsdp with both 1, or {stage}.lora.rank=0.",
        )
    noise = train.neftune_alpha if isinstance(train, SFTConfig) else 0.0
    if execution.pipeline_parallel > 1 and (noise or experts):
        what = f"{stage}.neftune_alpha={noise}" if noise else f"pretrain.model.num_experts={experts}"
        yield (
            f"{what} does not go with {pipeline}, which runs the bare next-token loss: neither the noise nor the "
            "balancing of experts reaches through its stages",
            "Use engine=fsdp with pipeline_parallel=1.",
        )
