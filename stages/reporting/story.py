"""What the report shows, read from the artifacts of a run; what a run did not make is absent.

Only the small files are read. Fetching a model as a whole would copy gigabytes of weights for one history file.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import TypeAdapter, ValidationError

from stages.artifacts.made_samples import Drawn, draw_samples
from stages.artifacts.manifests import read_file, read_manifest
from stages.artifacts.store import Store
from stages.config.closing import Approval, read_samples
from stages.config.errors import ConfigError, DamagedArtifactError, DataError
from stages.config.gate_records import gate_key
from stages.config.graph import GRAPH, Stage, language_models, spec_of_kind, trained_stages
from stages.config.records import first_error, parse_json, parse_record
from stages.config.request import ArtifactRef, Manifest, RunInfo
from stages.config.review import ReviewRecord, review_key
from stages.lineage.graph import Graph, ancestors
from stages.lineage.tags import is_model
from stages.reporting.shapes import EVALUATION, GATE, HISTORY_ROW, PROMOTION, Evaluated, GateFound, Promoted
from stages.reporting.sizes import size_of

logger = logging.getLogger(__name__)

_HISTORY = "history.jsonl"
_REBUILD = "Remove the artifact and clear the task of its stage to build it again."


@dataclass(frozen=True)
class ItemChange:
    """One item of a suite before and after alignment."""

    item: str
    before: float
    after: float
    response_before: str = ""
    response_after: str = ""


@dataclass(frozen=True)
class Story:
    """Records of one run, by role."""

    title: str
    run: RunInfo
    manifests: dict[str, Manifest]
    uris: dict[str, str]
    histories: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    evaluation: Evaluated = field(default_factory=Evaluated)
    samples: list[dict[str, Any]] = field(default_factory=list)
    promotion: Promoted | None = None
    gates: dict[str, GateFound] = field(default_factory=dict)
    """Outcomes by stage."""
    made: dict[str, Drawn] = field(default_factory=dict)
    """Examples of the data that stages of the run have made, by stage; their manifests are among `manifests`."""
    review: Approval | None = None
    """A person's answer about that data."""
    changed: str = ""
    """Role of the aligned model that `changes` are about."""
    changes: dict[str, list[ItemChange]] = field(default_factory=dict)
    """By suite the items that it and its start differ most on."""
    max_samples: int = 12
    lineage: Graph | None = None
    no_lineage: str = ""
    """Why there is no graph."""
    caution: str = ""
    """What to think of the models' sentences; empty for models that may be taken at their word."""

    def metrics_of(self, role: str) -> dict[str, float]:
        """What `evaluate` measured of a model."""
        return {key: value for key, value in self.evaluation.models.get(role, {}).items() if value is not None}


def read_story(
    inputs: Mapping[str, ArtifactRef], run: RunInfo, *, title: str, max_samples: int, store: Store | None = None
) -> Story:
    """Read what the report needs; every file of an artifact is checked against its manifest.

    `store` has the run's folder with what its gates found and a person answered; without one, the page has neither.
    """
    lineage, no_lineage = _whole_lineage(inputs)
    made = _made(inputs)
    inputs = {**made, **inputs}
    manifests = {role: read_manifest(ref) for role, ref in inputs.items()}

    def read(role: str, name: str, shape: TypeAdapter[Any]) -> Any:
        if role not in inputs or not _has(manifests[role], name):
            return None
        return _parsed(read_file(inputs[role], name), inputs[role], name, shape)

    return Story(
        title=title,
        run=run,
        manifests=manifests,
        uris={role: ref.uri for role, ref in inputs.items()},
        histories={
            spec.role: _history(inputs[spec.role], manifests[spec.role])
            for spec in trained_stages()
            if spec.role in inputs
        },
        evaluation=read("evaluation", "metrics.json", EVALUATION) or Evaluated(),
        samples=_samples(inputs, manifests),
        promotion=read("promotion", "promotion.json", PROMOTION),
        gates=read_gates(store, run.run_id) if store else {},
        made={name: draw_samples(ref, Stage(name), number=max_samples) for name, ref in made.items()},
        review=_review(store, run.run_id) if store else None,
        max_samples=max_samples,
        lineage=lineage,
        no_lineage=no_lineage,
        caution=_caution(manifests, lineage),
    )


