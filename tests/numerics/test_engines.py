"""Every engine draws the curve of the single process, and goes on from the checkpoint of every other.

One pair of processes runs all cases for two ranks, four tiny processes run the grids: starting processes is what costs.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from stages.artifacts.addresses import open_store
from stages.config.graph import Stage
from stages.config.request import ArtifactRef
from stages.config.train import ModelConfig, PretrainConfig
from stages.train.checkpoint import Checkpointer
from stages.train.ranks import Processes
from stages.train.shards import Box, SavedState
from tests.numerics.training import Case, Killed, Trained, continue_from, run_on_processes, run_training
from tests.small_world import CONFIGS

pytestmark = pytest.mark.slow

_MODEL = ModelConfig(hidden_size=32, intermediate_size=64, num_layers=3, num_heads=4, num_kv_heads=2)
_ROWS = 4 * 5 + 3
"""Six steps, of which the last is smaller: ranks have unequal numbers of micro-batches in it."""
_PRETRAIN = CONFIGS[Stage.PRETRAIN].model_copy(update={"model": _MODEL, "max_tokens": 64 * _ROWS})
assert isinstance(_PRETRAIN, PretrainConfig)
_UNTIED = _PRETRAIN.model_copy(update={"model": _MODEL.model_copy(update={"tie_embeddings": False})})
_BF16 = _PRETRAIN.model_copy(update={"precision": "bf16"})

_LOSS, _NORM = 1e-5, 1e-4
"""Float32 sums in another order: absolute on losses around 5, relative on gradient norms."""
_WEIGHT = 2e-5
"""AdamW divides by the root of tiny second moments in its first steps, which magnifies rounding."""

ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"engine": "ddp"},
    "fsdp": {"engine": "fsdp"},
    "zero1": {"engine": "deepspeed", "zero_stage": 1},
    "zero2": {"engine": "deepspeed", "zero_stage": 2},
    "zero3": {"engine": "deepspeed", "zero_stage": 3},
    "tensor": {"tensor_parallel": 2},
    "pipeline": {"pipeline_parallel": 2},
}
VARIANTS: dict[str, tuple[PretrainConfig, dict[str, Any]]] = {
    "zero2 offloaded": (_PRETRAIN, {**ENGINES["zero2"], "offload": True}),
    "zero3 offloaded": (_PRETRAIN, {**ENGINES["zero3"], "offload": True}),
    "zero3 recomputed": (_PRETRAIN, {**ENGINES["zero3"], "gradient_checkpointing": True}),
    "fsdp recomputed": (_PRETRAIN, {**ENGINES["fsdp"], "gradient_checkpointing": True}),
    "tensor recomputed": (_PRETRAIN, {**ENGINES["tensor"], "gradient_checkpointing": True}),
    "pipeline recomputed": (_PRETRAIN, {**ENGINES["pipeline"], "gradient_checkpointing": True}),
    "pipeline untied": (_UNTIED, ENGINES["pipeline"]),
    "tensor untied": (_UNTIED, ENGINES["tensor"]),
}
GRIDS: dict[str, dict[str, Any]] = {
    "tensor x ddp": {"tensor_parallel": 2, "engine": "ddp"},
    "tensor x fsdp": {"tensor_parallel": 2, "engine": "fsdp"},
    "pipeline x ddp": {"pipeline_parallel": 2, "engine": "ddp"},
    "pipeline x fsdp": {"pipeline_parallel": 2, "engine": "fsdp"},
    "pipeline x tensor": {"pipeline_parallel": 2, "tensor_parallel": 2},
    "fsdp": {"engine": "fsdp"},
}
OTHER_STAGES: dict[str, tuple[Stage, dict[str, Any]]] = {
    "sft pipeline": (Stage.SFT, ENGINES["pipeline"]),
    "reward zero2": (Stage.REWARD, ENGINES["zero2"]),
    "dpo tensor": (Stage.DPO, ENGINES["tensor"]),
    "ppo zero3": (Stage.PPO, ENGINES["zero3"]),
    "ppo tensor": (Stage.PPO, ENGINES["tensor"]),
}
RESUMES = [("alone", name) for name in ENGINES] + list(zip(ENGINES, [*list(ENGINES)[1:], "ddp"], strict=True))
"""Every engine after the single process, and after the engine before it: with what every checkpoint holds (below), and
every engine before the single process, that covers all pairs."""
IN_BF16 = ("zero2", "tensor", "pipeline")
_KILL: dict[str, Any] = {"checkpoint_every": 3, "kill_at": 4}
Inputs = dict[Stage, dict[str, ArtifactRef]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def inputs(stage_inputs: Inputs) -> dict[str, ArtifactRef]:
    return stage_inputs[Stage.PRETRAIN]


def pair_cases(home: Path, stage_inputs: Inputs) -> dict[str, Case]:
    """Everything that two processes train, in one life of theirs."""

    def case(name: str, config: Any, options: dict[str, Any], stage: Stage = Stage.PRETRAIN, **more: Any) -> Case:
        options = {"num_workers": 2, "micro_batch_size": 1, **options}
        return Case(home / name, stage, config, stage_inputs[stage], options, **more)

    cases = {name: case(name, _PRETRAIN, options | {"export": True}) for name, options in ENGINES.items()}
    cases |= {name: case(name, config, options) for name, (config, options) in VARIANTS.items()}
    cases |= {name: case(name, CONFIGS[stage], options, stage) for name, (stage, options) in OTHER_STAGES.items()}
    cases |= {f"bf16 {name}": case(f"bf16 {name}", _BF16, ENGINES[name]) for name in IN_BF16}
    cases |= {f"killed/{name}": case(f"killed/{name}", _PRETRAIN, o | _KILL) for name, o in ENGINES.items()}
    for first, second in RESUMES:
        name = f"{first} then {second}"
        resumed = ENGINES[second] | {"checkpoint_every": 3}
        cases[name] = case(name, _PRETRAIN, resumed, start_from=home / "killed" / first)
    return cases


def grid_cases(home: Path, inputs: dict[str, ArtifactRef]) -> dict[str, Case]:
    """What four processes train; every grid also goes on from the checkpoint of the one before."""

    def case(name: str, options: dict[str, Any], **more: Any) -> Case:
        options = {"num_workers": 4, "micro_batch_size": 1, **options}
        return Case(home / name, Stage.PRETRAIN, _PRETRAIN, inputs, options, **more)

    cases, before = {}, "alone"
    for name, options in GRIDS.items():
        cases[name] = case(f"4 {name}", options)
        cases[f"killed/4 {name}"] = case(f"killed/4 {name}", options | _KILL)
        resumed = options | {"checkpoint_every": 3}
        cases[f"then {name}"] = case(f"then 4 {name}", resumed, start_from=home / "killed" / before)
        before = f"4 {name}"
    return cases


def train_alone(home: Path, stage_inputs: Inputs) -> dict[str, Trained]:
    """The single-process trainings that others are compared with, and a checkpoint of one."""
    runs: dict[str, tuple[Stage, Any]] = {
        "pretrain": (Stage.PRETRAIN, _PRETRAIN),
        "untied": (Stage.PRETRAIN, _UNTIED),
        "bf16": (Stage.PRETRAIN, _BF16),
    } | {stage.value: (stage, CONFIGS[stage]) for stage, _ in OTHER_STAGES.values()}
    trained = {
        name: run_training(home / "alone" / name, stage, config, stage_inputs[stage], micro_batch_size=1, export=True)
        for name, (stage, config) in runs.items()
    }
    with pytest.raises(Killed):
        run_training(
            home / "killed" / "alone",
            Stage.PRETRAIN,
            _PRETRAIN,
            stage_inputs[Stage.PRETRAIN],
            micro_batch_size=1,
            **_KILL,
        )
    return trained


@pytest.fixture(scope="module")
def alone(home: Path, stage_inputs: Inputs) -> dict[str, Trained]:
    return train_alone(home, stage_inputs)


@pytest.fixture(scope="module")
def pair(home: Path, alone: dict[str, Trained], stage_inputs: Inputs) -> dict[str, Trained]:
    return run_on_processes(pair_cases(home, stage_inputs), num_processes=2)


@pytest.fixture(scope="module")
def grid(home: Path, alone: dict[str, Trained], inputs: dict[str, ArtifactRef]) -> dict[str, Trained]:
    return run_on_processes(grid_cases(home, inputs), num_processes=4)


def assert_same(one: Trained, other: Trained, *, loss: float = _LOSS, norm: float = _NORM) -> None:
    """The same curves and the same model."""
    assert [row["step"] for row in one.history] == [row["step"] for row in other.history]
    for row, expected in zip(one.history, other.history, strict=True):
        assert row["train/loss"] == pytest.approx(expected["train/loss"], abs=loss), row["step"]
        assert row["train/grad_norm"] == pytest.approx(expected["train/grad_norm"], rel=norm), row["step"]
        assert row.get("eval/loss") == pytest.approx(expected.get("eval/loss"), abs=loss)
    assert one.weights.keys() == other.weights.keys()
    for name, weight in other.weights.items():
        torch.testing.assert_close(
            one.weights[name], weight, rtol=1e-3, atol=_WEIGHT, msg=lambda m, n=name: f"{n}: {m}"
        )


def checkpoint_in(home: Path) -> SavedState:
    store = open_store((home / "store").as_uri())
    (fingerprint,) = {key.split("/")[1] for key in store.list("checkpoints")}
    latest = Checkpointer(store, fingerprint, keep=2, processes=Processes()).latest()
    assert latest is not None
    assert latest.step == 3
    return latest.engine


def assert_same_state(state: SavedState, expected: SavedState) -> None:
    """`expected` is a single process's: its tensors have the shapes that the parameters have."""
    numbers = {"loss_scale"}
    assert set(state) - numbers == set(expected) - numbers
    for key in set(expected) - numbers:
        box = Box.whole(expected.shape(key))
        torch.testing.assert_close(state.read(key, box), expected.read(key, box), rtol=1e-3, atol=_WEIGHT)


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_draws_the_curve_of_a_single_process(name: str, pair: Any, alone: Any) -> None:
    assert_same(pair[name], alone["pretrain"])


