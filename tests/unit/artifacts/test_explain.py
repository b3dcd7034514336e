"""What the reason for a build shows of the fields that differ."""

from pathlib import Path

from stages.artifacts.explain import Builds, identity_of
from stages.config.graph import Stage
from tests.pipeline_records import publish_run


def test_a_setting_that_reads_like_a_digest_is_shown_as_it_is_and_digests_are_short(tmp_path: Path) -> None:
    store, _ = publish_run(tmp_path)
    builds = Builds(store, Stage.TOKENIZE)
    (manifest,) = builds.manifests
    same = identity_of(manifest, store_uri=store.root_uri, wanted={})
    assert builds.differences(manifest, same) == []
    wanted = {**same, "title": "content: what is in it", "input more": f"content:{'a' * 64}"}
    assert builds.differences(manifest, wanted) == [
        f"input more: absent -> {'a' * 12}",
        "title: absent -> content: what is in it",
    ]
