"""Settings of scorers."""

import pytest
from pydantic import TypeAdapter, ValidationError

from stages.config.scorers import MixtureScorer, ScorerConfig, described, reads_reward_model


def parse(**settings: object) -> ScorerConfig:
    return TypeAdapter(ScorerConfig).validate_python(settings)


NUMBER, LENGTH, REWARD = {"kind": "number"}, {"kind": "length"}, {"kind": "reward_model"}


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"kind": "regex"}, "pattern is empty"),
        ({"kind": "regex", "pattern": "("}, "no regular expression"),
        ({"kind": "length", "least": 5, "most": 4}, "least=5 is more than most=4"),
        ({"kind": "function"}, "must be module:name"),
        ({"kind": "function", "function": "a:b", "sha256": "1"}, "64 hexadecimal digits"),
        ({"kind": "mixture", "parts": [{"weight": 1, "scorer": NUMBER}]}, "at least two"),
        (
            {"kind": "mixture", "parts": [{"weight": 1, "scorer": NUMBER}, {"weight": 2, "scorer": NUMBER}]},
            r"\['number'\] appear twice",
        ),
        (
            {"kind": "mixture", "parts": [{"weight": 0, "scorer": NUMBER}, {"weight": 2, "scorer": LENGTH}]},
            "weight=0",
        ),
        (
            {
                "kind": "mixture",
                "parts": [{"name": name, "weight": 1, "scorer": REWARD} for name in ("one", "two")],
            },
            "reward_model appears twice",
        ),
        ({"kind": "mixture", "parts": [{"name": "A B", "weight": 1, "scorer": NUMBER}]}, "lower-case"),
    ],
)
def test_what_cannot_be_meant_is_refused(settings: dict[str, object], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        parse(**settings)


def test_a_mixture_knows_what_its_parts_need() -> None:
    parts = [{"weight": 1, "scorer": NUMBER}, {"weight": -0.5, "name": "long", "scorer": LENGTH}]
    mixture = parse(kind="mixture", parts=parts)
    assert isinstance(mixture, MixtureScorer)
    assert mixture.needs == ("reference",)
    assert not reads_reward_model(mixture)
    assert described(mixture) == "1 x number + -0.5 x long"
    assert reads_reward_model(parse(kind="mixture", parts=[*parts, {"weight": 1, "scorer": REWARD}]))
    assert parse(kind="json_schema").needs == ("schema",)
    assert parse(kind="json_schema", json_schema="{}").needs == ()
