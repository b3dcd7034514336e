"""From the form of a comparison to its combinations, and what is refused before anything is spent."""

from typing import Any

import pytest

from stages.config.compare import CompareParams
from stages.config.errors import ConfigError
from stages.config.expansion import expand
from stages.config.graph import Stage
from stages.config.preferences import DPOConfig
from stages.config.rollouts import PPOConfig
from stages.config.validation import validated


def form(**values: Any) -> CompareParams:
    return validated(CompareParams, {"recipe": "tiny", **values})


def refused(message: str, **values: Any) -> None:
    with pytest.raises(ConfigError, match=message):
        expand(form(**values))


def test_every_method_meets_every_beta_and_every_seed() -> None:
    found = expand(form(methods=["dpo", "ppo"], betas=[0.1, 0.5], seeds=[3, 4]))
    named = [(one.method, one.stage, one.beta, one.seed) for one in found.combinations]
    assert named == [
        (stage.value, stage, beta, seed) for stage in (Stage.DPO, Stage.PPO) for beta in (0.1, 0.5) for seed in (3, 4)
    ]
    for combination, config in zip(found.combinations, found.configs, strict=True):
        settings = config.stage_config(combination.stage)
        assert isinstance(settings, DPOConfig | PPOConfig)
        assert settings.seed == combination.seed
        beta = settings.loss.model_dump()["beta"] if isinstance(settings, DPOConfig) else settings.kl_coefficient
        assert beta == combination.beta
        assert combination.stage in config.selected
        assert not {Stage.PPO, Stage.DPO} - {combination.stage} & config.selected


def test_what_is_shared_is_the_same_in_every_combination() -> None:
    """Else each would build a start of its own."""
    found = expand(form(betas=[0.1, 0.5], seeds=[1, 2], seed=7))
    for stage in (Stage.CURATE, Stage.TOKENIZE, Stage.PRETRAIN, Stage.SFT, Stage.REWARD, Stage.GOLD, Stage.EVALUATE):
        for config in found.configs:
            assert stage in config.selected
            if stage is not Stage.EVALUATE:
                assert config.stage_config(stage) == found.shared.stage_config(stage)
    assert found.shared.sft.seed == 7
    assert Stage.PROMOTE not in found.configs[0].selected


def test_a_variant_is_a_stage_with_other_settings() -> None:
    found = expand(form(methods=["dpo", "careful"], variants={"careful": {"dpo.loss.label_smoothing": 0.1}}))
    usual, careful = found.combinations
    assert (careful.method, careful.stage) == ("careful", Stage.DPO)
    assert found.configs[1].dpo.model_dump()["loss"]["label_smoothing"] == 0.1
    assert found.configs[0].dpo.model_dump()["loss"]["label_smoothing"] == 0.0
    assert (usual.changed, careful.changed) == ((), ("loss.label_smoothing=0.1",))
    assert careful.settings == usual.settings > 20


def test_nested_settings_of_a_variant_mean_the_same_as_dotted_ones() -> None:
    nested, dotted = ({"ppo": {"num_epochs": 3}}, {"ppo.num_epochs": 3})
    configs = [expand(form(methods=["three"], variants={"three": settings})).configs for settings in (nested, dotted)]
    assert configs[0] == configs[1]


def test_a_comparison_of_preference_methods_alone_still_has_a_proxy_and_a_gold_scorer() -> None:
    found = expand(form(methods=["dpo"]))
    assert {Stage.REWARD, Stage.GOLD} <= found.shared.selected
    assert Stage.PPO not in found.shared.selected
    assert found.shared.dpo.half == found.shared.reward.half == "first"


def test_a_given_gold_model_takes_the_place_of_a_trained_one() -> None:
    found = expand(form(gold_model="org/scorer"))
    assert Stage.GOLD not in found.shared.selected
    assert found.shared.gold_model == "org/scorer"


@pytest.mark.parametrize("field", ["methods", "betas", "seeds"])
def test_empty_lists_are_refused(field: str) -> None:
    refused(f"{field}: it is empty", **{field: []})


