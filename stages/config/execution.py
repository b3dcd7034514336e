"""How a stage runs: workers, engine, batching in memory. None of it decides what comes out, so none of it is in a
fingerprint."""

from enum import StrEnum
from typing import Literal

from pydantic import Field, model_validator

from stages.config.base import Config

LOCAL_CPUS = "ATHANOR_LOCAL_CPUS"
"""Variable of Airflow's environment, where Ray is one machine: its cores, of which heavy jobs take turns."""


class Engine(StrEnum):
    """How parameters and gradients are spread over workers."""

    DDP = "ddp"
    FSDP = "fsdp"
    DEEPSPEED = "deepspeed"


class ExecutionConfig(Config):
    """Resources and layout of one stage."""

    num_workers: int = Field(default=0, ge=0)
    """Ray Train workers; 0 works inside the job's own process (no extra process, the fastest for one machine), or in
    one worker where GPUs are asked for, because only workers reserve them. `curate` instead starts a process for every
    core of its workers, all on one machine; 0 counts as one worker."""
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
    """`ddp` replicates the model, `fsdp` shards it (PyTorch FSDP2), `deepspeed` shards as much as `zero_stage` says
    (needs the extra `deepspeed` on the workers)."""
    zero_stage: Literal[1, 2, 3] = 2
    """With `deepspeed`: what ZeRO shards over the workers, 1 = optimizer state, 2 = gradients as well, 3 = parameters
    as well. Other engines have no stages: there it stays 2."""
    offload: bool = False
    """With `deepspeed`: keep master weights and optimizer state in main memory and update them on the CPU."""
    tensor_parallel: int = Field(default=1, ge=1)
    """Workers that share every layer: each holds some heads and some feed-forward columns. Must divide the model's
    query heads, key and value heads and feed-forward width; fast only between GPUs of one machine."""
    pipeline_parallel: int = Field(default=1, ge=1)
    """Workers that share the depth: each holds some layers, and the micro-batches of a step flow through them; wants
    at least four times as many micro-batches a step. Only in `pretrain` and `sft`."""
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
    def train_workers(self) -> int:
        """Ray Train workers that are started; 0 for the job's own process."""
        return self.num_workers or int(self.gpus_per_worker > 0)

    @property
    def least_workers(self) -> int:
        """Workers without which training does not start."""
        return self.min_workers or self.train_workers

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
        if self.engine is not Engine.DDP and self.num_workers < 1:
            raise ValueError(
                f"engine={self.engine} needs num_workers >= 1, got {self.num_workers}; set num_workers or engine=ddp"
            )
        return self

    @property
    def workers_per_copy(self) -> int:
        """Workers that train on the same items because they share one model."""
        return self.tensor_parallel * self.pipeline_parallel

    @model_validator(mode="after")
    def _model_parallelism_fits(self) -> "ExecutionConfig":
        shape = f"tensor_parallel={self.tensor_parallel} x pipeline_parallel={self.pipeline_parallel}"
        if self.workers_per_copy == 1:
            return self
        if self.engine is Engine.DEEPSPEED:
            raise ValueError(f"{shape} does not go with engine=deepspeed; use engine=fsdp, or both 1")
        if self.num_workers < 1 or self.num_workers % self.workers_per_copy:
            more = (self.num_workers // self.workers_per_copy + 1) * self.workers_per_copy
            raise ValueError(
                f"num_workers={self.num_workers} is not a multiple of {shape}; use {more}, or other parallel sizes"
            )
        if 0 < self.min_workers < self.num_workers:
            raise ValueError(
                f"min_workers={self.min_workers} does not go with {shape}: any number of workers between the two must "
                "do; set min_workers=0"
            )
        return self

    @model_validator(mode="after")
    def _zero_stage_needs_deepspeed(self) -> "ExecutionConfig":
        unused = ExecutionConfig.model_fields["zero_stage"].default
        if self.zero_stage != unused and self.engine is not Engine.DEEPSPEED:
            raise ValueError(
                f"zero_stage={self.zero_stage} needs engine=deepspeed, got {self.engine}, which would not read it; set "
                f"engine=deepspeed, or leave zero_stage at {unused} (fsdp shards as zero_stage=3 does)"
            )
        return self

    @model_validator(mode="after")
    def _offload_needs_deepspeed(self) -> "ExecutionConfig":
        if self.offload and self.engine is not Engine.DEEPSPEED:
            raise ValueError(f"offload=true needs engine=deepspeed, got {self.engine}; set engine, or offload=false")
        return self
