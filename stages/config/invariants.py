"""Exact invariants over what stages have recorded: manifests, ledgers and the first step of a training.

Pure rules, so that every one can be tested by breaking one number. What they are given has been read by
`stages.artifacts.evidence`; nothing here opens a store. What an artifact of an earlier version did not record makes a
check `skipped`, with the reason, and never `passed`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stages.config.gate_records import Check, compared, failed, skipped
from stages.config.graph import BASE_MODEL, GRAPH, REWARD_BASE, Stage
from stages.config.request import ArtifactRef, Manifest

_DEFECT = "This is a defect, not a matter of settings: keep the artifact and report it."
_REBUILD = "Clear the stage that made it, which builds it again, and see who may write to the store."
_EXACT = "float32"
"""Number format in which initial losses and ratios are exact but for the last digits."""


@dataclass(frozen=True)
class Evidence:
    """What is recorded about an artifact and about what it was made from."""

    manifest: Manifest
    inputs: Mapping[str, Manifest] = field(default_factory=dict)
    """By role: the manifests that lie now where the artifact's own manifest says that its inputs were."""
    unreadable: Mapping[str, str] = field(default_factory=dict)
    """By role: why there is no manifest any more that could be believed."""
    first_row: Mapping[str, Any] | None = None
    """Metrics of the first step, for a training."""
    report: Mapping[str, Any] | None = None
    """metrics.json of an evaluation."""
    meta: Mapping[str, Any] | None = None
    """meta.json of tokens."""


def recorded_checks(evidence: Evidence, expected: Mapping[str, ArtifactRef]) -> list[Check]:
    """Make every check about an artifact that needs no more than what is recorded; `expected` is what the run gave
    the stage, by role."""
    stage = evidence.manifest.stage
    checks = [*_inputs(evidence, expected)]
    match stage:
        case Stage.CURATE:
            checks += _curated(evidence.manifest)
        case Stage.TOKENIZE:
            checks += [*_tokenized(evidence), *_recounted(evidence), no_heldout_item_in_training()]
        case Stage.EVALUATE:
            checks += _evaluated(evidence)
        case _ if GRAPH[stage].trains:
            checks += [*_tokenizer(evidence), *_trained_on(evidence), *_start(evidence)]
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
                name, f"made from {recorded}", f"the run's {entry.role} has content {wanted.digest[:12]}", _REBUILD
            )
        elif entry.role in evidence.unreadable:
            yield failed(name, evidence.unreadable[entry.role], f"{entry.uri} with {recorded}", _REBUILD)
        elif (now := evidence.inputs.get(entry.role)) is not None:
            yield compared(
                name, now.digest == entry.digest, f"content {now.digest[:12]}", f"as read: {recorded}", _REBUILD
            )
    missing = [role for role in expected if role not in {entry.role for entry in evidence.manifest.inputs}]
    for role in missing:
        yield failed(f"input_{role}", "the artifact was made without it", f"the run gives {role}", _REBUILD)


# Ledgers.


def _equal(name: str, found: Any, allowed: Any, *, found_is: str, allowed_is: str) -> Check:
    """Compare two counts, which must be one number."""
    if found is None or allowed is None:
        missing = found_is if found is None else allowed_is
        return skipped(name, f"{missing}: not recorded by the version that built it")
    return compared(name, found == allowed, f"{found:,} ({found_is})", f"{allowed:,} ({allowed_is})", _DEFECT)


def _at(tree: Any, *path: str) -> Any:
    """A number in a ledger, None where there is none."""
    for name in path:
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree if isinstance(tree, int | float) and not isinstance(tree, bool) else None