def test_what_stands_twice_is_refused() -> None:
    refused("methods: dpo stands there twice", methods=["dpo", "dpo"])
    refused(r"betas: 0\.1 stands there twice", betas=[0.1, 0.2, 0.1])
    refused("seeds: 4 stands there twice", seeds=[4, 4])


def test_too_many_combinations_are_refused_and_the_limit_is_a_field() -> None:
    lists = {"betas": [0.1, 0.2, 0.3], "seeds": [0, 1, 2]}
    refused("2 methods x 3 betas x 3 seeds make 18 trainings, more than max_combinations=16", **lists)
    assert len(expand(form(**lists, max_combinations=18)).combinations) == 18


def test_a_method_that_does_not_exist_is_refused_with_those_that_do() -> None:
    refused("methods: 'gpro' does not exist; allowed: dpo, ppo, or a name in variants", methods=["gpro"])
    refused("methods: 'sft' does not exist", methods=["sft"])


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ({"dpo": {"dpo.loss.label_smoothing": 0.1}}, "'dpo' is a stage, whose name no variant may have"),
        ({"other": {"dpo.loss.label_smoothing": 0.1}}, "'other' is not among methods"),
        ({"mine": {}}, "'mine' must be settings by dotted path"),
        ({"mine": 3}, "'mine' must be settings by dotted path"),
        ({"mine": {"sft.seed": 3}}, "changes settings of sft; it may change those of one stage of ppo, dpo"),
        ({"mine": {"dpo.global_batch_size": 3, "ppo.num_epochs": 1}}, "changes settings of dpo, ppo"),
        ({"mine": {"dpo.loss.beta": 3}}, "'dpo.loss.beta' is set by variants, and the comparison sets it too"),
        ({"mine": {"ppo.seed": 3}}, "'ppo.seed' is set by variants"),
        ({"mine": {"dpo.loss.kind": "nonsense"}}, r"mine, beta 0\.1, seed 0: .*nonsense"),
        ({"mine": {"dpo.num_epoch": 3}}, r"mine, beta 0\.1, seed 0: overrides: 'dpo.num_epoch' does not exist"),
    ],
)
def test_variants_that_make_no_sense_are_refused(variants: dict[str, Any], message: str) -> None:
    methods = ["dpo"] if "other" in variants else ["mine"] if "mine" in variants else ["dpo"]
    refused(message, methods=methods, variants=variants)


def test_a_setting_has_one_place() -> None:
    refused(
        "'dpo.num_epochs' stands in overrides and in variants of 'long'",
        methods=["long"],
        variants={"long": {"dpo.num_epochs": 3}},
        overrides={"dpo.num_epochs": 2},
    )
    refused(r"'ppo.kl_coefficient' is set by overrides", overrides={"ppo.kl_coefficient": 0.3})


def test_without_a_gold_scorer_there_is_no_comparison() -> None:
    refused("a comparison needs a scorer that no method is trained with", overrides={"gold_scorer": "none"})


@pytest.mark.parametrize("path", ["alignment", "last_stage", "train_reward", "review_made_data", "dry_run"])
def test_what_the_comparison_decides_is_not_overridden(path: str) -> None:
    refused(f"'{path}' cannot be set in a comparison", overrides={path: "dpo"})


@pytest.mark.parametrize("beta", [0.0, -0.1, float("inf"), float("nan"), "much"])
def test_a_beta_is_a_positive_number(beta: Any) -> None:
    refused("^betas", betas=[beta])


def test_a_seed_is_one_that_a_training_can_have() -> None:
    refused("seeds: -1 is no seed", seeds=[-1])
    refused("seeds: 2147483648 is no seed", seeds=[2**31])


def test_names_are_short_and_plain() -> None:
    for name in ("<b>", "x" * 41, " ", "a\nb"):
        with pytest.raises(ConfigError):
            form(methods=[name], variants={name: {"dpo.num_epochs": 3}})
