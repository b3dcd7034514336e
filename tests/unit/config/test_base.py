"""The fields of a stage's config may grow and move; artifacts, requests and overrides of before keep working."""

from typing import Annotated, Any, ClassVar, Literal, get_args

import pytest
from pydantic import Field, ValidationError

from stages.artifacts.manifests import fingerprint
from stages.config.base import AddedLater, Config
from stages.config.errors import ConfigError
from stages.config.graph import Stage
from stages.config.overrides import ordered, set_dotted
from stages.config.pipeline import PipelineConfig, stored_identity
from stages.config.preferences import DPOConfig, PreferenceLoss, SigmoidLoss
from stages.config.recipes import tiny
from stages.config.request import ArtifactRef
from stages.config.resolve import resolve


class Inner(Config):
    width: int = 4
    depth: int = 2


class Before(Config):
    rate: float = 0.1
    inner: Inner = Inner()
    many: tuple[Inner, ...] = (Inner(),)


class InnerNow(Inner):
    clip: Annotated[float, AddedLater(0.0)] = 0.0


class Now(Config):
    """`Before`, with new fields on three levels, one of which no longer has the default that it came with."""

    rate: float = 0.1
    inner: InnerNow = InnerNow()
    many: tuple[InnerNow, ...] = (InnerNow(),)
    samples: Annotated[int, AddedLater(1)] = 4


def of(config: Config) -> str:
    return fingerprint(Stage.SFT, config, inputs={}, store_uri="")


def test_a_field_added_later_changes_no_fingerprint_while_it_says_what_held_before() -> None:
    assert of(Now(samples=1)) == of(Before())
    assert Now(samples=1).identity() == Before().identity() == Before().model_dump(mode="json")


@pytest.mark.parametrize(
    "changed",
    [
        Now(),  # the new default is not what artifacts of before were made with
        Now(samples=2),
        Now(samples=1, inner=InnerNow(clip=0.5)),
        Now(samples=1, many=(InnerNow(clip=0.5),)),
        Now(samples=1, rate=0.2),
    ],
)
def test_any_other_value_does(changed: Now) -> None:
    assert of(changed) != of(Before())


class Plain(Config):
    kind: Annotated[Literal["plain"], AddedLater("plain")] = "plain"
    rate: float = 0.1


class Fancy(Config):
    kind: Literal["fancy"] = "fancy"
    rate: float = 0.1
    slope: float = 2.0


class Flat(Config):
    seed: int = 0
    rate: float = 0.1


class Grouped(Config):
    seed: int = 0
    rule: Annotated[Plain | Fancy, Field(discriminator="kind")] = Plain()

    moved: ClassVar = {"rate": "rule.rate"}


def test_a_field_that_moved_into_a_union_is_read_and_identified_by_its_earlier_name() -> None:
    assert Grouped.model_validate({"seed": 3, "rate": 0.5}) == Grouped(seed=3, rule=Plain(rate=0.5))
    assert of(Grouped(seed=3, rule=Plain(rate=0.5))) == of(Flat(seed=3, rate=0.5))


def test_members_of_a_union_differ_in_identity_though_their_settings_agree() -> None:
    assert of(Grouped(rule=Fancy())) != of(Grouped())
    assert of(Grouped(rule=Fancy(slope=1.0))) != of(Grouped(rule=Fancy()))
    again = Grouped.model_validate(Grouped(rule=Fancy(slope=1.0)).identity() | {"seed": 0})
    assert again == Grouped(rule=Fancy(slope=1.0))


def test_both_names_at_once_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"rate=0.5 is the earlier name of rule.rate, and rule is given too"):
        Grouped.model_validate({"rate": 0.5, "rule": {"rate": 0.7}})
    with pytest.raises(ValidationError, match=r"rate=0.5 is the earlier name of rule.rate, and rule is given too"):
        Grouped.model_validate({"rate": 0.5, "rule": Plain()})


def test_members_and_paths_are_found_through_groups() -> None:
    class Outer(Config):
        grouped: Grouped = Grouped()
        given: dict[str, ArtifactRef] = {}

    assert Outer.current_path("grouped.rate") == "grouped.rule.rate"
    assert Outer.current_path("grouped.seed") == "grouped.seed"
    assert Outer.members("grouped.rule") == {"plain": Plain, "fancy": Fancy}
    assert Outer.members("grouped.seed") == Outer.members("given") == Outer.members("nothing.here") == {}


# Recipe tiny with seed 0, as it was before `loss` had kinds.
_TOKENS = "bcf9ccdd6961ae7aa296f3d8d64d5774af377f68d0a8c32b3c2929d02b8aeab6"
_SFT = "814f45450677e6b7ade2b08c62a2f017f41d3898fde9ba046e2d3800fee57b02"
_DPO = "01272d69e2842d2b6bf3f14f05546333e94723eb139202aa2849ddfa58c65509"


