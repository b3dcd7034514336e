"""How a stage runs: workers, engine, batching in memory. None of it decides what comes out, so none of it is in a
fingerprint."""

from enum import StrEnum

from pydantic import Field, model_validator

from stages.config.base import Config


class Engine(StrEnum):
    """How parameters and gradients are spread over workers."""

    DDP = "ddp"
    FSDP = "fsdp"


class ExecutionConfig(Config):
    """Resources and layout of one stage."""

    num_workers: int = Field(default=0, ge=0)
    """Ray Train workers; 0 trains inside the job's own process (no extra process, the fastest for one machine)."""
    cpus_per_worker: float = Field(default=1, gt=0)
    """CPU cores that each worker reserves; also the threads of its tensor library."""
    gpus_per_worker: float = Field(default=0, ge=0)
    """GPUs that each worker reserves."""
    entrypoint_cpus: float = Field(default=0, ge=0)
    """CPU cores that the job's own process reserves; 0 keeps it on the Ray head."""
    engine: Engine = Engine.DDP
    """`ddp` replicates the model, `fsdp` shards it (PyTorch FSDP2)."""
    micro_batch_size: int = Field(default=8, ge=1)
    """Packed sequences that pass through a model at once on one worker; bounds memory, never the result."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """torch.compile the model: faster steps after a compilation of a minute or so."""
    checkpoint_every: int = Field(default=0, ge=0)
    """Steps between resumable checkpoints; 0 = never."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Newest checkpoints that are kept while a stage runs; all go when its artifact is published."""
    log_every: int = Field(default=1, ge=1)
    """Steps between logged metrics."""
    max_retries: int = Field(default=2, ge=0)
    """Times that Airflow retries the stage after a failure that a retry can help."""

    @model_validator(mode="after")
    def _sharding_needs_workers(self) -> "ExecutionConfig":
        if self.engine is Engine.FSDP and self.num_workers < 1:
            raise ValueError(
                f"engine=fsdp needs num_workers >= 1, got {self.num_workers}; set num_workers or engine=ddp"
            )
        return self
