"""The plan's arithmetic, redone by hand."""

from typing import Any

import pytest

from stages.config.estimate import (
    DataCounts,
    Devices,
    Measured,
    active_parameters,
    adapter_parameters,
    assumed_counts,
    count_parameters,
    estimate,
    forward_flops_per_token,
    memory_bytes,
    workload,
)
from stages.config.execution import Engine, ExecutionConfig
from stages.config.graph import Stage
from stages.config.pipeline import PipelineConfig
from stages.config.preference_losses import KTOLoss, SimPOLoss
from stages.config.recipes import tiny
from stages.config.resolve import resolve
from stages.config.text import compact
from stages.config.train import LoRAConfig, ModelConfig

SMALL = ModelConfig(hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2, num_kv_heads=1)
COUNTS = DataCounts(conversations=100, conversation_tokens=40, preferences=50, vocab_size=512, basis="counted")
ALL = frozenset(Stage)


def changed(stage: Stage, **settings: object) -> PipelineConfig:
    return resolve({"recipe": "tiny", "overrides": {f"execution.{stage}": settings}})


def test_parameters_of_the_tiny_model():
    # a layer: q and o 2*32*32, k and v 2*32*16 (one of two heads), SwiGLU 3*32*64, two norms 2*32 = 9280
    assert count_parameters(SMALL, 512) == 512 * 32 + 2 * 9280 + 32 == 34_976
    untied = SMALL.model_copy(update={"tie_embeddings": False})
    assert count_parameters(untied, 512) == 34_976 + 512 * 32


def test_parameters_agree_with_transformers_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=True,
        )
    )
    assert llama.num_parameters() == count_parameters(SMALL, 512)


def test_experts_all_count_as_weights_and_only_the_chosen_ones_as_work():
    # four experts instead of one, 3*32*64 each, and a router of 32*4 in each of two layers; two experts are active
    experts = SMALL.model_copy(update={"num_experts": 4, "num_experts_per_token": 2})
    assert count_parameters(experts, 512) == 34_976 + 2 * (3 * 6144 + 128) == 72_096
    assert active_parameters(experts, 512) == 34_976 + 2 * (6144 + 128) == 47_520
    assert forward_flops_per_token(experts, 512, 128) == 2 * 47_520 + 4 * 2 * 32 * 128


def test_parameters_agree_with_transformers_mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    mixtral = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=512,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=4,
            tie_word_embeddings=True,
        )
    )
    assert mixtral.num_parameters() == count_parameters(SMALL.model_copy(update={"num_experts": 4}), 512)


def test_an_adapter_needs_no_second_model_and_little_besides():
    # rank 2, a layer: q and o 2*(32+32), k and v 2*(32+16), gate, up and down 2*(32+64) = 1024
    config = resolve({"recipe": "tiny", "overrides": {"dpo.lora.rank": 2}})
    assert adapter_parameters(SMALL, config.dpo.lora) == 2 * 1024
    assert adapter_parameters(SMALL, LoRAConfig(rank=2, target_modules=("q_proj",))) == 2 * 2 * 64
    whole, adapted = (memory_bytes(Stage.DPO, c, vocab_size=512) for c in (tiny(), config))
    assert whole - adapted == 4 * (4 - 1) * 34_976 - 4 * 4 * 2048


def test_adapters_of_experts_count_once_an_expert():
    """Two layers of rank 2; 3 experts of 32 x 128 and 64 x 32, and a router of 32 x 3."""
    mixture = SMALL.model_copy(update={"num_experts": 3, "intermediate_size": 64, "hidden_size": 32, "num_layers": 2})

    def added(*targets: str) -> int:
        with_them = LoRAConfig(rank=2, target_parameters=targets)
        return adapter_parameters(mixture, with_them) - adapter_parameters(mixture, LoRAConfig(rank=2))

    assert added("all-experts") == 2 * 2 * 3 * ((32 + 128) + (64 + 32))
    assert added("experts.down_proj", "gate.weight") == 2 * 2 * (3 * (64 + 32) + (32 + 3))
    assert adapter_parameters(SMALL, LoRAConfig(rank=2, target_parameters=("all-experts",))) == adapter_parameters(
        SMALL, LoRAConfig(rank=2)
    )


