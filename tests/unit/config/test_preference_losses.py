"""Which preference loss a run has is chosen by its kind, on whatever model the run starts from."""

from typing import get_args

import pytest

from stages.config.errors import ConfigError
from stages.config.graph import BASE_MODEL, Stage
from stages.config.preference_losses import IPOLoss, ORPOLoss, PreferenceLoss, SigmoidLoss, SimPOLoss, read_loss
from stages.config.preferences import DPOConfig
from stages.config.recipes import tiny
from stages.config.resolve import resolve

KINDS: dict[str, PreferenceLoss] = {member().kind: member() for member in get_args(get_args(PreferenceLoss)[0])}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_chosen_by_an_override_and_brings_its_own_defaults(kind: str) -> None:
    config = resolve({"recipe": "tiny", "overrides": {"dpo.loss.kind": kind}})
    assert config.dpo.loss == KINDS[kind]
    assert f"{kind} loss" in config.dpo.summary()
    assert DPOConfig.model_validate_json(config.dpo.model_dump_json()) == config.dpo
    assert read_loss(config.dpo.model_dump(mode="json")["loss"]) == config.dpo.loss


def test_parameters_of_a_kind_are_set_with_it_whatever_the_order() -> None:
    overrides = {"dpo.loss.gamma": 0.5, "dpo.loss.kind": "simpo", "dpo.beta": 2.5}
    assert resolve({"recipe": "tiny", "overrides": overrides}).dpo.loss == SimPOLoss(beta=2.5, gamma=0.5)


@pytest.mark.parametrize(
    ("kind", "field", "value", "said"),
    [
        ("orpo", "sft_coefficient", 0.1, "does not exist"),  # its likelihood has weight 1
        ("orpo", "beta", 0.1, "does not exist"),
        ("ipo", "label_smoothing", 0.1, "does not exist"),
        ("sigmoid", "gamma", 1.0, "does not exist"),
        ("robust", "label_smoothing", 0.0, "greater than 0"),  # without flips it is `sigmoid`
        ("robust", "label_smoothing", 0.5, "less than 0.5"),
        ("exo", "label_smoothing", 0.0, "greater than 0"),
        ("simpo", "gamma", -1.0, "greater than or equal to 0"),
        ("nca", "beta", 0.0, "greater than 0"),
        ("hinge", "sft_coefficient", -0.1, "greater than or equal to 0"),
    ],
)
def test_a_parameter_that_would_do_nothing_or_harm_is_refused(kind: str, field: str, value: float, said: str) -> None:
    with pytest.raises(ConfigError, match=rf"dpo.loss.*{field}.*{said}"):
        resolve({"recipe": "tiny", "overrides": {"dpo.loss.kind": kind, f"dpo.loss.{field}": value}})


def test_only_the_first_loss_without_a_supervised_term_has_the_identity_of_before() -> None:
    before = tiny().dpo.identity()
    assert before.keys() >= {"beta", "label_smoothing"}
    assert "loss" not in before
    with_term = tiny().dpo.model_copy(update={"loss": SigmoidLoss(sft_coefficient=0.1)})
    assert with_term.identity() == before | {"loss": {"sft_coefficient": 0.1}}
    assert tiny().dpo.model_copy(update={"loss": IPOLoss()}).identity()["loss"]["kind"] == "ipo"


def test_a_stored_loss_of_the_time_before_kinds_is_sigmoid() -> None:
    assert read_loss({"beta": 0.2}) == SigmoidLoss(beta=0.2)
    assert read_loss({"kind": "orpo", "odds_coefficient": 0.3}) == ORPOLoss(odds_coefficient=0.3)


@pytest.mark.parametrize("loss", ["orpo", "sigmoid"])
def test_dpo_follows_sft_or_stands_alone_on_a_given_model(loss: str) -> None:
    overrides = {"dpo.loss.kind": loss}
    after_sft = resolve({"recipe": "tiny", "alignment": "dpo", "overrides": overrides})
    assert after_sft.stage_inputs(Stage.DPO)["model"] is Stage.SFT
    given = {"base_model": "hf://org/name", "first_stage": "dpo", "alignment": "dpo", "preferences": ["s3://b/pairs"]}
    alone = resolve({"recipe": "tiny", **given, "overrides": overrides})
    trained = alone.selected & {Stage.PRETRAIN, Stage.SFT, Stage.REWARD, Stage.GOLD, Stage.PPO, Stage.DPO}
    assert trained == {Stage.DPO}
    assert "model" not in alone.stage_inputs(Stage.DPO)
    assert BASE_MODEL in alone.given_roles(Stage.DPO)
    assert (alone.curate.documents, alone.curate.instructions) == ((), ())  # pairs are all that it needs