def _curated(manifest: Manifest) -> Iterable[Check]:
    documents = manifest.ledger.get("documents", {})
    steps = documents.get("steps", []) if isinstance(documents, Mapping) else []
    if not steps:
        yield skipped("ledger_documents", "no account of its steps was recorded")
        return
    before: Any = None
    for step in steps:
        lost = sum(_at(amount, "documents") or 0 for amount in step.get("dropped", {}).values())
        kept = _at(step, "kept", "documents")
        if before is not None and before != _at(step, "in", "documents"):
            yield _equal(
                "ledger_documents",
                _at(step, "in", "documents"),
                before,
                found_is=f"into {step.get('step')}",
                allowed_is="out of the step before",
            )
            return
        if kept is None or kept + lost != _at(step, "in", "documents"):
            yield _equal(
                "ledger_documents",
                (kept or 0) + lost,
                _at(step, "in", "documents"),
                found_is=f"kept or dropped by {step.get('step')}",
                allowed_is="came in",
            )
            return
        before = kept
    carried = _at(manifest.ledger, "carried", "documents/heldout", "documents") or 0
    published = [_at(documents, "published", split, "documents") for split in ("train", "heldout")]
    yield _equal(
        "ledger_documents",
        None if None in published else sum(published) - carried,
        before,
        found_is="documents published, without those taken over",
        allowed_is="kept by the last step",
    )


def _tokenized(evidence: Evidence) -> Iterable[Check]:
    """What curate published is what tokenize counts in, and every row and token is kept or dropped."""
    curated = evidence.inputs.get("curated")
    for split in ("train", "heldout"):
        mine = evidence.manifest.ledger.get(split, {})
        for unit in ("documents", "bytes"):
            yield _equal(
                f"ledger_{split}_{unit}",
                _at(mine, "documents", unit),
                _at(curated.ledger if curated else {}, "documents", "published", split, unit),
                found_is=f"{split} {unit} tokenized",
                allowed_is="published by curate",
            )
        for part, theirs in (("conversations", "instructions"), ("preferences", "preferences")):
            yield _equal(
                f"ledger_{split}_{part}",
                _at(mine, part, "in"),
                _at(curated.ledger if curated else {}, "published_pairs", f"{theirs}/{split}"),
                found_is=f"{split} {part} that came in",
                allowed_is="published by curate",
            )
            yield from _conserves(f"{split}_{part}", mine.get(part))


def _conserves(name: str, account: Any) -> Iterable[Check]:
    """in = kept + dropped by reason; tokens in = trained + masked + dropped."""
    if not isinstance(account, Mapping):
        yield skipped(f"conserves_{name}", "no account was recorded")
        return
    rows = account.get("kept", 0) + sum(n for key, n in account.items() if key.startswith("dropped."))
    tokens = account.get("target_tokens", 0) + account.get("masked_tokens", 0)
    tokens += sum(n for key, n in account.items() if key.startswith("dropped_tokens."))
    yield _equal(f"conserves_{name}_rows", rows, account.get("in"), found_is="kept or dropped", allowed_is="came in")
    yield _equal(
        f"conserves_{name}_tokens",
        tokens,
        account.get("tokens_in"),
        found_is="tokens trained, masked or dropped",
        allowed_is="came in",
    )


def _recounted(evidence: Evidence) -> Iterable[Check]:
    """The published files hold as many documents, rows and tokens as the ledger says.

    Counted by the sizes of the arrays, whose headers (128 bytes) and items have a fixed size.
    """
    sizes = {entry.path: entry.size for entry in evidence.manifest.files}
    width = {"uint16": 2, "uint32": 4}.get(str((evidence.meta or {}).get("dtype")))
    if width is None:
        yield skipped("files", "meta.json does not name the width of a token")
        return
    for split in ("train", "heldout"):
        mine = evidence.manifest.ledger.get(split, {})
        counted = {
            "documents": (_items(sizes, f"documents/{split}/bytes.npy", 8), _at(mine, "documents", "documents")),
            "tokens": (_tokens(sizes, f"documents/{split}/tokens-", width), _at(mine, "documents", "tokens")),
            "conversations": (
                _rows(sizes, f"conversations/{split}/ids-offsets.npy"),
                _at(mine, "conversations", "kept"),
            ),
            "preferences": (
                _rows(sizes, f"preferences/{split}/chosen-ids-offsets.npy"),
                _at(mine, "preferences", "kept"),
            ),
        }
        for what, (found, allowed) in counted.items():
            yield _equal(f"files_{split}_{what}", found, allowed, found_is="in the files", allowed_is="in the ledger")


def _items(sizes: Mapping[str, int], path: str, width: int) -> int | None:
    return (sizes[path] - 128) // width if path in sizes else None