def test_flops_are_two_a_weight_and_the_attention_whether_embeddings_are_tied_or_not():
    attention = 4 * 2 * 32 * 128
    assert forward_flops_per_token(SMALL, 512, 128) == 2 * 34_976 + attention == 102_720
    assert forward_flops_per_token(SMALL.model_copy(update={"tie_embeddings": False}), 512, 128) == 102_720


def test_pretraining_costs_six_flops_a_weight_and_token():
    took = estimate(Stage.PRETRAIN, tiny(), selected=ALL, counts=COUNTS, devices=Devices())
    assert took.tokens == 8192
    assert took.flops == 3 * 102_720 * 8192 == 2_524_446_720
    assert took.seconds == pytest.approx(2_524_446_720 / 60e9)
    assert took.basis == ("time at an assumed 0.06 TFLOP/s a CPU core",)


@pytest.mark.parametrize(
    ("stage", "trained", "forward"),
    [
        (Stage.SFT, 100 * 40 * 0.5, 0),
        (Stage.REWARD, 2 * 50 * 40 * 0.5, 0),
        (Stage.DPO, 2 * 50 * 40 * 0.5, 2 * 50 * 40 * 0.5),
        # 2 rollouts of 8 responses, 40 + 8 tokens each = 768; twice over, policy and critic; five forward passes
        (Stage.PPO, 768 * 2 * 2, 768 * 5),
        # six models read 4096 + (16 + 2*32) * 40 tokens and answer 8 prompts of 40 + 8 tokens, twice
        (Stage.EVALUATE, 0, 6 * (4096 + 16 * 128 + 144 * 40 + 2 * 8 * 48)),
    ],
)
def test_tokens_through_models(stage: Stage, trained: float, forward: float):
    load = workload(stage, tiny(), COUNTS, selected=ALL)
    assert load is not None
    assert (load.trained_tokens, load.forward_tokens) == (trained, forward)
    assert load.passes == 3 * trained + forward


def test_a_loss_without_a_reference_reads_nothing_twice_and_kto_mismatches_too():
    config = tiny()
    free = config.model_copy(update={"dpo": config.dpo.model_copy(update={"loss": SimPOLoss()})})
    with_reference, without = (workload(Stage.DPO, one, COUNTS, selected=ALL) for one in (config, free))
    assert with_reference is not None
    assert without is not None
    assert (without.trained_tokens, without.forward_tokens) == (with_reference.trained_tokens, 0)
    of_kto = config.model_copy(update={"dpo": config.dpo.model_copy(update={"loss": KTOLoss(), "num_epochs": 2.0})})
    load = workload(Stage.DPO, of_kto, COUNTS, selected=ALL)
    assert load is not None
    # Two epochs of 100 responses with 40 tokens: the reference reads them and their mismatches once, the policy the
    # mismatches in each epoch.
    assert (load.trained_tokens, load.forward_tokens) == (2 * 4000, 2 * 4000 + 2 * 4000)
    # The reference's log-probabilities are computed by the policy itself, so no loss holds a second model.
    kept, free_of_it = (memory_bytes(Stage.DPO, one, vocab_size=512) for one in (config, free))
    assert kept == free_of_it


def test_memory_of_pretraining():
    weights = 34_976 * 16  # weight, gradient, two moments in float32
    tokens = 4 * 128
    layer = tokens * (2 * 32 * 4 + (5 * 32 + 2 * 16 + 4 * 64) * 2)
    logits = 1024 * 512 * (2 + 4)
    assert memory_bytes(Stage.PRETRAIN, tiny(), vocab_size=512) == weights + 2 * layer + logits
    spared = changed(Stage.PRETRAIN, gradient_checkpointing=True, micro_batch_size=4)
    assert memory_bytes(Stage.PRETRAIN, spared, vocab_size=512) == weights + 2 * tokens * 32 * 4 + layer + logits
    sharded = changed(Stage.PRETRAIN, engine=Engine.FSDP.value, num_workers=4, micro_batch_size=4)
    assert memory_bytes(Stage.PRETRAIN, sharded, vocab_size=512) == weights / 4 + 2 * layer + logits


