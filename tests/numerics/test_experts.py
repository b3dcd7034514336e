"""Mixtures of experts: packing, the balancing loss, export and resume."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from stages.config.execution import ExecutionConfig
from stages.config.graph import Stage
from stages.config.request import ArtifactRef
from stages.data.tokens.packing import TokenSequence, lay_out
from stages.data.tokens.views import TokensArtifact
from stages.losses.language import router_balance_loss
from stages.models.build import load_causal_lm, new_causal_lm, save_model
from stages.models.experts import Routing, routing_of
from stages.models.forward import run_trunk, target_logprobs
from stages.train.engine import Share
from stages.train.engines.choose import make_engine
from stages.train.routing import RouterBalance
from tests.numerics.training import Killed, prepare, run_training
from tests.small_world import CONFIGS, EXPERTS, make_context

Inputs = dict[Stage, dict[str, ArtifactRef]]

POST_TRAINING = (Stage.SFT, Stage.REWARD, Stage.DPO, Stage.PPO)
PRETRAIN = CONFIGS[Stage.PRETRAIN].model_copy(update={"model": EXPERTS})


@pytest.fixture(scope="module")
def artifact(world: Path, tokens: ArtifactRef) -> TokensArtifact:
    return TokensArtifact(make_context(world, Stage.PRETRAIN, PRETRAIN, {"tokens": tokens}).input_dir("tokens"))


@pytest.fixture(scope="module")
def model(artifact: TokensArtifact) -> Any:
    return new_causal_lm(EXPERTS, artifact, seed=3).eval()


def sequences(*lengths: int) -> list[TokenSequence]:
    rng = np.random.default_rng(1)
    return [TokenSequence(rng.integers(6, 200, size=n), np.ones(n, dtype=np.int64)) for n in lengths]


@pytest.mark.parametrize("own_attention", [False, True], ids=["packed", "padded rows"])
def test_packed_equals_unpacked_and_padding_is_routed_nowhere(
    own_attention: bool, model: Any, monkeypatch: pytest.MonkeyPatch
):
    if own_attention:  # what an architecture with windows gets
        monkeypatch.setattr("stages.models.forward.attends_within_documents", lambda _: False)

    documents = sequences(5, 17, 3, 30, 9)
    packed = lay_out(documents)
    alone = torch.cat([target_logprobs(model, lay_out([one])).logprobs_N for one in documents])
    torch.testing.assert_close(target_logprobs(model, packed).logprobs_N, alone, rtol=1e-4, atol=1e-5)
    balance = RouterBalance(Routing(num_chosen=2, coefficient=1.0))
    logits = run_trunk(model, packed, with_router_logits=True).router_logits_KLE
    assert logits is not None
    assert logits.shape == (5 + 17 + 3 + 30 + 9, 2, 4)
    assert balance.count(logits).sum(-1).tolist() == [2.0 * 64] * 2


def test_the_balancing_loss_is_that_of_transformers_where_both_know_the_same_load():
    """One layer, and the load of the very tokens: then only the mean over tokens is left to compare."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    balance = RouterBalance(Routing(num_chosen=2, coefficient=0.5))
    balance.observe(balance.count(logits[:, None]))
    expected = load_balancing_loss_func((logits,), num_experts=4, top_k=2)
    assert balance.loss_sum(logits[:, None]).item() / 50 == pytest.approx(0.5 * float(expected), rel=1e-5)


def test_an_even_load_costs_the_number_of_chosen_experts_and_pulls_nowhere():
    logits = torch.randn(6, 2, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = router_balance_loss(logits.softmax(-1), torch.full((2, 4), 0.5))
    assert loss.item() / 6 == pytest.approx(2.0)
    loss.backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.zeros_like(logits), rtol=0, atol=1e-6)


def test_a_busy_expert_loses_probability():
    """Expert 0 took 3 of 4 assignments: the gradient of its logit is positive, that of the idle one negative."""
    logits = torch.zeros(1, 1, 2, requires_grad=True)
    router_balance_loss(logits.softmax(-1), torch.tensor([[0.75, 0.25]])).backward()
    assert logits.grad is not None
    assert logits.grad.flatten().tolist() == pytest.approx([0.25, -0.25])


def test_load_is_counted_over_the_step_and_told_relative_to_an_even_share():
    balance = RouterBalance(Routing(num_chosen=1, coefficient=1.0))
    relative = balance.observe(torch.tensor([[6.0, 2.0], [4.0, 4.0]]))
    assert relative.tolist() == [[1.5, 0.5], [1.0, 1.0]]


def test_micro_batches_change_neither_loss_nor_load(stage_inputs: Inputs, tmp_path: Path):
    large = run_training(tmp_path / "l", Stage.PRETRAIN, PRETRAIN, stage_inputs[Stage.PRETRAIN], micro_batch_size=4)
    small = run_training(tmp_path / "s", Stage.PRETRAIN, PRETRAIN, stage_inputs[Stage.PRETRAIN], micro_batch_size=1)
    for key in ("train/loss", "train/router_loss", "train/expert_load_max", "train/grad_norm"):
        assert [row[key] for row in small.history] == pytest.approx([row[key] for row in large.history], rel=2e-5), key
    assert large.history[0]["train/router_loss"] == pytest.approx(0.05 * 2, rel=1e-5)
    assert large.history[-1]["train/expert_load_max"] > 1.0