def _rows(sizes: Mapping[str, int], path: str) -> int | None:
    """Offsets are one more than rows."""
    found = _items(sizes, path, 8)
    return None if found is None else found - 1


def _tokens(sizes: Mapping[str, int], prefix: str, width: int) -> int | None:
    shards = [path for path in sizes if path.startswith(prefix) and not path.endswith("offsets.npy")]
    return sum(_items(sizes, path, width) or 0 for path in shards) if shards else None


def _trained_on(evidence: Evidence) -> Iterable[Check]:
    """What a training found in the tokens is what tokenize published."""
    tokens = evidence.inputs.get("tokens")
    if tokens is None:
        yield skipped("ledger_tokens", "its tokens are no input with a manifest")
        return
    train, mine = tokens.ledger.get("train", {}), evidence.manifest.ledger
    found = {
        "tokens_available": _at(train, "documents", "tokens"),
        "conversations": _at(train, "conversations", "kept"),
        "pairs": _at(train, "preferences", "kept"),
        "prompts": _at(train, "prompts", "kept"),
    }
    for name, published in found.items():
        if name in mine:
            yield _equal(
                f"ledger_{name}", mine[name], published or 0, found_is="found by training", allowed_is="published"
            )
    length = tokens.config.get("sequence_length")
    if "rows_trained" in mine and isinstance(length, int):
        yield _equal(
            "ledger_tokens_trained",
            mine.get("tokens_trained"),
            mine["rows_trained"] * length,
            found_is="tokens trained",
            allowed_is=f"{mine['rows_trained']:,} rows of {length:,}",
        )


# Tokenizer and chat template.


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
        yield compared(what, mine.get(name) == sha256, found, f"as in the tokens: {sha256[:12]}", _REBUILD)


# The first step of a training.


def _start(evidence: Evidence) -> Iterable[Check]:
    """Facts that hold before anything is learned: ln V, ln 2, ratio 1."""
    row, manifest = evidence.first_row, evidence.manifest
    name = "initial_ratio" if manifest.stage is Stage.PPO else "initial_loss"
    if manifest.stage not in (Stage.PRETRAIN, Stage.PPO, Stage.DPO) and not GRAPH[manifest.stage].scores:
        return
    if row is None or row.get("step") != 1:
        first = "it has no history" if row is None else f"its history begins with step {row.get('step')}"
        yield skipped(name, f"{first}; earlier versions logged the first step only with log_every=1")
        return
    exact = manifest.execution.get("compute_dtype") == _EXACT
    if manifest.stage is Stage.PRETRAIN:
        yield _uniform(evidence, row)
    elif manifest.stage is Stage.PPO:
        yield from _ratio(row, exact=exact)
    elif GRAPH[manifest.stage].scores:
        yield _even_scores(evidence, row, exact=exact)
    else:
        kind = manifest.config.get("loss", {}).get("kind", "sigmoid")
        if kind == "sigmoid":
            yield _even("initial_loss", row, exact=exact)
        else:
            yield skipped("initial_loss", f"loss {kind} has no known value at its start")


def _reads(manifest: Manifest, role: str) -> bool:
    return role in {entry.role for entry in (*manifest.inputs, *manifest.sources)}


def _loss(row: Mapping[str, Any]) -> float | None:
    found = row.get("train/loss")
    return float(found) if isinstance(found, int | float) else None


def _uniform(evidence: Evidence, row: Mapping[str, Any]) -> Check:
    """A new model knows nothing: its loss is ln V plus half the variance of its logits, up to sampling."""
    manifest, tokens, loss = evidence.manifest, evidence.inputs.get("tokens"), _loss(row)
    if _reads(manifest, BASE_MODEL):
        return skipped("initial_loss", "the model goes on from a given one")
    size = _at(tokens.metrics if tokens else {}, "tokens/vocab_size")
    if loss is None or not size:
        return skipped("initial_loss", "vocabulary or loss was not recorded")
    model = manifest.config.get("model", {})
    # Hidden states leave the last norm with a mean square of 1 in each dimension.
    spread = float(model.get("initializer_range", 0.02)) * math.sqrt(float(model.get("hidden_size", 1)))
    loss -= float(row.get("train/z_loss", 0.0))
    center, tolerance = math.log(size) + spread**2 / 2, 0.02 + spread / 2
    return compared(
        "initial_loss",
        abs(loss - center) <= tolerance,
        f"{loss:.4f} in the first step",
        f"{center:.4f} ± {tolerance:.4f}, of which ln({size:,.0f}) = {math.log(size):.4f}",
        "Labels, loss mask or initial weights are not what they should be. " + _DEFECT,
    )


