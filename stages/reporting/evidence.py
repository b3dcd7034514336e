"""What there is to say about one model: what it was made from, how it was judged, and how to make it again.

All of it is read from the store. What cannot be read is named in the log and left out of the card: a card tells of a
model, and the model is still there when an old evaluation is not.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from stages.artifacts.addresses import split_artifact_uri
from stages.artifacts.manifests import MANIFEST, load_manifest, read_file, read_manifest
from stages.artifacts.store import Store
from stages.config.errors import DamagedArtifactError, StageError
from stages.config.graph import GRAPH, Stage, spec_of_kind
from stages.config.records import first_error, parse_object
from stages.config.request import ArtifactRef, Manifest
from stages.lineage.graph import ancestors
from stages.reporting.licences import licences_of
from stages.reporting.shapes import EVALUATION, PROMOTION, Evaluated, GateFound, Promoted
from stages.reporting.story import read_gates

logger = logging.getLogger(__name__)

_PARAMS = "params.json"


@dataclass(frozen=True)
class Evidence:
    """Records about one model."""

    family: tuple[Manifest, ...]
    """The model's manifest last, before it those of everything that it was made from, in the order of the pipeline."""
    missing: str = ""
    """Why `family` is not complete; empty when it is."""
    evaluation: Manifest | None = None
    """The newest evaluation that measured exactly this model in the role that it was made for; later runs measure it
    as their champion or as the model that they start from, and that counts only where there is no other."""
    judged: Evaluated = field(default_factory=Evaluated)
    promotion: Promoted | None = None
    gates: Mapping[str, GateFound] = field(default_factory=dict)
    """By stage: of the model, of what it was made from, and of its evaluation."""
    params: Mapping[str, Any] = field(default_factory=dict)
    """The form of the run that made the model; empty when the run's folder is gone."""
    licences: Mapping[str, str] = field(default_factory=dict)
    """By URI of the source, where it states one."""

    @property
    def model(self) -> Manifest:
        return self.family[-1]

    @property
    def own_role(self) -> str:
        """The role that the model was made for; empty for what no stage makes."""
        return _own_role(self.model)

    @property
    def role(self) -> str:
        """Under which the evaluation measured the model, its own one first; empty when it did not."""
        roles = _roles_of(self.model, self.evaluation) if self.evaluation else []
        return self.own_role if self.own_role in roles else next(iter(roles), "")


def evidence_of(
    ref: ArtifactRef, *, evaluation: ArtifactRef | None = None, promotion: Promoted | None = None, run_id: str = ""
) -> Evidence:
    """Gather what is known of a model.

    Given are what a run that has not ended yet knows better than the store: its evaluation, its decision and its id.
    Otherwise the newest evaluation and promotion of the model's store count, and the run that built it.
    """
    store, _ = split_artifact_uri(ref.uri)
    model = read_manifest(ref)
    family, missing = family_of(ref.uri, model)
    evaluation = evaluation or _newest(store, Stage.EVALUATE, model)
    # A decision is about the models of its run, never about the champion that they were compared with.
    decided = None if promotion is not None else _newest(store, Stage.PROMOTE, model, in_other_roles=False)
    measured = _quietly(lambda: read_manifest(evaluation)) if evaluation else None
    run_id = run_id or str(model.execution.get("run_id", ""))
    return Evidence(
        family=tuple(family),
        missing=missing,
        evaluation=measured,
        judged=_record(evaluation, "metrics.json", EVALUATION) or Evaluated(),
        promotion=promotion or _record(decided, "promotion.json", PROMOTION),
        gates=_gates(store, [*family, *([measured] if measured else [])], run_id),
        params=_params(store, run_id),
        licences=licences_of(
            (source for manifest in family for source in manifest.sources),
            packages={str(name) for manifest in family for name in manifest.config.get("packages") or ()},
        ),
    )


def family_of(uri: str, model: Manifest) -> tuple[list[Manifest], str]:
    """The manifests of the model and of what it was made from; or its own alone, and why."""
    try:
        graph = ancestors([uri])
        family = [read_manifest(node.uri) for node in graph.nodes if node.stage and node.id != model.fingerprint]
    except StageError as error:
        logger.warning("the card has no full lineage: %s", error.message)
        # the message may hold addresses, which strangers need not know
        return [model], "what the model was made from is not in the store any more"
    return [*family, model], ""


def _own_role(model: Manifest) -> str:
    spec = spec_of_kind(model.kind)
    return spec.role if spec else ""


def _roles_of(model: Manifest, closing: Manifest) -> list[str]:
    """The roles in which an artifact of a closing stage had exactly this model as an input."""
    return [entry.role for entry in closing.inputs if entry.digest == model.digest]


def _newest(store: Store, stage: Stage, model: Manifest, *, in_other_roles: bool = True) -> ArtifactRef | None:
    """The newest artifact of a closing stage that had exactly this model as an input: in its own role, or else in
    another one."""
    kind = GRAPH[stage].kind
    keys = [key for key in store.list(f"artifacts/{kind}") if key.endswith(f"/{MANIFEST}") and key.count("/") == 3]
    own_role = _own_role(model)
    found: list[tuple[bool, str, ArtifactRef]] = []
    for key in keys:
        try:
            manifest = load_manifest(store, key.removesuffix(f"/{MANIFEST}"))
        except (DamagedArtifactError, FileNotFoundError) as error:
            logger.warning("%s is left out of the card: %s", kind, error)
            continue
        roles = _roles_of(model, manifest)
        if own_role in roles or (roles and in_other_roles):
            ref = manifest.ref(f"{store.root_uri}/{key.removesuffix(f'/{MANIFEST}')}")
            found.append((own_role in roles, manifest.created_at, ref))
    return max(found, key=lambda one: one[:2])[2] if found else None


def _record(ref: ArtifactRef | None, name: str, shape: TypeAdapter[Any]) -> Any:
    if ref is None:
        return None

    def read() -> Any:
        return shape.validate_python(parse_object(read_file(ref, name), f"{ref.uri}/{name}"))

    return _quietly(read)


def _quietly(read: Any) -> Any:
    try:
        return read()
    except (StageError, FileNotFoundError) as error:
        logger.warning("left out of the card: %s", error)
    except ValidationError as error:
        logger.warning("left out of the card, which cannot show it: %s", first_error(error))
    return None


def _gates(store: Store, made: list[Manifest], run_id: str) -> dict[str, GateFound]:
    """The gates that looked at exactly these artifacts: in the run that asks, and in those that built them."""
    found: dict[str, GateFound] = {}
    runs = dict.fromkeys([run_id, *(str(manifest.execution.get("run_id", "")) for manifest in reversed(made))])
    read = {run: read_gates(store, run) for run in filter(None, runs)}
    for manifest in made:
        stage = manifest.stage.value
        records = (gates[stage] for gates in read.values() if stage in gates)
        gate = next((one for one in records if one.artifact and one.artifact.digest == manifest.digest), None)
        if gate is not None:
            found[stage] = gate
    return found


def _params(store: Store, run_id: str) -> dict[str, Any]:
    if not run_id:
        return {}
    key = f"runs/{run_id}/{_PARAMS}"
    try:
        return parse_object(store.read_bytes(key), f"{store.root_uri}/{key}")
    except FileNotFoundError:  # garbage collection removes the folders of old runs
        return {}
    except StageError as error:
        logger.warning("the card does not say how the run was started: %s", error.message)
        return {}
