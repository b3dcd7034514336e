"""Which items of the suites an aligned model answers otherwise than its start, read from the scores of an evaluation.

Every score is in `scores.parquet`, every different answer in `responses.parquet`; the page shows the few that changed
most.
"""

import io
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from stages.artifacts.manifests import read_file
from stages.config.errors import DataError
from stages.config.graph import aligned_models
from stages.config.request import ArtifactRef, Manifest
from stages.reporting.names import start_of
from stages.reporting.story import ItemChange, Story

if TYPE_CHECKING:
    import pyarrow

logger = logging.getLogger(__name__)

SCORES, RESPONSES = "scores.parquet", "responses.parquet"
_LARGEST = 256 << 20
"""Bytes of a file that is read whole into memory."""
_MOST_SHOWN = 5
"""Items of each suite that gained most, and as many that lost most."""
_REBUILD = "Clear the evaluate task to build it again."


def with_changes(story: Story) -> Story:
    """Add the items on which the aligned model that was proposed, or the last one, differs most from its start."""
    measured = [spec.role for spec in aligned_models() if story.metrics_of(spec.role)]
    chosen = story.promotion.chosen if story.promotion else None
    role = chosen if chosen in measured else measured[-1] if measured else ""
    manifest = story.manifests.get("evaluation")
    if not role or manifest is None or not (start := start_of(role, story)):
        return story
    ref = manifest.ref(story.uris["evaluation"])
    return replace(story, changed=role, changes=changed_items(ref, manifest, role=role, start=start))


def changed_items(ref: ArtifactRef, manifest: Manifest, *, role: str, start: str) -> dict[str, list[ItemChange]]:
    """By suite the items that `role` gained or lost most on against `start`, largest gain first.

    Empty for evaluations that kept no scores; raises DataError for a file that is none.
    """
    sizes = {entry.path: entry.size for entry in manifest.files}
    if not {SCORES, RESPONSES} <= sizes.keys():
        return {}
    if max(sizes[SCORES], sizes[RESPONSES]) > _LARGEST:
        logger.warning("the report shows no single items: %s of %s are too large to look through", SCORES, ref.uri)
        return {}
    scores = _table(ref, SCORES, ("suite", "item", "role", "value", "response_digest"))
    sides = [{(row["suite"], row["item"]): row for row in _rows(scores, one)} for one in (start, role)]
    both: dict[str, list[tuple[float, str]]] = {}
    for suite, item in sides[0].keys() & sides[1].keys():
        difference = sides[1][suite, item]["value"] - sides[0][suite, item]["value"]
        if difference:
            both.setdefault(suite, []).append((difference, item))
    chosen = {suite: _extremes(found) for suite, found in both.items()}
    digests = {
        side[suite, item]["response_digest"] for suite, found in chosen.items() for item in found for side in sides
    }
    texts = _texts(ref, digests)
    return {
        suite: [
            ItemChange(
                item=item,
                before=before["value"],
                after=after["value"],
                response_before=texts.get(before["response_digest"], ""),
                response_after=texts.get(after["response_digest"], ""),
            )
            for item in found
            if (before := sides[0][suite, item]) and (after := sides[1][suite, item])
        ]
        for suite, found in sorted(chosen.items())
    }


def _extremes(found: list[tuple[float, str]]) -> list[str]:
    ordered = sorted(found, key=lambda one: (-one[0], one[1]))
    if len(ordered) > 2 * _MOST_SHOWN:
        ordered = [*ordered[:_MOST_SHOWN], *ordered[-_MOST_SHOWN:]]
    return [item for _, item in ordered]


def _rows(scores: "pyarrow.Table", role: str) -> list[dict[str, Any]]:
    import pyarrow.compute as pc

    return scores.filter(pc.field("role") == role).to_pylist()


def _texts(ref: ArtifactRef, digests: set[str]) -> Mapping[str, str]:
    import pyarrow.compute as pc

    found, wanted = _table(ref, RESPONSES, ("digest", "response")), sorted(digests - {""})
    if not wanted:  # suites without responses; an empty list has no type to compare with
        return {}
    rows = found.filter(pc.field("digest").isin(wanted)).to_pylist()
    return {row["digest"]: row["response"] for row in rows}


def _table(ref: ArtifactRef, name: str, columns: tuple[str, ...]) -> "pyarrow.Table":
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(io.BytesIO(read_file(ref, name)))
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{ref.uri}/{name} is no table: {error}", advice=_REBUILD) from error
    if missing := [column for column in columns if column not in table.column_names]:
        raise DataError(f"{ref.uri}/{name} has no column {missing[0]!r}", advice=_REBUILD)
    return table.select(list(columns))
