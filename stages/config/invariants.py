"""Exact invariants over what stages have recorded: manifests, ledgers and the first step of a training.

Pure rules, so that every one can be tested by breaking one number. What they are given has been read by
`stages.artifacts.evidence`; nothing here opens a store. What an artifact of an earlier version did not record makes a
check `skipped`, with the reason, and never `passed`.
"""

from collections.abc import Iterable, Mapping, Sequence

from stages.config.gate_evidence import DEFECT, REBUILD, Evidence
from stages.config.gate_ledgers import (
    by_constitution,
    curated,
    read_from_stages,
    recounted,
    synthetic,
    tokenized,
    trained_on,
)
from stages.config.gate_records import Check, compared, failed, passed, skipped
from stages.config.gate_start import initial_facts
from stages.config.gates import (
    BALANCED_LOW,
    CHANCE,
    EARLIER,
    GAIN,
    GAIN_HIGH,
    GAIN_LOW,
    MEASURED_BY_JOB,
    OVER_LENGTH_LOW,
    Bound,
    GatesConfig,
    closest,
    parse_bounds,
)
from stages.config.graph import GRAPH, Stage
from stages.config.request import ArtifactRef, Manifest


def recorded_checks(evidence: Evidence, expected: Mapping[str, ArtifactRef]) -> list[Check]:
    """Make every check about an artifact that needs no more than what is recorded; `expected` is what the run gave
    the stage, by role."""
    stage = evidence.manifest.stage
    checks = [*_inputs(evidence, expected)]
    match stage:
        case Stage.CONSTITUTION:
            checks += by_constitution(evidence.manifest)
        case Stage.SYNTHESIZE:
            checks += synthetic(evidence.manifest)
        case Stage.CURATE:
            checks += [*curated(evidence.manifest), *read_from_stages(evidence)]
        case Stage.TOKENIZE:
            checks += [*tokenized(evidence), *recounted(evidence), no_heldout_item_in_training()]
        case Stage.EVALUATE:
            checks += _evaluated(evidence)
        case _ if GRAPH[stage].trains:
            checks += [*_tokenizer(evidence), *trained_on(evidence), *initial_facts(evidence)]
            checks += guarded(evidence.manifest)
    return checks


def no_heldout_item_in_training() -> Check:
    """The place for it: items of held-out data and of benchmarks must not be in the training data."""
    return skipped("no_heldout_item_in_training", "not checked: training data is not yet compared with benchmarks")


def _inputs(evidence: Evidence, expected: Mapping[str, ArtifactRef]) -> Iterable[Check]:
    """What the stage read is what the run gave it, and still is what it was: reference, reward model, tokens."""
    for entry in evidence.manifest.inputs:
        name = f"input_{entry.role}"
        recorded = f"content {entry.digest[:12]}"
        wanted = expected.get(entry.role)
        if wanted is not None and wanted.digest != entry.digest:
            yield failed(
                name, f"made from {recorded}", f"the run's {entry.role} has content {wanted.digest[:12]}", REBUILD
            )
        elif entry.role in evidence.unreadable:
            yield failed(name, evidence.unreadable[entry.role], f"{entry.uri} with {recorded}", REBUILD)
        elif (now := evidence.inputs.get(entry.role)) is not None:
            yield compared(
                name, now.digest == entry.digest, f"content {now.digest[:12]}", f"as read: {recorded}", REBUILD
            )
    missing = [role for role in expected if role not in {entry.role for entry in evidence.manifest.inputs}]
    for role in missing:
        yield failed(f"input_{role}", "the artifact was made without it", f"the run gives {role}", REBUILD)


def guarded(manifest: Manifest) -> Iterable[Check]:
    """What guards of the training said. That one stopped it makes no gate red: its model is from before."""
    guards = manifest.ledger.get("guards")
    if not isinstance(guards, Mapping):
        return
    if stopped := guards.get("stopped"):
        made = manifest.ledger.get("steps")
        taken = manifest.ledger.get("model_step", made)
        yield passed("guards", f"stopped training after step {made}; the model is that of step {taken}: {stopped}")
    elif events := guards.get("events"):
        names = ", ".join(dict.fromkeys(str(event.get("guard")) for event in events))
        yield passed("guards", f"did not stop the training; warned: {names}")
    else:
        yield passed("guards", "neither warned nor stopped the training")


def _tokenizer(evidence: Evidence) -> Iterable[Check]:
    """The model's tokenizer and chat template are those that the data was encoded with, byte for byte."""
    tokens = evidence.inputs.get("tokens")
    if tokens is None:
        yield skipped("tokenizer", "its tokens are no input with a manifest")
        return
    mine = {entry.path: entry.sha256 for entry in evidence.manifest.files}
    prefix = "tokenizer/"
    theirs = {e.path.removeprefix(prefix): e.sha256 for e in tokens.files if e.path.startswith(prefix)}
    for name, sha256 in sorted(theirs.items()):
        what = "chat_template" if name.startswith("chat_template") else f"tokenizer_{name}"
        found = f"{name} {mine[name][:12]}" if name in mine else f"{name} is missing"
        yield compared(what, mine.get(name) == sha256, found, f"as in the tokens: {sha256[:12]}", REBUILD)