@pytest.mark.parametrize("stage", list(CONFIGS), ids=str)
def test_a_killed_training_ends_with_the_same_bits(stage: Stage, expert_inputs: Inputs, tmp_path: Path):
    config, inputs = PRETRAIN if stage is Stage.PRETRAIN else CONFIGS[stage], expert_inputs[stage]
    whole = run_training(tmp_path / "whole", stage, config, inputs)
    with pytest.raises(Killed):
        run_training(tmp_path / "killed", stage, config, inputs, checkpoint_every=3, kill_at=5)
    resumed = run_training(tmp_path / "killed", stage, config, inputs, checkpoint_every=3)
    for name, weight in whole.weights.items():
        assert torch.equal(weight, resumed.weights[name]), name
    assert whole.history == resumed.history
    assert whole.history[-1]["train/expert_load_max"] > 1.0 > whole.history[-1]["train/expert_load_min"]


@pytest.mark.parametrize("stage", POST_TRAINING, ids=str)
def test_an_even_load_costs_each_trained_mixture_its_share_and_evaluations_leave_it_out(
    stage: Stage, expert_inputs: Inputs, tmp_path: Path
):
    trained = run_training(tmp_path, stage, CONFIGS[stage], expert_inputs[stage])
    models = 2 if stage is Stage.PPO else 1
    assert trained.history[0]["train/router_loss"] == pytest.approx(models * 0.05 * 2, rel=1e-5)
    assert not [name for name in trained.history[-1] if name.startswith("eval/") and "router" in name]


@pytest.mark.parametrize("stage", POST_TRAINING, ids=str)
def test_routers_are_pulled_by_the_balancing_loss_of_what_is_trained(
    stage: Stage, expert_inputs: Inputs, tmp_path: Path
):
    """Against the equation on logits that hooks catch at the routers, after a step that kept expert 0 busy."""
    config = CONFIGS[stage]
    prepared = prepare(tmp_path, stage, config, expert_inputs[stage])
    engine = make_engine(prepared.parts, config, ExecutionConfig())
    objective = prepared.objective(engine)
    step = next(iter(objective.steps(engine)))
    batch = step.micro_batches[0]
    parts = torch.nn.ModuleDict(prepared.parts)
    objective.loss(parts, batch)
    step.observe(torch.tensor([2.0, 1.0, 1.0, 0.0]).repeat(2 * len(parts)))
    load_LE = torch.tensor([[1.0, 0.5, 0.5, 0.0]] * 2)

    caught: dict[str, list[torch.Tensor]] = {name: [] for name in parts}
    for name, model in parts.items():
        for layer in model.base_model.layers:  # type: ignore[union-attr]
            layer.mlp.gate.register_forward_hook(lambda _, __, out, name=name: caught[name].append(out[0]))
    output = objective.loss(parts, batch)
    losses = [router_balance_loss(torch.stack(logits, dim=1).softmax(-1), load_LE) for logits in caught.values()]
    expected = 0.05 * torch.stack(losses).sum()
    assert output.token_loss_sum is not None
    torch.testing.assert_close(output.token_loss_sum, expected)
    routers = [weight for name, weight in parts.named_parameters() if "mlp.gate" in name]
    assert len(routers) == 2 * len(parts)
    pulls = torch.autograd.grad(output.token_loss_sum, routers, retain_graph=True)
    assert all(pull.abs().max() > 1e-4 for pull in pulls)
    for pull, by_hand in zip(pulls, torch.autograd.grad(expected, routers, retain_graph=True), strict=True):
        torch.testing.assert_close(pull, by_hand)

    engine.backward(objective.loss, [Share(batch, 0.0, 1.0)])
    for router, pull in zip(routers, pulls, strict=True):
        torch.testing.assert_close(router.grad, pull)


def test_the_balancing_loss_evens_the_load_out(stage_inputs: Inputs, tmp_path: Path):
    def last_load(coefficient: float) -> float:
        config = PRETRAIN.model_copy(
            update={
                "model": EXPERTS.model_copy(update={"router_loss_coefficient": coefficient}),
                "max_tokens": 64 * 4 * 40,
            }
        )
        trained = run_training(tmp_path / str(coefficient), Stage.PRETRAIN, config, stage_inputs[Stage.PRETRAIN])
        return float(np.mean([row["train/expert_load_max"] for row in trained.history[-10:]]))

    # 2 is the most that an expert of four, two a token, can get: all tokens
    assert last_load(1.0) < 1.5
    assert last_load(0.0) > 1.8


def test_an_export_has_the_published_names_and_reloads_in_plain_transformers(
    model: Any, artifact: TokensArtifact, tmp_path: Path
):
    from transformers import AutoModelForCausalLM

    save_model(model, model.state_dict(), tmp_path, artifact)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert "model.layers.1.block_sparse_moe.experts.3.w2.weight" in names
    ids = torch.tensor([[0, 4, 70, 71, 72, 1, 5]])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    again = load_causal_lm(tmp_path, artifact).eval()
    for other in (plain, again):
        torch.testing.assert_close(other(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=1e-5)
    routing = routing_of(again)
    assert routing == Routing(num_chosen=2, coefficient=0.05)
