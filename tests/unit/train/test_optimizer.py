"""Which parameters decay, what Muon does to a matrix, how the rate runs, and averages of the weights."""

import itertools
import math

import pytest
import torch
from torch import nn

from stages.config.errors import ConfigError
from stages.config.train import Algorithm, OptimizerConfig, Schedule
from stages.train.averaging import averaged, update_average
from stages.train.muon import orthogonalised
from stages.train.optimizer import learning_rate, make_optimizer, parameter_groups


class RMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 4))  # a matrix by shape, a norm by what it is


class Decoder(nn.Module):
    """Embedding tied to the head, one layer with a stack of expert matrices and their biases."""

    def __init__(self, *, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        layer = nn.ModuleDict({"linear": nn.Linear(4, 3), "norm": RMSNorm()})
        layer.register_parameter("experts", nn.Parameter(torch.randn(2, 5, 4)))
        layer.register_parameter("experts_bias", nn.Parameter(torch.zeros(2, 5)))
        self.layers = nn.ModuleList([layer])
        self.head = nn.Linear(4, 6, bias=False)
        if tied:
            self.head.weight = self.embed.weight


def names_of(module: nn.Module, config: OptimizerConfig) -> dict[tuple[float, bool], set[str]]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {
        (group["weight_decay"], group["muon"]): {names[id(p)] for p in group["params"]}
        for group in parameter_groups(module, config)
    }


def test_norms_and_biases_never_decay_and_embeddings_on_request():
    config = OptimizerConfig(learning_rate=1e-3, weight_decay=0.1)
    undecayed = {"layers.0.linear.bias", "layers.0.norm.weight", "layers.0.experts_bias"}
    matrices = {"layers.0.linear.weight", "layers.0.experts"}
    assert names_of(Decoder(), config) == {
        (0.1, True): matrices,
        (0.1, False): {"embed.weight"},
        (0.0, False): undecayed,
    }
    without = config.model_copy(update={"decay_embeddings": False})
    assert names_of(Decoder(), without) == {(0.1, True): matrices, (0.0, False): undecayed | {"embed.weight"}}
    assert names_of(Decoder(tied=False), without)[(0.1, False)] == {"head.weight"}


def test_frozen_parameters_are_in_no_group():
    decoder = Decoder()
    decoder.embed.weight.requires_grad_(False)
    names = names_of(decoder, OptimizerConfig(learning_rate=1e-3))
    assert "embed.weight" not in set().union(*names.values())


def test_decoupled_decay_shrinks_by_rate_times_decay_whatever_the_gradient():
    """Two steps with gradient 0: AdamW leaves w (1 - 0.1 x 0.5)^2; Adam with L2 decay would move by the rate."""
    layer = nn.Linear(2, 1, bias=False)
    before = layer.weight.detach().clone()
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5)
    optimizer = make_optimizer(layer, config, dtype=torch.float32)
    for _ in range(2):
        layer.weight.grad = torch.zeros_like(layer.weight)
        optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), before * 0.95**2)


def test_muon_makes_the_updates_of_torchs_muon_on_matrices_and_of_adamw_on_the_rest():
    torch.manual_seed(0)
    ours, theirs = Decoder(), Decoder()
    theirs.load_state_dict(ours.state_dict())
    config = OptimizerConfig(algorithm=Algorithm.MUON, learning_rate=0.01, weight_decay=0.1)
    optimizer = make_optimizer(ours, config, dtype=torch.float32)
    matrices = [theirs.layers[0]["linear"].weight]  # type: ignore[index]
    muon = torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    rest = [p for p in theirs.parameters() if p is not matrices[0] and p.ndim != 3]
    decays = [p for p in rest if p is theirs.embed.weight]
    plain = [p for p in rest if p is not theirs.embed.weight]
    adamw = torch.optim.AdamW(
        [{"params": decays, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], lr=0.01, betas=(0.9, 0.95)
    )
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            other.grad = mine.grad.clone()
        for each in (optimizer, muon, adamw):
            each.step()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        # Three updates move the matrix by 1e-2; torch's are rounded to bfloat16 on the way, ours are not here.
        if name != "layers.0.experts":
            tolerance = 3e-4 if name == "layers.0.linear.weight" else 1e-6
            torch.testing.assert_close(mine, other, rtol=0, atol=tolerance, msg=name)


def test_orthogonalisation_leaves_all_singular_values_near_one_and_treats_experts_one_by_one():
    stack = torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(1))
    result = orthogonalised(stack, torch.float32)
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.6
    assert values.max() < 1.25
    for one, together in zip(stack, result, strict=True):
        torch.testing.assert_close(orthogonalised(one, torch.float32), together, rtol=1e-4, atol=1e-5)
    # Rotations on either side pass through, which no elementwise rule does.
    turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(2))).Q
    torch.testing.assert_close(orthogonalised(turn @ stack[0], torch.float32), turn @ result[0], rtol=1e-3, atol=1e-4)