@pytest.mark.parametrize(
    ("execution", "numbers"),
    [
        ({"zero_stage": 1}, 1 + 1 + 3 / 4),
        ({"zero_stage": 2}, 1 + 1 / 4 + 3 / 4),
        ({"zero_stage": 3}, 5 / 4),
        ({"zero_stage": 3, "offload": True}, 2 / 4),
    ],
)
def test_memory_under_deepspeed(execution: dict[str, Any], numbers: float):
    """Weight, gradient, two moments and ZeRO's own copy of the weight, four bytes each, on four workers."""
    plain = memory_bytes(Stage.PRETRAIN, changed(Stage.PRETRAIN, micro_batch_size=4), vocab_size=512)
    config = changed(Stage.PRETRAIN, engine="deepspeed", num_workers=4, micro_batch_size=4, **execution)
    assert memory_bytes(Stage.PRETRAIN, config, vocab_size=512) - plain == pytest.approx(34_976 * 4 * (numbers - 4))


def test_memory_of_a_tensor_parallel_model():
    """The layers' weights are halved, the 512 x 32 embeddings are not."""
    overrides = {"pretrain.model.num_kv_heads": 2}
    plain = resolve({"recipe": "tiny", "overrides": overrides})
    cut = resolve(
        {
            "recipe": "tiny",
            "overrides": overrides | {"execution.pretrain": {"tensor_parallel": 2, "num_workers": 2}},
        }
    )
    before, after = (memory_bytes(Stage.PRETRAIN, config, vocab_size=512) for config in (plain, cut))
    layers = 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32
    assert before - after == layers / 2 * 16


def test_judges_are_held_next_to_what_they_judge():
    def held(**values: str) -> float:
        return memory_bytes(Stage.EVALUATE, resolve({"recipe": "tiny", **values}), vocab_size=512)

    one = held() / 2  # a language model and the reward model
    assert held(gold_scorer="train") == held(gold_model="/models/gold") == 3 * one
    assert held(gold_scorer="train", judge="/models/judge") == 4 * one


@pytest.mark.parametrize("overrides", [{}, {"ppo.lora.rank": 2}], ids=["whole", "adapter"])
def test_ppo_holds_the_gold_scorer_next_to_what_it_trains(overrides: dict[str, Any]):
    def held(**values: str) -> float:
        return memory_bytes(Stage.PPO, resolve({"recipe": "tiny", "overrides": overrides, **values}), vocab_size=512)

    weights = 4 * 34_976
    assert held(gold_scorer="train") - held() == held(gold_model="/models/gold") - held() == weights


def test_frozen_models_cost_their_weights_alone():
    dpo, sft = (memory_bytes(stage, tiny(), vocab_size=512) for stage in (Stage.DPO, Stage.SFT))
    assert dpo == sft  # the log-probabilities of its reference are computed before training, by the policy itself
    ppo = memory_bytes(Stage.PPO, tiny(), vocab_size=512)
    assert ppo - sft == (2 * 16 - 16 + 2 * 4) * 34_976


@pytest.mark.parametrize(
    ("settings", "trained", "frozen"),
    [
        ({}, 2, 2),  # policy and critic; reference and reward model
        ({"ppo.estimator.kind": "rloo"}, 1, 2),
        ({"ppo.estimator.critic": "fresh"}, 2, 2),
        ({"ppo.lora.rank": 2}, 2, 0),  # both are the trained ones without their adapters
        ({"ppo.lora.rank": 2, "ppo.estimator.kind": "grpo"}, 1, 1),
        ({"ppo.lora.rank": 2, "ppo.estimator.critic": "fresh"}, 2, 1),
    ],
)
def test_ppo_holds_the_models_that_its_settings_need(settings: dict[str, Any], trained: int, frozen: int):
    config = resolve({"recipe": "tiny", "overrides": settings})
    assert config.ppo.models == (trained, frozen)
    work, before = (workload(Stage.PPO, one, COUNTS, selected=ALL) for one in (config, tiny()))
    assert work is not None
    assert before is not None
    assert work.trained_tokens / before.trained_tokens == trained / 2
    assert work.forward_tokens / before.forward_tokens == (3 + trained) / 5
    if "ppo.lora.rank" not in settings:
        memory, whole = (memory_bytes(Stage.PPO, one, vocab_size=512) for one in (config, tiny()))
        assert whole - memory == (2 - trained) * 16 * 34_976
    elif frozen:
        alone = resolve({"recipe": "tiny", "overrides": {"ppo.lora.rank": 2}})
        memory, without = (memory_bytes(Stage.PPO, one, vocab_size=512) for one in (config, alone))
        more_adapters = (trained - 2) * (memory_bytes_of_adapter() + 4 * 34_976)
        assert memory - without == pytest.approx(4 * 34_976 * frozen + more_adapters)


