"""Adapters: what is trained, what the reference is, and that the merged model is the one that was trained."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.config.errors import ConfigError
from stages.config.execution import Engine, ExecutionConfig
from stages.config.graph import Stage
from stages.config.request import ArtifactRef
from stages.config.train import LoRAConfig, PostTrainConfig
from stages.data.tokens.views import TokensArtifact
from stages.models.build import load_causal_lm, load_reward_model, save_model
from stages.models.lora import add_adapter, start_of
from stages.train.engines.choose import make_engine
from tests.numerics.training import Case, Killed, prepare, run_on_processes, run_training
from tests.small_world import CONFIGS, make_context

Inputs = dict[Stage, dict[str, ArtifactRef]]

LORA = LoRAConfig(rank=2, alpha=8.0, dropout=0.1)
ON_EXPERTS = LoRAConfig(rank=2, alpha=8.0, target_parameters=("all-experts",))
WITH_ROUTER = LoRAConfig(
    rank=2, alpha=8.0, target_modules=("q_proj",), target_parameters=("all-experts", "gate.weight")
)
STAGES = (Stage.SFT, Stage.REWARD, Stage.DPO, Stage.PPO)
IDS = torch.tensor([[0, 4, 70, 71, 72, 1, 5]])


def adapted(stage: Stage, lora: LoRAConfig = LORA) -> PostTrainConfig:
    config = CONFIGS[stage].model_copy(update={"lora": lora})
    assert isinstance(config, PostTrainConfig)
    return config


@pytest.fixture(scope="module")
def artifact(world: Path, tokens: ArtifactRef) -> TokensArtifact:
    return TokensArtifact(make_context(world, Stage.SFT, CONFIGS[Stage.SFT], {"tokens": tokens}).input_dir("tokens"))


def folder_of(inputs: Inputs, role: str) -> Path:
    return Path(inputs[Stage.PPO][role].uri.removeprefix("file://"))


def stirred(model: Any) -> Any:
    """Adapters start as zero; give them something to say."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
            assert "lora_" in name or "score" in name
    return model.eval()


@pytest.mark.parametrize("stage", STAGES, ids=str)
def test_training_with_dropout_resumes_to_the_same_bits(stage: Stage, stage_inputs: Inputs, tmp_path: Path):
    config, inputs = adapted(stage), stage_inputs[stage]
    whole = run_training(tmp_path / "whole", stage, config, inputs)
    with pytest.raises(Killed):
        run_training(tmp_path / "killed", stage, config, inputs, checkpoint_every=3, kill_at=5)
    resumed = run_training(tmp_path / "killed", stage, config, inputs, checkpoint_every=3)
    for name, weight in whole.weights.items():
        assert torch.equal(weight, resumed.weights[name]), name
    start = prepare(tmp_path / "again", stage, config, inputs).parts
    before = next(iter(start.values())).state_dict()
    moved = {name for name, weight in whole.weights.items() if not torch.equal(weight, before[name])}
    assert moved
    assert all("lora_" in name or "score.modules_to_save" in name for name in moved)


def test_the_checkpoint_holds_the_adapter_alone(stage_inputs: Inputs, tmp_path: Path):
    prepared = prepare(tmp_path, Stage.REWARD, adapted(Stage.REWARD), stage_inputs[Stage.REWARD])
    engine = make_engine(prepared.parts, adapted(Stage.REWARD), ExecutionConfig())
    names = {key.partition("/")[2] for key in engine.state_dict() if "/" in key}
    assert names == {n for n in names if ".lora_" in n or "score.modules_to_save" in n}
    assert any("score" in name for name in names)
    # 7 linear modules in each of 2 layers, two matrices each, and the head
    assert len(names) == 2 * 7 * 2 + 1


@pytest.mark.parametrize("stage", [Stage.DPO, Stage.PPO], ids=str)
def test_the_reference_is_the_policy_without_its_adapter(stage: Stage, stage_inputs: Inputs, tmp_path: Path):
    """So the first step equals that of full training, which has a frozen copy, though no copy is made."""
    lora = LORA.model_copy(update={"dropout": 0.0})
    with_copy = run_training(tmp_path / "full", stage, CONFIGS[stage], stage_inputs[stage])
    without = run_training(tmp_path / "lora", stage, adapted(stage, lora), stage_inputs[stage])
    keys = {key for key in with_copy.history[0] if key.startswith((f"{stage.value}/", "train/loss"))}
    assert len(keys) >= 4
    for key in keys:
        assert without.history[0][key] == pytest.approx(with_copy.history[0][key], rel=1e-5, abs=1e-6), key
    drifts = [row["dpo/chosen_drift" if stage is Stage.DPO else "ppo/kl"] for row in without.history]
    assert abs(drifts[-1]) > 1e-4  # the policy moved away from it