def test_the_measured_memory_of_a_worker_is_what_its_engine_leaves_on_it(pair: Any, alone: Any) -> None:
    whole, of = alone["pretrain"].memory, {name: pair[name].memory for name in ENGINES}
    moments = pytest.approx(2 * whole.gradients, rel=0.02)  # AdamW's two, and a step number for each parameter
    assert whole.optimizer == moments
    assert of["ddp"].parameters == whole.parameters
    assert of["ddp"].optimizer == whole.optimizer
    assert of["ddp"].gradients == pytest.approx(whole.gradients, rel=0.02)  # in buckets
    for name in ("fsdp", "zero3"):
        assert of[name].parameters == pytest.approx(whole.parameters / 2, rel=0.1), name
    assert of["fsdp"].gradients == pytest.approx(whole.gradients / 2, rel=0.1)
    assert of["fsdp"].optimizer == pytest.approx(whole.optimizer / 2, rel=0.1)
    for name in ("zero1", "zero2", "zero3"):  # moments and a copy of the weights, by halves
        assert of[name].optimizer == pytest.approx(1.5 * whole.parameters, rel=0.1), name
    for name in ("tensor", "pipeline"):
        assert whole.parameters / 3 < of[name].parameters < whole.parameters, name


@pytest.mark.parametrize("name", ENGINES)
def test_what_an_engine_exports_loads_in_plain_transformers(name: str, pair: Any, alone: Any, home: Path) -> None:
    ids = torch.tensor([[3, 70, 71, 72, 1, 5, 200, 17]])
    ours, expected = (
        AutoModelForCausalLM.from_pretrained(folder / "model").eval()(input_ids=ids).logits
        for folder in (home / name, home / "alone" / "pretrain")
    )
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_draws_the_same_curve(name: str, pair: Any, alone: Any) -> None:
    assert_same(pair[name], alone["untied" if "untied" in name else "pretrain"])


