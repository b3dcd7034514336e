"""The switches of personal data: what has no effect is refused, and what is left alone changes no identity."""

import pytest
from pydantic import ValidationError

from stages.config.curate import CurateConfig
from stages.config.pii import PiiConfig


def test_no_type_at_all_is_refused_with_the_setting_that_says_so() -> None:
    with pytest.raises(ValidationError, match="use scrub_pii=false"):
        PiiConfig(**dict.fromkeys(PiiConfig.model_fields, False))


def test_a_switch_without_scrubbing_is_refused_by_its_name() -> None:
    with pytest.raises(ValidationError, match=r"pii: \['phones'\] are set, but scrub_pii=false"):
        CurateConfig(scrub_pii=False, pii=PiiConfig(phones=False))


def test_only_a_changed_switch_enters_the_identity() -> None:
    assert "pii" not in CurateConfig().identity()
    assert CurateConfig(pii=PiiConfig(phones=False)).identity()["pii"]["phones"] is False