def test_without_its_adapter_the_model_is_its_start_and_with_it_what_it_was(
    stage_inputs: Inputs, artifact: TokensArtifact
):
    plain = load_reward_model(folder_of(stage_inputs, "reward"), artifact).eval()
    model = stirred(add_adapter(load_reward_model(folder_of(stage_inputs, "reward"), artifact), LORA, seed=0))
    model.train()
    with start_of(model, None) as start:
        assert torch.equal(start(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    assert model.training
    assert all(p.requires_grad == ("lora_" in n or "modules_to_save" in n) for n, p in model.named_parameters())
    assert not torch.equal(model.eval()(input_ids=IDS).logits, plain(input_ids=IDS).logits)


def loaders_of(role: str) -> tuple[Any, Any]:
    """Our function that loads a model of this role, and the class of transformers that does."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if role == "model":
        return load_causal_lm, AutoModelForCausalLM
    return load_reward_model, AutoModelForSequenceClassification


@pytest.mark.parametrize("role", ["model", "reward"])
def test_the_merged_export_and_the_adapter_folder_equal_the_trained_model(
    role: str, stage_inputs: Inputs, artifact: TokensArtifact, tmp_path: Path
):
    from peft import PeftModel

    ours, plain = loaders_of(role)
    start = folder_of(stage_inputs, role)
    model = stirred(add_adapter(ours(start, artifact), LORA, seed=0))
    expected = model(input_ids=IDS).logits
    save_model(model, model.state_dict(), tmp_path / "out", artifact)
    merged = plain.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(merged(input_ids=IDS).logits, expected, rtol=0, atol=1e-5)
    assert type(merged) is type(plain.from_pretrained(start))
    beside = PeftModel.from_pretrained(plain.from_pretrained(start), tmp_path / "out" / "adapter").eval()
    torch.testing.assert_close(beside(input_ids=IDS).logits, expected, rtol=0, atol=1e-5)
    assert json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())["r"] == 2
    assert (expected - ours(start, artifact).eval()(input_ids=IDS).logits).abs().max() > 1e-3


def test_adapters_start_the_same_for_a_seed_and_as_nothing(stage_inputs: Inputs, artifact: TokensArtifact):
    folder = folder_of(stage_inputs, "model")
    torch.manual_seed(1)
    one = add_adapter(load_causal_lm(folder, artifact), LORA, seed=7).state_dict()
    torch.manual_seed(2)
    two = add_adapter(load_causal_lm(folder, artifact), LORA, seed=7)
    for name, weight in two.state_dict().items():
        assert torch.equal(weight, one[name]), name
    plain = load_causal_lm(folder, artifact).eval()
    assert torch.equal(two.eval()(input_ids=IDS).logits, plain(input_ids=IDS).logits)


def test_modules_that_do_not_exist_are_refused_with_those_that_do(stage_inputs: Inputs, artifact: TokensArtifact):
    model = load_causal_lm(folder_of(stage_inputs, "model"), artifact)
    with pytest.raises(ConfigError, match="target_modules") as refusal:
        add_adapter(model, LoRAConfig(rank=2, target_modules=("query",)), seed=0)
    assert "q_proj" in refusal.value.advice


@pytest.mark.parametrize("stage", STAGES, ids=str)
def test_training_with_adapters_on_experts_resumes_to_the_same_bits(
    stage: Stage, expert_inputs: Inputs, tmp_path: Path
):
    config, inputs = adapted(stage, ON_EXPERTS), expert_inputs[stage]
    whole = run_training(tmp_path / "whole", stage, config, inputs)
    with pytest.raises(Killed):
        run_training(tmp_path / "killed", stage, config, inputs, checkpoint_every=3, kill_at=5)
    resumed = run_training(tmp_path / "killed", stage, config, inputs, checkpoint_every=3)
    assert whole.history == resumed.history
    for name, weight in whole.weights.items():
        assert torch.equal(weight, resumed.weights[name]), name
    start = next(iter(prepare(tmp_path / "again", stage, config, inputs).parts.values())).state_dict()
    moved = {name for name, weight in whole.weights.items() if not torch.equal(weight, start[name])}
    assert all("lora_" in name or "score.modules_to_save" in name for name in moved)
    # in each of 2 layers: both matrices of 4 adapters of attention, of the adapters of 2 stacks; the router has none
    assert sum("lora_" in name for name in moved) == 2 * (4 + 2) * 2


@pytest.mark.parametrize("lora", [ON_EXPERTS, WITH_ROUTER], ids=["experts", "router too"])
@pytest.mark.parametrize("role", ["model", "reward"])
def test_merged_experts_and_their_adapter_folder_equal_the_trained_model(
    role: str, lora: LoRAConfig, expert_inputs: Inputs, artifact: TokensArtifact, tmp_path: Path
):
    from peft import PeftModel

    ours, plain = loaders_of(role)
    start = folder_of(expert_inputs, role)
    model = stirred(add_adapter(ours(start, artifact), lora, seed=0))
    expected = model(input_ids=IDS).logits
    with start_of(model, None) as without:
        assert torch.equal(without(input_ids=IDS).logits, ours(start, artifact).eval()(input_ids=IDS).logits)
    save_model(model, model.state_dict(), tmp_path / "out", artifact)
    merged = plain.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(merged(input_ids=IDS).logits, expected, rtol=0, atol=1e-5)
    beside = PeftModel.from_pretrained(plain.from_pretrained(start), tmp_path / "out" / "adapter").eval()
    torch.testing.assert_close(beside(input_ids=IDS).logits, expected, rtol=0, atol=1e-5)
    before, after = plain.from_pretrained(start).state_dict(), merged.state_dict()
    changed = {name.split(".", 3)[-1] for name in before if not torch.equal(before[name], after[name])}
    router = {"mlp.gate.weight"} if lora is WITH_ROUTER else set()
    assert {name for name in changed if "mlp" in name} == {
        "mlp.experts.gate_up_proj",
        "mlp.experts.down_proj",
    } | router


def test_linear_modules_alone_leave_experts_and_router_frozen(expert_inputs: Inputs, artifact: TokensArtifact):
    """peft would take `all-linear` for the names that experts had in transformers 4, and adapt both."""
    model = add_adapter(load_causal_lm(folder_of(expert_inputs, "model"), artifact), LORA, seed=0)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 4 * 2
    assert all("self_attn" in name for name in trained)


@pytest.mark.slow
def test_adapters_on_experts_learn_the_same_on_two_processes(expert_inputs: Inputs, tmp_path: Path):
    """In every engine that has them, each with activations that are recomputed."""
    config, inputs = adapted(Stage.DPO, ON_EXPERTS), expert_inputs[Stage.DPO]
    alone = run_training(tmp_path / "one", Stage.DPO, config, inputs)
    engines: dict[str, dict[str, Any]] = {
        "ddp": {"engine": "ddp"},
        "fsdp": {"engine": "fsdp"},
        "zero2": {"engine": "deepspeed", "zero_stage": 2},
    }
    options = {"num_workers": 2, "gradient_checkpointing": True}
    cases = {
        name: Case(tmp_path / name, Stage.DPO, config, inputs, engine | options) for name, engine in engines.items()
    }
    for name, together in run_on_processes(cases, num_processes=2).items():
        for key in ("train/loss", "train/router_loss"):
            expected = [row[key] for row in alone.history]
            assert [row[key] for row in together.history] == pytest.approx(expected, rel=0, abs=1e-5), (name, key)


def test_parameters_that_a_model_does_not_have_are_refused(stage_inputs: Inputs, artifact: TokensArtifact):
    model = load_causal_lm(folder_of(stage_inputs, "model"), artifact)
    with pytest.raises(ConfigError, match=r"target_parameters=\['all-experts'\].*none of the kind 'all-experts'"):
        add_adapter(model, ON_EXPERTS, seed=0)


def test_a_name_that_only_transformers_4_had_is_refused_with_those_there_are(
    expert_inputs: Inputs, artifact: TokensArtifact
):
    model = load_causal_lm(folder_of(expert_inputs, "model"), artifact)
    with pytest.raises(ConfigError, match="none of the kind 'w1'") as refusal:
        add_adapter(model, LoRAConfig(rank=2, target_modules=("q_proj", "w1")), seed=0)
    assert "self_attn.q_proj" in refusal.value.advice


def test_compilation_of_adapted_parameters_is_refused(expert_inputs: Inputs, tmp_path: Path):
    config = adapted(Stage.SFT, ON_EXPERTS)
    parts = prepare(tmp_path, Stage.SFT, config, expert_inputs[Stage.SFT]).parts
    with pytest.raises(ConfigError, match="compile=true does not go with"):
        make_engine(parts, config, ExecutionConfig(compile=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_four_bits_without_a_gpu_are_refused(stage_inputs: Inputs, artifact: TokensArtifact):
    with pytest.raises(ConfigError, match="needs a GPU"):
        load_causal_lm(folder_of(stage_inputs, "model"), artifact, lora=LoRAConfig(rank=2, quantization="nf4"))


def test_four_bits_without_bitsandbytes_are_refused(
    stage_inputs: Inputs, artifact: TokensArtifact, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    with pytest.raises(
        ConfigError, match=r"lora.quantization=nf4 needs bitsandbytes, which is not installed"
    ) as refusal:
        load_causal_lm(folder_of(stage_inputs, "model"), artifact, lora=LoRAConfig(rank=2, quantization="nf4"))
    assert "Install bitsandbytes" in refusal.value.advice


def test_four_bits_in_shards_are_refused(stage_inputs: Inputs, tmp_path: Path):
    config = adapted(Stage.SFT)
    parts = prepare(tmp_path, Stage.SFT, config, stage_inputs[Stage.SFT]).parts
    parts["policy"].__dict__["is_quantized"] = True  # as transformers marks such a model
    with pytest.raises(ConfigError, match=r"lora.quantization does not go with engine=fsdp, which cuts"):
        make_engine(parts, config, ExecutionConfig(engine=Engine.FSDP, num_workers=2))
