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
    min_workers: int = Field(default=0, ge=0)
    """Fewest workers to train with while the cluster has no room for `num_workers`; 0 = always exactly `num_workers`.
    When the number changes, all workers restart from the newest checkpoint; results stay the same up to rounding."""
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

    stall_seconds: float = Field(default=1800, ge=0)
    """Seconds without progress after which a job counts as stalled: it writes the stacks of all its threads into its
    log, ends, and the retry resumes from the newest checkpoint. Must exceed the longest silent part of the stage,
    such as an evaluation or the loading of a large model; 0 = never."""
    capacity_seconds: float = Field(default=3600, ge=0)
    """Seconds to wait for room on the cluster, saying what is asked for and what there is; then the attempt fails.
    0 = wait for as long as the task may run."""

    @property
    def least_workers(self) -> int:
        """Workers without which training does not start."""
        return self.min_workers or self.num_workers

    @model_validator(mode="after")
    def _elastic_within_bounds(self) -> "ExecutionConfig":
        if self.min_workers > self.num_workers:
            raise ValueError(
                f"min_workers={self.min_workers} is more than num_workers={self.num_workers}; "
                f"use at most {self.num_workers}, or raise num_workers"
            )
        if 0 < self.min_workers < self.num_workers and not self.checkpoint_every:
            raise ValueError(
                f"min_workers={self.min_workers} needs checkpoint_every >= 1, got 0: a change in the number of "
                "workers restarts them from the newest checkpoint; set checkpoint_every, or min_workers=0"
            )
        return self

    @model_validator(mode="after")
    def _sharding_needs_workers(self) -> "ExecutionConfig":
        if self.engine is Engine.FSDP and self.num_workers < 1:
            raise ValueError(
                f"engine=fsdp needs num_workers >= 1, got {self.num_workers}; set num_workers or engine=ddp"
            )
        return self