def _evaluated(evidence: Evidence) -> Iterable[Check]:
    """It measured every model that it was given, on the run's own held-out data, by the run's own reward model."""
    manifest, report = evidence.manifest, evidence.report or {}
    refs = {entry.role: entry for entry in manifest.inputs}
    models = report.get("models")
    wanted = [spec.role for spec in GRAPH.values() if spec.is_language_model and spec.role in refs]
    if not isinstance(models, Mapping):
        yield failed("models", "metrics.json names no models", f"all of {', '.join(wanted)}", DEFECT)
        return
    empty = [role for role in wanted if not models.get(role)]
    yield compared(
        "models",
        not empty,
        f"{len(wanted) - len(empty)} of {len(wanted)} models measured" + (f", not {', '.join(empty)}" * bool(empty)),
        f"all of {', '.join(wanted)}",
        "Its log says why; clear evaluate to measure again.",
    )
    data = report.get("data")
    digest = data.get("digest") if isinstance(data, Mapping) else None
    if "tokens" in refs and digest:
        same = digest == refs["tokens"].digest
        yield compared(
            "heldout_data", same, f"content {str(digest)[:12]}", f"the run's {refs['tokens'].digest[:12]}", DEFECT
        )
    judge = report.get("reward_fingerprint")
    if (scorer := refs.get(GRAPH[Stage.REWARD].role)) is not None:
        same = judge == scorer.fingerprint
        yield compared("scorer", same, f"{str(judge)[:12]}", f"the run's {scorer.fingerprint[:12]}", DEFECT)


def bound_checks(
    bounds: Sequence[str], metrics: Mapping[str, float], unmeasured: Mapping[str, str], *, no_job: str = ""
) -> list[Check]:
    """Compare metrics with the run's bounds. What could not be measured does not keep its bound; `no_job` says why no
    job was asked for the metrics that only a job measures."""
    return [_bound_check(bound, metrics, unmeasured, no_job) for bound in parse_bounds(bounds)]


def earlier_checks(metrics: Mapping[str, float], gates: GatesConfig) -> list[Check]:
    """Whether a reward model is not clearly worse than the one before it; no check where there is none to compare."""
    if GAIN not in metrics:
        return []
    gain, low, high, allowed = metrics[GAIN], metrics[GAIN_LOW], metrics[GAIN_HIGH], gates.earlier_margin
    found = f"accuracy {gain:+.4f} [{low:+.4f}, {high:+.4f}] against {metrics[EARLIER]:.4f} of the earlier reward model"
    return [
        compared(
            "earlier_reward_model",
            gain >= -allowed or high >= 0,
            found,
            f"at least {-allowed:+.4f}, or an interval that is not below 0",
            "Look at what the new preference data teaches (accuracy by source), add it to the earlier data, or raise "
            "gates.earlier_margin.",
        )
    ]


def _bound_check(bound: Bound, metrics: Mapping[str, float], unmeasured: Mapping[str, str], no_job: str) -> Check:
    name, allowed = bound.metric, f"{bound.sign} {bound.number:g}"
    if name in metrics:
        advice = f"Change data or settings of {bound.stage.value}, or the bound in gates.bounds; {_passed_by(bound)}"
        return compared(name, bound.allows(metrics[name]), f"{metrics[name]:.6g}", allowed, advice)
    if no_job and name.startswith(MEASURED_BY_JOB):
        return skipped(name, f"not measured: {no_job}")
    if name not in unmeasured:
        known = {**metrics, **dict.fromkeys(unmeasured, 0.0)}
        advice = f"Correct the name in gates.bounds. {closest(name, known)}"
        return failed(name, f"{bound.stage.value} has no such metric", allowed, advice)
    why = f"not measured: {unmeasured[name]}"
    advice = (
        "Bring more held-out preference pairs (curate.heldout_fraction, curate.max_heldout_pairs), of which some have "
        f"the shorter answer chosen, or change or leave out the bound in gates.bounds; {_passed_by(bound)}"
    )
    if name == BALANCED_LOW and bound.sign in (">", ">=") and bound.number <= CHANCE and OVER_LENGTH_LOW in metrics:
        # With few pairs on one side, that it is more than length is asked of all pairs together.
        value = metrics[OVER_LENGTH_LOW]
        found = f"{OVER_LENGTH_LOW} is {value:.6g}; {why}"
        return compared(name, value > 0, found, f"{OVER_LENGTH_LOW} > 0 in its place", advice)
    return failed(name, why, allowed, advice)


def _passed_by(bound: Bound) -> str:
    return f"a person may let it pass with override_gates={bound.stage.value} and a reason."