@pytest.mark.parametrize("name", OTHER_STAGES)
def test_other_objectives_do_not_notice_the_engine(name: str, pair: Any, alone: Any) -> None:
    assert_same(pair[name], alone[OTHER_STAGES[name][0].value], loss=2e-5, norm=1e-3)


@pytest.mark.parametrize("name", IN_BF16)
def test_bfloat16_differs_by_its_own_rounding_only(name: str, pair: Any, alone: Any) -> None:
    for row, expected in zip(pair[f"bf16 {name}"].history, alone["bf16"].history, strict=True):
        assert row["train/loss"] == pytest.approx(expected["train/loss"], abs=2e-3)


@pytest.mark.parametrize(("first", "second"), RESUMES)
def test_a_checkpoint_of_one_engine_resumes_in_another(first: str, second: str, pair: Any, alone: Any) -> None:
    assert_same(pair[f"{first} then {second}"], alone["pretrain"])


@pytest.mark.parametrize("first", ENGINES)
def test_a_checkpoint_of_two_processes_resumes_in_one(
    first: str, pair: Any, alone: Any, home: Path, inputs: dict[str, ArtifactRef]
) -> None:
    continue_from(home / f"{first} then alone", home / "killed" / first)
    resumed = run_training(
        home / f"{first} then alone", Stage.PRETRAIN, _PRETRAIN, inputs, micro_batch_size=1, checkpoint_every=3
    )
    assert_same(resumed, alone["pretrain"])


@pytest.mark.parametrize("name", ENGINES)
def test_checkpoints_of_all_engines_hold_the_same(name: str, pair: Any, home: Path) -> None:
    """Tensor by tensor, whoever wrote which piece."""
    assert_same_state(checkpoint_in(home / "killed" / name), checkpoint_in(home / "killed" / "alone"))


@pytest.mark.parametrize("name", GRIDS)
def test_checkpoints_of_all_grids_hold_the_same(name: str, grid: Any, home: Path) -> None:
    assert_same_state(checkpoint_in(home / "killed" / f"4 {name}"), checkpoint_in(home / "killed" / "alone"))


@pytest.mark.parametrize("name", GRIDS)
def test_a_grid_of_four_draws_the_same_curve(name: str, grid: Any, alone: Any) -> None:
    assert_same(grid[name], alone["pretrain"])


@pytest.mark.parametrize("name", GRIDS)
def test_a_grid_resumes_from_another(name: str, grid: Any, alone: Any) -> None:
    assert_same(grid[f"then {name}"], alone["pretrain"])