def read_gates(store: Store, run_id: str) -> dict[str, GateFound]:
    """What the gates of a run found, by stage; a record that cannot be read is named in the log and left out."""
    found = {}
    for stage in GRAPH:
        key = gate_key(run_id, stage)
        where = f"{store.root_uri}/{key}"
        try:
            found[stage.value] = GATE.validate_python(parse_json(store.read_bytes(key), where))
        except FileNotFoundError:
            continue
        except (DataError, ValidationError) as error:  # others may write there, and the page is no gate
            reason = first_error(error) if isinstance(error, ValidationError) else error.message
            logger.warning("the report leaves out %s: %s", where, reason)
    return found


def _made(inputs: Mapping[str, ArtifactRef]) -> dict[str, ArtifactRef]:
    """What stages of the run have made for curation, by stage: the report's inputs do not name it, what was curated
    does. What is gone is named in the log and left out."""
    curated = next((ref for role, ref in inputs.items() if role == GRAPH[Stage.CURATE].role), None)
    found = {}
    for entry in read_manifest(curated).inputs if curated else ():
        spec = spec_of_kind(entry.kind)
        if spec is None or not spec.makes:
            continue
        try:
            read_manifest(entry.ref())
        except (ConfigError, DataError, DamagedArtifactError, FileNotFoundError) as error:
            logger.warning("the report leaves out what %s has made: %s", spec.stage.value, error)
            continue
        found[spec.stage.value] = entry.ref()
    return found


def _review(store: Store, run_id: str) -> Approval | None:
    """A person's answer about made data; None where none was asked, or the record cannot be read."""
    where = f"{store.root_uri}/{review_key(run_id)}"
    try:
        return parse_record(ReviewRecord, store.read_bytes(review_key(run_id)), where).answer
    except FileNotFoundError:
        return None
    except DataError as error:  # others may write there, and the page is no gate
        logger.warning("the report leaves out %s: %s", where, error.message)
        return None


def _caution(manifests: Mapping[str, Manifest], lineage: Graph | None) -> str:
    """By the size of the run's last language model, and of all pretraining behind it, other runs' included."""
    models = [manifests[spec.role] for spec in language_models() if spec.role in manifests]
    if not models:
        return ""
    known = {manifest.fingerprint for manifest in manifests.values()}
    before = [node for node in lineage.nodes if is_model(node.kind) and node.id not in known] if lineage else []
    return size_of(models[-1], [*manifests.values(), *(read_manifest(node.uri) for node in before)]).note()


def _samples(inputs: Mapping[str, ArtifactRef], manifests: Mapping[str, Manifest]) -> list[dict[str, Any]]:
    if "evaluation" not in inputs or not _has(manifests["evaluation"], "samples.json"):
        return []
    ref = inputs["evaluation"]
    return [sample.model_dump() for sample in read_samples(read_file(ref, "samples.json"), ref.uri)]


def _whole_lineage(inputs: Mapping[str, ArtifactRef]) -> tuple[Graph | None, str]:
    """The lineage of everything, whose roots are the artifacts that nothing else was made from; or why there is none.
    What a retry may mend is raised."""
    if not inputs:
        return None, ""
    try:
        graph = ancestors(ref.uri for ref in inputs.values())
    except (ConfigError, DataError, DamagedArtifactError) as error:  # an ancestor was removed, or its manifest changed
        logger.warning("the report has no lineage graph: %s", error.message)
        return None, error.message
    used = {edge.source for edge in graph.edges}
    return replace(graph, roots=tuple(root for root in graph.roots if root not in used)), ""


def _history(ref: ArtifactRef, manifest: Manifest) -> list[dict[str, Any]]:
    if not is_model(manifest.kind) or not _has(manifest, _HISTORY):
        return []
    return [_parsed(line, ref, _HISTORY, HISTORY_ROW) for line in read_file(ref, _HISTORY).splitlines()]


def _parsed(data: bytes, ref: ArtifactRef, name: str, shape: TypeAdapter[Any]) -> Any:
    """Return the content in the shape that the page shows."""
    where = f"{ref.uri}/{name}"
    found = parse_json(data, where, advice=_REBUILD)
    try:
        return shape.validate_python(found)
    except ValidationError as error:
        raise DataError(f"{where} cannot be read: {first_error(error)}", advice=_REBUILD) from None


def _has(manifest: Manifest, name: str) -> bool:
    return any(entry.path == name for entry in manifest.files)
