"""Bounds as people write them, and which failed gates a form lets pass."""

import pytest
from pydantic import ValidationError

from stages.config.errors import ConfigError
from stages.config.gates import ACCURACY_LOW, BALANCED_LOW, GatesConfig, parse_bound
from stages.config.graph import Stage, gated_stages, pipeline_stages
from stages.config.recipes import RECIPES
from stages.config.resolve import resolve


@pytest.mark.parametrize(
    ("line", "value", "is_allowed"),
    [
        ("curate: curate/documents_kept >= 100", 100, True),
        ("curate: curate/documents_kept >= 100", 99, False),
        ("curate:curate/documents_kept<=1e3", 1000, True),
        ("reward: accept/accuracy_low > 0.5", 0.5, False),
        (" sft : eval/loss < -1 ", -1.5, True),
    ],
)
def test_a_bound_is_a_stage_a_metric_a_sign_and_a_number(line: str, value: float, is_allowed: bool):
    assert parse_bound(line).allows(value) is is_allowed


@pytest.mark.parametrize(
    "line",
    ["", "curate", "curate: x", "curate: x = 1", "curate: x > many", "curate: x > nan", "curate: x > 1 2", "x > 1"],
)
def test_what_is_no_bound_is_refused_with_an_example(line: str):
    with pytest.raises(ConfigError, match="is no bound; write `<stage>: <metric> <sign> <number>`"):
        resolve({"recipe": "tiny", "overrides": {"gates.bounds": [line]}})


def test_a_bound_on_a_stage_without_a_gate_names_those_that_have_one():
    with pytest.raises(
        ConfigError, match="promote has no gate; allowed: constitution, synthesize, curate, tokenize, pretrain, "
    ):
        resolve({"recipe": "tiny", "overrides": {"gates.bounds": ["promote: promotion/promoted > 0"]}})


def test_a_gate_stands_after_what_makes_data_or_a_model_and_after_evaluate():
    without = {Stage.CONVERT, Stage.PROMOTE, Stage.REPORT}
    assert set(gated_stages()) == set(pipeline_stages()) - without


@pytest.mark.parametrize("name", RECIPES)
def test_the_bounds_of_every_recipe_can_be_read(name: str):
    gates = RECIPES[name]().gates
    assert GatesConfig.model_validate(gates.model_dump()) == gates  # defaults are not validated where they stand


def test_a_person_lets_gates_pass_by_name_and_for_a_reason():
    gates = resolve({"recipe": "tiny", "override_gates": ["reward"], "override_reason": "few pairs"}).gates
    assert (gates.overrides(Stage.REWARD), gates.overrides(Stage.PPO), gates.reason) == (True, False, "few pairs")
    everything = resolve({"recipe": "tiny", "override_gates": ["all"], "override_reason": "a test"}).gates
    assert all(everything.overrides(stage) for stage in gated_stages())


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"override_gates": ["reward"]}, "needs override_reason, which is empty"),
        ({"override_gates": ["reward"], "override_reason": "  "}, "needs override_reason, which is empty"),
        ({"override_reason": "why not"}, "without override_gates"),
        (
            {"override_gates": ["rewards"], "override_reason": "x"},
            "'rewards' is no gate; allowed: constitution, synthesize, curate",
        ),
        ({"overrides": {"gates.override": ["all"]}}, "cannot be set"),
        ({"overrides": {"gates.recompute": False}}, "gates.recompute=false leaves out .* needs override_reason"),
    ],
)
def test_an_override_without_name_or_reason_is_refused(values: dict, told: str):
    with pytest.raises(ConfigError, match=told):
        resolve({"recipe": "tiny", **values})


def test_gates_do_without_their_jobs_for_a_reason():
    values = {"overrides": {"gates.recompute": False}, "override_reason": "a smoke test"}
    gates = resolve({"recipe": "tiny", **values}).gates
    assert (gates.recompute, gates.reason, gates.overrides(Stage.REWARD)) == (False, "a smoke test", False)


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "tiny"])
def test_a_reward_model_must_be_above_chance_and_more_than_length_in_every_recipe_that_teaches(name: str):
    gates = RECIPES[name]().gates
    asked = {(bound.stage, bound.metric, bound.sign, bound.number) for bound in map(parse_bound, gates.bounds)}
    above_chance = (ACCURACY_LOW, ">", 0.5)
    assert {(Stage.REWARD, *above_chance), (Stage.REWARD, BALANCED_LOW, ">", 0.5), (Stage.GOLD, *above_chance)} <= asked


def test_gates_are_in_no_fingerprint():
    plain = resolve({"recipe": "tiny"})
    other = resolve({"recipe": "tiny", "overrides": {"gates.bounds": ["sft: eval/loss < 9"], "gates.max_pairs": 5}})
    assert plain.gates != other.gates
    assert all(plain.stage_config(s).identity() == other.stage_config(s).identity() for s in pipeline_stages())


def test_the_settings_refuse_what_they_cannot_hold():
    with pytest.raises(ValidationError):
        GatesConfig(max_pairs=1)
