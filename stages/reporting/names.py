"""What the models of a run are called: by their stage, `Given model` where the run was given one, `Champion`."""

from collections.abc import Iterable

from stages.config.evaluation import CHAMPION_ROLE
from stages.config.graph import BASE_MODEL, GRAPH, aligned_models, language_models, trained_stages
from stages.config.request import Manifest
from stages.reporting.story import Story

_GIVEN = "Given model"


def label_of(role: str) -> str:
    """The name of a stage's model, empty when no stage of this version makes it."""
    return next((spec.label for spec in trained_stages() if spec.role == role), "")


def name_of(role: str, story: Story) -> str:
    """The model's name in tables; a base that the run was given, and did not train, is called so."""
    if role == CHAMPION_ROLE:
        champion = story.evaluation.champion
        return f"Champion (version {champion.version})" if champion and champion.version else "Champion"
    if role == first_role() and role not in story.manifests:
        return _GIVEN
    return label_of(role) or role


def in_order(roles: Iterable[str]) -> list[str]:
    """Roles in the order of the pipeline, the champion behind the models of the run, others last."""
    place = {spec.role: position for position, spec in enumerate(trained_stages())}
    place[CHAMPION_ROLE] = len(place)
    return sorted(roles, key=lambda role: (place.get(role, len(place)), role))


def first_role() -> str:
    """Role of the model that stands at the beginning of a run, trained or given."""
    return next(iter(language_models())).role


def start_of(role: str, story: Story) -> str:
    """Role under which the model that this one started from was measured; empty when it was not, or for the first.

    A run may enter at any stage. Then the given model has the place of the one that the stage would have started from.
    """
    manifest = story.manifests.get(role)
    if manifest is None:
        return ""
    inputs = {entry.role: entry.fingerprint for entry in manifest.inputs}
    if "model" in inputs:
        made_here = {found.fingerprint: known for known, found in story.manifests.items()}
        if (before := made_here.get(inputs["model"])) is not None:
            return before
    if "model" in inputs or BASE_MODEL in inputs or _given(manifest):
        return first_role() if first_role() != role and first_role() not in story.manifests else ""
    return ""


def _given(manifest: Manifest) -> bool:
    return any(source.role == BASE_MODEL for source in manifest.sources)


def start_name(role: str, story: Story) -> str:
    """`SFT`, `the given model`: as it stands in a sentence."""
    before = start_of(role, story)
    if before:
        name = name_of(before, story)
        return "the given model" if name == _GIVEN else name
    manifest = story.manifests.get(role)
    if manifest is None:  # of an older record; PPO and DPO then always started from what the graph says
        spec = next((spec for spec in aligned_models() if spec.role == role), None)
        return GRAPH[dict(spec.inputs)["model"]].label if spec else "its start"
    return "the given model"
