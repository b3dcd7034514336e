"""Memory by component: bytes that a reader can count, through the real engine."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from stages.config.execution import ExecutionConfig
from stages.config.memory import recorded_memory
from stages.config.train import OptimizerConfig, PretrainConfig
from stages.train.engine import LossOutput, Share
from stages.train.engines.torch_engine import TorchEngine
from stages.train.memory import MemoryMeter, resident, tensor_bytes
from tests.small_world import MODEL

CONFIG = PretrainConfig(
    model=MODEL, precision="fp32", optimizer=OptimizerConfig(learning_rate=1e-3), global_batch_size=1, max_tokens=64
)
KIB = 1024


class Policy(nn.Module):
    """32 weights of 4 bytes are trained, 8 are not."""

    def __init__(self) -> None:
        super().__init__()
        self.config = PretrainedConfig()
        self.trained = nn.Linear(4, 8, bias=False)
        self.frozen = nn.Linear(4, 2, bias=False).requires_grad_(False)


def status(folder: Path, *, now: int, highest: int) -> Path:
    path = folder / "status"
    path.write_text(f"Name:\tpython\nVmHWM:\t{highest} kB\nVmRSS:\t{now} kB\n")
    return path


def trained(path: Path) -> tuple[MemoryMeter, TorchEngine]:
    """Two steps of a linear policy beside a frozen one of 6 weights."""
    meter = MemoryMeter(torch.device("cpu"), status=path)
    engine = TorchEngine({"policy": Policy()}, CONFIG, ExecutionConfig())
    engine.freeze(nn.Linear(3, 2, bias=False))

    def loss(parts: Any, batch: torch.Tensor) -> LossOutput:
        return LossOutput(parts["policy"].trained(batch).sum(), {})

    for _ in range(2):
        engine.backward(loss, [Share(torch.ones(1, 4), 1.0)])  # type: ignore[arg-type]
        meter.after_backward(engine)
        engine.step(1e-3)
    return meter, engine


def test_every_component_is_as_large_as_its_tensors(tmp_path: Path) -> None:
    path = status(tmp_path, now=100, highest=120)
    meter, engine = trained(path)
    status(tmp_path, now=150, highest=300)
    found = meter.measured(engine)
    # AdamW keeps two moments of each trained weight, and a step number of 4 bytes for the tensor.
    assert (found.parameters, found.gradients, found.optimizer, found.frozen) == (160, 128, 2 * 128 + 4, 24)
    assert (found.libraries, found.peak) == (100 * KIB, 300 * KIB)
    assert found.rest == 200 * KIB - (160 + 128 + 260 + 24)
    assert sum(found.components.values()) == found.peak - found.libraries


def test_gradients_are_gone_after_the_step_and_so_are_counted_before_it(tmp_path: Path) -> None:
    meter, engine = trained(status(tmp_path, now=100, highest=120))
    assert engine.held().gradients == []
    assert meter.measured(engine).gradients == 128


def test_a_process_that_had_held_more_before_says_nothing_about_the_rest(tmp_path: Path) -> None:
    path = status(tmp_path, now=100, highest=300)
    meter, engine = trained(path)
    found = meter.measured(engine)
    assert found.rest is None
    assert "activations and the rest" not in found.components


def test_tied_weights_and_views_count_once() -> None:
    weight = torch.zeros(10)
    assert tensor_bytes([weight, weight.view(2, 5), weight[3:], torch.zeros(3, dtype=torch.bfloat16)]) == 40 + 6
    assert tensor_bytes([]) == 0


def test_the_kernel_tells_what_this_process_holds_and_elsewhere_nothing_does(tmp_path: Path) -> None:
    before = resident("VmRSS")
    ballast = bytearray(64 * KIB * KIB)
    assert resident("VmRSS") - before > 60 * KIB * KIB
    assert resident("VmHWM") >= resident("VmRSS") > len(ballast)
    assert resident("VmRSS", tmp_path / "missing") == resident("VmSwapOfMars") == 0


def test_what_is_recorded_is_read_again_and_older_manifests_have_none(tmp_path: Path) -> None:
    meter, engine = trained(status(tmp_path, now=1, highest=2))
    found = meter.measured(engine)
    assert recorded_memory({"memory": found.model_dump(mode="json")}) == found
    assert recorded_memory({"device": "cpu"}) is None
    assert recorded_memory({"memory": {"device": "cpu", "parameters": -1}}) is None