def _ref(fingerprint: str) -> ArtifactRef:
    return ArtifactRef(kind="x", uri=f"s/artifacts/x/{fingerprint}", fingerprint=fingerprint, digest="")


def test_dpo_finds_the_models_of_before_its_loss_had_kinds() -> None:
    inputs = {"tokens": _ref(_TOKENS), "model": _ref(_SFT)}
    config = resolve({"recipe": "tiny", "seed": 0}).dpo
    assert fingerprint(Stage.DPO, config, inputs=inputs, store_uri="s") == _DPO
    for changed in (SigmoidLoss(beta=0.2), SigmoidLoss(label_smoothing=0.1)):
        assert fingerprint(Stage.DPO, config.model_copy(update={"loss": changed}), inputs=inputs, store_uri="s") != _DPO


def test_a_stored_dpo_config_with_flat_fields_is_still_read() -> None:
    stored = tiny().dpo.identity()
    assert stored["beta"] == 0.1
    assert "loss" not in stored
    assert DPOConfig.model_validate(stored | {"beta": 0.3, "label_smoothing": 0.2}).loss == SigmoidLoss(
        beta=0.3, label_smoothing=0.2
    )


@pytest.mark.parametrize(
    "overrides",
    [
        {"dpo.beta": 0.3, "dpo.label_smoothing": 0.2},
        {"dpo": {"beta": 0.3, "label_smoothing": 0.2}},
        {"dpo.loss.beta": 0.3, "dpo.loss.label_smoothing": 0.2, "dpo.loss.kind": "sigmoid"},
        {"dpo.loss": {"kind": "sigmoid", "beta": 0.3}, "dpo.label_smoothing": 0.2},
    ],
)
def test_overrides_by_earlier_and_by_todays_names_mean_the_same(overrides: dict[str, Any]) -> None:
    assert resolve({"recipe": "tiny", "overrides": overrides}).dpo.loss == SigmoidLoss(beta=0.3, label_smoothing=0.2)


def test_a_kind_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"dpo.loss.kind='sigmoyd' does not exist") as caught:
        resolve({"recipe": "tiny", "overrides": {"dpo.loss.kind": "sigmoyd"}})
    assert "sigmoid" in caught.value.advice
    with pytest.raises(ConfigError, match=r"dpo.loss.kind=\['a'\] does not exist"):
        resolve({"recipe": "tiny", "overrides": {"dpo.loss.kind": ["a"]}})


def test_two_names_of_one_field_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'dpo.loss.beta' and 'dpo.beta' are two names of one field"):
        resolve({"recipe": "tiny", "overrides": {"dpo.loss.beta": 0.3, "dpo.beta": 0.2}})


def test_another_kind_brings_its_own_settings_and_is_chosen_before_they_are_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(PipelineConfig, "members", lambda path: {"plain": Plain, "fancy": Fancy})
    tree = {"rule": {"kind": "plain", "rate": 0.7}}
    for path, value in ordered({"rule": {"slope": 3.0, "kind": "fancy"}}):
        set_dotted(tree, path, value)
    assert tree == {"rule": {"kind": "fancy", "rate": 0.1, "slope": 3.0}}


def test_the_kind_that_is_there_keeps_the_recipes_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PipelineConfig, "members", lambda path: {"plain": Plain, "fancy": Fancy})
    tree = {"rule": {"kind": "plain", "rate": 0.7}}
    set_dotted(tree, "rule.kind", "plain")
    assert tree == {"rule": {"kind": "plain", "rate": 0.7}}


def test_a_stored_config_stands_for_what_it_says_and_not_for_defaults_of_today() -> None:
    stored = tiny().dpo.model_dump(mode="json")
    shorter = {name: value for name, value in stored.items() if name != "max_source_epochs"}
    identity = tiny().dpo.identity()
    del identity["max_source_epochs"]
    assert stored_identity(Stage.DPO, shorter) == identity
    assert stored_identity(Stage.DPO, stored | {"no field": 1}) == stored | {"no field": 1}


def test_every_preference_loss_has_fingerprints_of_its_own() -> None:
    """Two losses with the same fields must differ by their `kind`, which only the first member may leave out."""
    members = get_args(get_args(PreferenceLoss)[0])
    kinds = [member.model_fields["kind"] for member in members]
    left_out = [kind.default for kind in kinds if any(isinstance(mark, AddedLater) for mark in kind.metadata)]
    assert left_out == ["sigmoid"]
