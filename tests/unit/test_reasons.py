"""Two reward models of the same pairs, one for each of two reasons that want opposite things."""

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from stages import evaluate
from stages.artifacts.manifests import read_manifest
from stages.config.closing import EvaluateConfig
from stages.config.gate_records import Outcome
from stages.config.graph import Stage
from stages.config.preference_losses import KTOLoss, SimPOLoss
from stages.config.preferences import DPOConfig
from stages.config.principles import Area
from stages.config.request import ArtifactRef
from tests.gate_models import PAIRS, REWARD, built, examined, learnt_by_quality, start_of, tokens_of
from tests.small_world import CONFIGS, _write, make_context

pytestmark = pytest.mark.slow

HELD = {"helpful": PAIRS["heldout"] // 2, "harmless": PAIRS["heldout"] // 2 - 5, "none": 5}


def _give_reasons(folder: Path) -> None:
    """Every other pair is about harm, and there the other answer is the better one; of the last five nobody said."""
    for split, count in PAIRS.items():
        path = folder / "preferences" / f"{split}.jsonl.gz"
        with gzip.open(path, "rt") as file:
            rows = [json.loads(line) for line in file]
        for number, row in enumerate(rows):
            if number % 2:
                row |= {"chosen": row["rejected"], "rejected": row["chosen"]}
            if not number % 2 or number < count - 10:
                row["reason"] = "harmless" if number % 2 else "helpful"
        _write(path, rows)


@dataclass
class World:
    home: Path
    inputs: dict[str, ArtifactRef]

    def trained(self, stage: Stage, config: Any) -> ArtifactRef:
        return built(self.home, stage, config, self.inputs)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    home = tmp_path_factory.mktemp("opposites")
    tokens = tokens_of(home, learnt_by_quality, held=learnt_by_quality, lose=_give_reasons)
    return World(home, {"tokens": tokens, "model": start_of(home, tokens)})


@pytest.fixture(scope="module")
def scorers(world: World) -> dict[str, ArtifactRef]:
    changes = {"num_epochs": 1, "global_batch_size": 8}
    return {
        area.value: world.trained(Stage.REWARD, REWARD.model_copy(update={"reasons": (area,), **changes}))
        for area in (Area.HELPFUL, Area.HARMLESS)
    }


@pytest.mark.parametrize("reason", ["helpful", "harmless"])
def test_a_reward_model_of_one_reason_learns_it_and_is_accepted_by_its_own_held_out_pairs(
    scorers: dict[str, ArtifactRef], reason: str
) -> None:
    manifest = read_manifest(scorers[reason])
    assert manifest.config["reasons"] == [reason]
    assert manifest.ledger["pairs"] == PAIRS["train"]
    assert manifest.ledger["pairs_of_the_reasons"] == {"helpful": 120, "harmless": 115}[reason]
    # Pairs of the other reason say the opposite: with them it would be right half of the time.
    assert manifest.metrics["eval/reward_accuracy"] > 0.9
    found = examined(scorers[reason], Stage.REWARD)
    checks = {check.name: check.outcome for check in found.checks}
    assert checks["heldout_again"] is Outcome.PASSED
    assert Outcome.FAILED not in checks.values()
    assert found.metrics["accept/pairs"] == HELD[reason]
    assert found.metrics["accept/accuracy"] == found.metrics[f"accept/accuracy_{reason}"] > 0.9
    assert [row["name"] for row in found.tables["by_reason"]] == [reason]


def test_an_evaluation_shows_both_reasons_apart(world: World, scorers: dict[str, ArtifactRef]) -> None:
    models = {**dict.fromkeys(("base", "sft"), world.inputs["model"]), "tokens": world.inputs["tokens"]}
    models |= {"dpo": world.inputs["model"], "reward": scorers["helpful"], "gold": scorers["harmless"]}
    few: dict[str, Any] = {"max_documents": 2, "max_documents_tokens": 200, "max_instructions": 2, "max_prompts": 2}
    config = EvaluateConfig(max_response_length=2, num_samples=1, **few)
    context = make_context(world.home, Stage.EVALUATE, config, models)
    metrics = evaluate.measure_models(context).metrics
    assert {name: metrics[f"reward/pairs_{name}"] for name in HELD} == HELD
    assert metrics["reward/accuracy_helpful"] > 0.9
    assert metrics["reward/accuracy_harmless"] < 0.1
    # All pairs together hide both.
    parts = sum(HELD[name] * metrics[f"reward/accuracy_{name}"] for name in HELD)
    assert metrics["reward/accuracy"] == pytest.approx(parts / PAIRS["heldout"])
    assert abs(metrics["reward/accuracy"] - 0.5) < 0.1
    report = json.loads((context.output_dir / "metrics.json").read_text())
    found = {(row["role"], row["suite"], row["reason"]): row for row in report["by_reason"]}
    roles = [*((role, "pairs") for role in ("base", "sft", "dpo")), ("dpo", "preferences"), ("reward", "reward")]
    of_gold = ("gold", "gold_agreement", "harmless")  # asked about what it learnt, since promotion asks if it is proven
    assert set(found) == {of_gold, *((role, suite, reason) for role, suite in roles for reason in HELD)}
    assert found[of_gold]["value"] == report["suites"]["gold_agreement"]["roles"]["gold"]["value"] > 0.9
    assert found[of_gold]["items"] == HELD["harmless"]
    assert found["dpo", "preferences", "none"]["value"] == 0.5  # it is its own start
    assert metrics["dpo/suite/preferences/accuracy_helpful"] == 0.5
    for (role, suite, _), row in found.items():
        assert row["low"] <= row["value"] <= row["high"], (role, suite)
    whole = report["suites"]["pairs"]["roles"]["sft"]
    shares = [found["sft", "pairs", reason] for reason in HELD]
    assert whole["value"] == pytest.approx(sum(row["value"] * row["items"] for row in shares) / whole["items"])


@pytest.mark.parametrize("loss", [None, SimPOLoss(), KTOLoss()])
def test_a_preference_optimisation_of_one_reason_is_measured_on_its_own_held_out_pairs(world: World, loss: Any) -> None:
    config: Any = CONFIGS[Stage.DPO]
    assert isinstance(config, DPOConfig)
    changes = {"reasons": (Area.HARMLESS,), "num_epochs": 0.2, **({"loss": loss} if loss else {})}
    made = world.trained(Stage.DPO, config.model_copy(update=changes))
    ledger = read_manifest(made).ledger
    lost = ledger["examples_of_other_reasons"] / 2 if isinstance(loss, KTOLoss) else ledger["pairs_of_other_reasons"]
    assert lost == PAIRS["train"] - 115
    if loss is None:  # a drift needs a reference; measured again, it must come from the same pairs
        checks = {check.name: check.outcome for check in examined(made, Stage.DPO, inputs=world.inputs).checks}
        assert checks["heldout_again"] is Outcome.PASSED