def _even(name: str, row: Mapping[str, Any], *, exact: bool) -> Check:
    """Equal scores, or a policy that still is its reference: ln 2 a pair."""
    loss, tolerance = _loss(row), 1e-4 if exact else 2e-2
    if loss is None:
        return skipped(name, "no loss was recorded")
    return compared(
        name,
        abs(loss - math.log(2)) <= tolerance,
        f"{loss:.6f} in the first step",
        f"ln 2 = {math.log(2):.6f} ± {tolerance:g}",
        "The reference is not the model that training started from, or scores do not start at zero. " + _DEFECT,
    )


def _even_scores(evidence: Evidence, row: Mapping[str, Any], *, exact: bool) -> Check:
    if _reads(evidence.manifest, REWARD_BASE):
        return skipped("initial_loss", "it starts from a given reward base, which may bring a head that is not zero")
    return _even("initial_loss", row, exact=exact)


def _ratio(row: Mapping[str, Any], *, exact: bool) -> Iterable[Check]:
    """The first minibatch is judged by the very policy that sampled it."""
    allowed = {"ppo/approx_kl": 1e-6 if exact else 1e-3, "ppo/clip_fraction": 0.0 if exact else 0.01}
    for metric, tolerance in allowed.items():
        name, found = f"initial_{metric.removeprefix('ppo/')}", row.get(metric)
        if not isinstance(found, int | float):
            yield skipped(name, f"{metric} was not recorded")
            continue
        yield compared(
            name,
            abs(found) <= tolerance,
            f"{found:g} in the first minibatch",
            f"0 ± {tolerance:g}, because the ratio is 1",
            "Rollout and training do not compute the same log-probabilities: temperature, packing or number format "
            "differ. " + _DEFECT,
        )


# An evaluation.


def _evaluated(evidence: Evidence) -> Iterable[Check]:
    """It measured every model that it was given, on the run's own held-out data, by the run's own reward model."""
    manifest, report = evidence.manifest, evidence.report or {}
    refs = {entry.role: entry for entry in manifest.inputs}
    models = report.get("models")
    wanted = [spec.role for spec in GRAPH.values() if spec.is_language_model and spec.role in refs]
    if not isinstance(models, Mapping):
        yield failed("models", "metrics.json names no models", f"all of {', '.join(wanted)}", _DEFECT)
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
            "heldout_data", same, f"content {str(digest)[:12]}", f"the run's {refs['tokens'].digest[:12]}", _DEFECT
        )
    judge = report.get("reward_fingerprint")
    if "reward" in refs:
        same = judge == refs["reward"].fingerprint
        yield compared("scorer", same, f"{str(judge)[:12]}", f"the run's {refs['reward'].fingerprint[:12]}", _DEFECT)


def bound_checks(bounds: Sequence[str], metrics: Mapping[str, float], unmeasured: Mapping[str, str]) -> list[Check]:
    """Compare metrics with the run's bounds."""
    from stages.config.gates import closest, parse_bounds

    checks = []
    for bound in parse_bounds(bounds):
        if bound.metric in metrics:
            value = metrics[bound.metric]
            checks.append(
                compared(
                    bound.metric,
                    bound.allows(value),
                    f"{value:.6g}",
                    f"{bound.sign} {bound.number:g}",
                    f"Change data or settings of {bound.stage.value}, or the bound in gates.bounds; a person may let "
                    f"it pass with override_gates={bound.stage.value} and a reason.",
                )
            )
        elif bound.metric in unmeasured:
            checks.append(skipped(bound.metric, f"not measured: {unmeasured[bound.metric]}"))
        else:
            checks.append(
                failed(
                    bound.metric,
                    f"{bound.stage.value} has no such metric",
                    f"{bound.sign} {bound.number:g}",
                    f"Correct the name in gates.bounds. {closest(bound.metric, metrics)}",
                )
            )
    return checks
