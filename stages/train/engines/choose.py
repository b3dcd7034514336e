"""Which engine a run trains with."""

from torch import nn

from stages.config.execution import Engine as EngineKind
from stages.config.execution import ExecutionConfig
from stages.config.train import TrainConfig
from stages.train.engine import Engine


def make_engine(parts: dict[str, nn.Module], config: TrainConfig, execution: ExecutionConfig) -> Engine:
    """Wrap the trained models, by name, in the engine that the execution config asks for."""
    match execution.engine:
        case EngineKind.DEEPSPEED:
            from stages.train.engines.deepspeed_engine import DeepSpeedEngine

            return DeepSpeedEngine(parts, config, execution)
        case EngineKind.DDP | EngineKind.FSDP:
            from stages.train.engines.torch_engine import TorchEngine

            return TorchEngine(parts, config, execution)