def memory_bytes_of_adapter() -> int:
    """An adapter of rank 2 on the tiny model: weight, gradient and two moments."""
    config = resolve({"recipe": "tiny", "overrides": {"ppo.lora.rank": 2}})
    return 16 * adapter_parameters(config.pretrain.model, config.ppo.lora)


def test_an_earlier_build_gives_the_pace_and_the_devices_share_the_work():
    measured = Measured(
        fingerprint="e" * 64, wall_seconds=60, devices=1, on_gpu=False, peak_memory_bytes=1, work=34_976 * 3 * 4096.0
    )
    known = {"selected": ALL, "counts": COUNTS, "devices": Devices(), "measured": measured}
    took = estimate(Stage.PRETRAIN, tiny(), **known)
    assert took.seconds == pytest.approx(120)  # twice the tokens
    assert took.basis == ("time at the pace of build eeeeeeeeeeee",)
    wider = changed(Stage.PRETRAIN, cpus_per_worker=4)
    assert estimate(Stage.PRETRAIN, wider, **known).seconds == pytest.approx(30)
    on_gpu = changed(Stage.PRETRAIN, gpus_per_worker=1)
    assert "assumed 150 TFLOP/s a GPU" in estimate(Stage.PRETRAIN, on_gpu, **known).basis[0]


def test_a_cost_is_shown_only_with_a_price():
    config = changed(Stage.PRETRAIN, num_workers=4, gpus_per_worker=2)
    known = {"selected": ALL, "counts": COUNTS}
    assert estimate(Stage.PRETRAIN, config, devices=Devices(cpu_hour_price=1), **known).cost is None
    devices = Devices(gpu_hour_price=3, gpu_flops=1e6)
    took = estimate(Stage.PRETRAIN, config, devices=devices, **known)
    assert took.seconds is not None
    assert took.cost == pytest.approx(took.seconds / 3600 * 8 * 3)


def test_what_cannot_be_known_is_unknown_and_says_why():
    config = resolve({"recipe": "tiny", "base_model": "/models/x"})
    took = estimate(Stage.SFT, config, selected=ALL, counts=COUNTS, devices=Devices())
    assert (took.parameters, took.flops, took.memory_bytes, took.seconds) == (None, None, None, None)
    assert "size of base_model='/models/x' is unknown until a stage has loaded it" in took.basis
    took = estimate(Stage.CURATE, tiny(), selected=ALL, counts=COUNTS, devices=Devices())
    assert (took.seconds, took.basis) == (None, ("time unknown: no earlier build to measure by",))


def test_before_anything_is_counted_the_assumptions_are_named():
    counts = assumed_counts(tiny())
    assert (counts.conversations, counts.conversation_tokens) == (20_000, 128)
    assert counts.basis == "assumes curate's caps on pairs are reached, 128 tokens a conversation"
    assert isinstance(tiny().execution.sft, ExecutionConfig)


@pytest.mark.parametrize(("number", "text"), [(10_059_840, "10.1 M"), (999, "999"), (2.5e19, "25 E"), (0, "0")])
def test_numbers_are_short(number: float, text: str):
    assert compact(number) == text


def test_an_ensemble_is_trained_one_by_one_and_read_whole():
    """Four members take four times as long and no more memory; who reads them holds three more models."""
    one, four = (resolve({"recipe": "tiny", "overrides": {"reward.ensemble_size": size}}) for size in (1, 4))
    works = [workload(Stage.REWARD, config, COUNTS, selected=ALL) for config in (one, four)]
    assert works[0] is not None
    assert works[1] is not None
    assert works[1].trained_tokens == 4 * works[0].trained_tokens
    assert memory_bytes(Stage.REWARD, one, vocab_size=512) == memory_bytes(Stage.REWARD, four, vocab_size=512)
    weights = count_parameters(one.pretrain.model, 512)
    for stage in (Stage.PPO, Stage.EVALUATE):
        more = memory_bytes(stage, four, vocab_size=512) - memory_bytes(stage, one, vocab_size=512)
        assert more == 3 * 4 * weights
