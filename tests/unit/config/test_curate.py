"""The settings of curation: what an artifact's fingerprint rests on."""

import hashlib
import json

from stages.config.curate import QUALITY_PROFILES
from stages.config.graph import GRAPH, Stage

THRESHOLDS_BY_VERSION = {3: "28bb5ed5cc366ce1", 4: "28bb5ed5cc366ce1"}


def test_the_thresholds_of_a_profile_belong_to_the_version_of_the_stage() -> None:
    """Fingerprints hold a profile's name only. Changed thresholds need another version of `curate`, and a line here."""
    thresholds = {name: profile.model_dump(mode="json") for name, profile in QUALITY_PROFILES.items()}
    found = hashlib.sha256(json.dumps(thresholds, sort_keys=True).encode()).hexdigest()[:16]
    assert found == THRESHOLDS_BY_VERSION[GRAPH[Stage.CURATE].version]