def test_muon_without_matrices_to_train_is_refused():
    with pytest.raises(ConfigError, match=r"algorithm=muon.*no matrices"):
        make_optimizer(
            nn.Linear(2, 2), OptimizerConfig(algorithm=Algorithm.MUON, learning_rate=1e-3), dtype=torch.float32
        )


def rates(num_steps: int, **changes: object) -> list[float]:
    config = OptimizerConfig(learning_rate=1.0, **{"warmup_fraction": 0.0, **changes})  # type: ignore[arg-type]
    return [learning_rate(config, step=step, num_steps=num_steps) for step in range(num_steps)]


def test_wsd_holds_the_peak_and_falls_with_the_square_root_to_the_minimum():
    """Ten steps, two of warm-up, the last five fall: 1 - sqrt(share) at shares 0, 1/4, 1/2, 3/4, 1."""
    got = rates(10, schedule=Schedule.WSD, warmup_steps=2, decay_fraction=0.5, min_learning_rate_ratio=0.0)
    fall = [1.0, 0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75), 0.0]
    assert got == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0, *fall])


@pytest.mark.parametrize("schedule", list(Schedule), ids=str)
def test_every_schedule_starts_at_the_peak_and_never_rises(schedule: Schedule):
    got = rates(20, schedule=schedule, min_learning_rate_ratio=0.1)
    assert got[0] == 1.0
    assert all(later <= earlier for earlier, later in itertools.pairwise(got))
    assert got[-1] == pytest.approx(1.0 if schedule is Schedule.CONSTANT else 0.1)


def test_a_warm_up_longer_than_the_training_is_refused():
    with pytest.raises(ConfigError, match=r"warmup_steps=20.*only 20 steps"):
        rates(20, warmup_steps=20)


def test_lengths_in_tokens_are_steps_rounded_up():
    """Steps of 100 tokens: 150 are two steps, 500 five."""
    lengths = {"warmup_tokens": 150, "decay_tokens": 500}
    config = OptimizerConfig(learning_rate=1.0, schedule=Schedule.WSD, min_learning_rate_ratio=0.0, **lengths)  # type: ignore[arg-type]
    got = [learning_rate(config, step=step, num_steps=10, tokens_per_step=100) for step in range(10)]
    assert got == rates(10, schedule=Schedule.WSD, warmup_steps=2, decay_steps=5, min_learning_rate_ratio=0.0)
    fall = [1.0, 0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75), 0.0]
    assert got == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0, *fall])


def test_lengths_that_do_not_fit_are_refused_in_the_words_they_were_given_in():
    with pytest.raises(ConfigError, match=r"decay_steps=9, but 2 of 10 steps are warm-up") as refusal:
        rates(10, schedule=Schedule.WSD, warmup_steps=2, decay_steps=9)
    assert "at most 8 steps" in refusal.value.advice
    config = OptimizerConfig(learning_rate=1.0, warmup_tokens=950)
    with pytest.raises(ConfigError, match=r"warmup_tokens=950, which is 10 steps of 100 tokens.*only 10 steps"):
        learning_rate(config, step=0, num_steps=10, tokens_per_step=100)


def test_shares_of_wsd_that_overlap_are_refused():
    with pytest.raises(ValueError, match="more than all steps"):
        OptimizerConfig(learning_rate=1.0, schedule=Schedule.WSD, warmup_fraction=0.5, decay_fraction=0.6)


def test_the_average_follows_the_weights_and_leaves_them_as_they_are():
    """Weights 1, 2, 4 after three updates with decay 0.5: average 1, then 1.5, then 2.75."""
    layer = nn.Linear(1, 1, bias=False)
    optimizer = make_optimizer(layer, OptimizerConfig(learning_rate=1e-3), dtype=torch.float32)
    for value in (1.0, 2.0, 4.0):
        layer.weight.grad = torch.ones_like(layer.weight)
        optimizer.step()
        with torch.no_grad():
            layer.weight.fill_(value)
        update_average(optimizer, 0.5)
    with averaged(optimizer):
        assert layer.weight.item() == 2.75
    assert layer.weight.item() == 4.0
