"""Settings that would have no reader, or two that say the same, are refused with the field, the value and a way out."""

from typing import Any

import pytest
from pydantic import ValidationError

from stages.config.execution import ExecutionConfig
from stages.config.train import LoRAConfig, OptimizerConfig, PretrainConfig, Schedule, SFTConfig


@pytest.mark.parametrize("engine", [{}, {"engine": "fsdp", "num_workers": 2}], ids=["ddp", "fsdp"])
@pytest.mark.parametrize("stage", [1, 3])
def test_a_zero_stage_that_no_engine_reads_is_refused(engine: dict[str, Any], stage: int):
    name = engine.get("engine", "ddp")
    with pytest.raises(ValidationError, match=rf"zero_stage={stage} needs engine=deepspeed, got {name}.*leave .* at 2"):
        ExecutionConfig.model_validate({"zero_stage": stage, **engine})


def test_the_default_zero_stage_goes_with_every_engine_and_survives_json():
    for engine in ("ddp", "fsdp", "deepspeed"):
        config = ExecutionConfig.model_validate({"engine": engine, "num_workers": 2})
        assert ExecutionConfig.model_validate_json(config.model_dump_json()) == config
    assert ExecutionConfig.model_validate({"engine": "deepspeed", "num_workers": 2, "zero_stage": 3}).zero_stage == 3


def test_adapters_on_parameters_go_with_a_rank_and_without_dropout():
    with pytest.raises(ValidationError, match=r"target_parameters=\['all-experts'\] does not go with dropout=0.1"):
        LoRAConfig(rank=2, dropout=0.1, target_parameters=("all-experts",))
    with pytest.raises(ValidationError, match=r"target_parameters=\['all-experts'\] needs an adapter, got rank=0"):
        LoRAConfig(target_parameters=("all-experts",))


def test_a_length_is_given_once_and_where_it_has_a_reader():
    with pytest.raises(ValidationError, match=r"warmup_steps=10 and warmup_tokens=1000 say the same twice"):
        OptimizerConfig(learning_rate=1.0, warmup_steps=10, warmup_tokens=1000)
    with pytest.raises(ValidationError, match=r"decay_steps=0 and decay_tokens=5 belong to schedule=wsd, got cosine"):
        OptimizerConfig(learning_rate=1.0, decay_tokens=5)
    in_tokens = OptimizerConfig(learning_rate=1.0, schedule=Schedule.WSD, warmup_tokens=1000, decay_tokens=500)
    assert PretrainConfig(optimizer=in_tokens, global_batch_size=1, max_tokens=10_000).optimizer == in_tokens
    with pytest.raises(ValidationError, match=r"optimizer.warmup_tokens=1000 is for pretrain.*warmup_steps"):
        SFTConfig(optimizer=in_tokens, global_batch_size=1)
