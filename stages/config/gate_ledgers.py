"""The ledgers conserve: in a stage, from stage to stage, and against the published files.

What one stage publishes is what the next one counts in; in = kept + dropped by reason; tokens in = trained + masked +
dropped.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from stages.config.gate_evidence import DEFECT, Evidence
from stages.config.gate_records import Check, compared, failed, skipped
from stages.config.graph import DOCUMENTS, GRAPH, INSTRUCTIONS, PREFERENCES, PROMPTS, StageSpec
from stages.config.request import Manifest
from stages.config.rollouts import PROMPT_FIELDS
from stages.config.selection import learns_from_scores


def _equal(name: str, found: Any, allowed: Any, *, found_is: str, allowed_is: str, is_older: bool = False) -> Check:
    """Compare two counts, which must be one number. A number that is not there fails where the other one says that
    something should be; only with an artifact that `is_older` than this code it is skipped."""
    if found is None or allowed is None:
        missing, other = (found_is, allowed) if found is None else (allowed_is, found)
        if is_older or not other:
            return skipped(name, f"{missing}: not recorded by the version that built it")
        return failed(
            name,
            f"no number ({found_is})" if found is None else f"{found:,} ({found_is})",
            f"no number ({allowed_is})" if allowed is None else f"{allowed:,} ({allowed_is})",
            DEFECT,
        )
    return compared(name, found == allowed, f"{found:,} ({found_is})", f"{allowed:,} ({allowed_is})", DEFECT)


def _is_older(*manifests: Manifest | None) -> bool:
    """Whether a version of a stage before today's made one of them."""
    return any(made is None or made.version < GRAPH[made.stage].version for made in manifests)


def number_at(tree: Any, *path: str) -> Any:
    """A number in a ledger, None where there is none."""
    for name in path:
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree if isinstance(tree, int | float) and not isinstance(tree, bool) else None


def curated(manifest: Manifest) -> Iterable[Check]:
    documents = manifest.ledger.get("documents", {})
    steps = documents.get("steps", []) if isinstance(documents, Mapping) else []
    if not steps:
        yield skipped("ledger_documents", "no account of its steps was recorded")
        return
    before: Any = None
    for step in steps:
        lost = sum(number_at(amount, "documents") or 0 for amount in step.get("dropped", {}).values())
        kept = number_at(step, "kept", "documents")
        if before is not None and before != number_at(step, "in", "documents"):
            yield _equal(
                "ledger_documents",
                number_at(step, "in", "documents"),
                before,
                found_is=f"into {step.get('step')}",
                allowed_is="out of the step before",
            )
            return
        if kept is None or kept + lost != number_at(step, "in", "documents"):
            yield _equal(
                "ledger_documents",
                (kept or 0) + lost,
                number_at(step, "in", "documents"),
                found_is=f"kept or dropped by {step.get('step')}",
                allowed_is="came in",
            )
            return
        before = kept
    carried = number_at(manifest.ledger, "carried", "documents/heldout", "documents") or 0
    published = [number_at(documents, "published", split, "documents") for split in ("train", "heldout")]
    yield _equal(
        "ledger_documents",
        None if None in published else sum(published) - carried,
        before,
        found_is="documents published, without those taken over",
        allowed_is="kept by the last step",
        is_older=_is_older(manifest),
    )


def by_constitution(manifest: Manifest) -> Iterable[Check]:
    """Every prompt, revision and comparison is kept or dropped, and what was kept is what was published."""
    ledger = manifest.ledger
    for step in ("prompts", "responses", "rounds", "comparisons"):
        yield _step_conserves(ledger, step)
    revised, labelled = number_at(ledger, "responses", "kept") or 0, number_at(ledger, "comparisons", "kept") or 0
    for field, expected in ((INSTRUCTIONS, revised), (PREFERENCES, revised + labelled)):
        if (published := number_at(ledger, "published", field)) is not None:
            yield _equal(
                f"ledger_{field}", published, expected, found_is="published", allowed_is="revised responses and labels"
            )


def synthetic(manifest: Manifest) -> Iterable[Check]:
    """Every seed, instruction, input, response and row is kept or dropped, and what was kept is what was published."""
    ledger = manifest.ledger
    # A method without a step has no count of it; rows it always has.
    for step in ("sources", "instructions", "inputs", "responses"):
        if step in ledger:
            yield _step_conserves(ledger, step)
    yield _step_conserves(ledger, "rows")
    yield _equal(
        f"ledger_{INSTRUCTIONS}",
        number_at(ledger, "published", INSTRUCTIONS),
        number_at(ledger, "rows", "kept"),
        found_is="published",
        allowed_is="rows kept",
    )


def _step_conserves(ledger: Mapping[str, Any], step: str) -> Check:
    dropped = ledger.get(step, {}).get("dropped", {}) if isinstance(ledger.get(step), Mapping) else {}
    kept = number_at(ledger, step, "kept")
    return _equal(
        f"ledger_{step}",
        None if kept is None else kept + sum(number_at(dropped, reason) or 0 for reason in dropped),
        number_at(ledger, step, "in"),
        found_is="kept or dropped",
        allowed_is="came in",
    )


def read_from_stages(evidence: Evidence) -> Iterable[Check]:
    """What a stage of the run has made for curation is what curation counts in from it."""
    makers = {role: source for role, source in GRAPH[evidence.manifest.stage].inputs if GRAPH[source].makes}
    for role, source in makers.items():
        made = evidence.inputs.get(role)
        for field in GRAPH[source].makes if made is not None else ():
            assert made is not None
            if (published := number_at(made.ledger, "published", field)) is None:
                continue
            yield _equal(
                f"ledger_{field}_{role}",
                number_at(evidence.manifest.ledger, field, "sources", role, "in"),
                published,
                found_is="rows read",
                allowed_is=f"published by {source.value}",
            )


def tokenized(evidence: Evidence) -> Iterable[Check]:
    """What curate published is what tokenize counts in, and every row and token is kept or dropped."""
    curated = evidence.inputs.get("curated")
    published = curated.ledger if curated else {}
    is_older = _is_older(evidence.manifest, curated)
    for split in ("train", "heldout"):
        mine = evidence.manifest.ledger.get(split, {})
        for unit in ("documents", "bytes"):
            yield _equal(
                f"ledger_{split}_{unit}",
                number_at(mine, "documents", unit),
                number_at(published, "documents", "published", split, unit),
                found_is=f"{split} {unit} tokenized",
                allowed_is="published by curate",
                is_older=is_older,
            )
        rows = [("conversations", "instructions"), ("preferences", "preferences")]
        if "unpaired" in mine or number_at(published, "published_pairs", f"unpaired/{split}") is not None:
            rows.append(("unpaired", "unpaired"))
        for part, theirs in rows:
            yield _equal(
                f"ledger_{split}_{part}",
                number_at(mine, part, "in"),
                number_at(published, "published_pairs", f"{theirs}/{split}"),
                found_is=f"{split} {part} that came in",
                allowed_is="published by curate",
                is_older=is_older,
            )
            yield from _conserves(f"{split}_{part}", mine.get(part))
        posed = number_at(published, "published_pairs", f"prompts/{split}")
        if posed is not None or "prompt_sets" in mine:
            yield _equal(
                f"ledger_{split}_prompt_sets",
                number_at(mine, "prompt_sets", "in"),
                posed,
                found_is=f"{split} prompts of prompt sets that came in",
                allowed_is="published by curate",
            )
            yield from _conserves(f"{split}_prompt_sets", mine.get("prompt_sets"))


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


def recounted(evidence: Evidence) -> Iterable[Check]:
    """The published files hold as many documents, rows and tokens as the ledger says; what has no file is zero.

    Counted by the sizes of the arrays, whose headers (128 bytes) and items have a fixed size.
    """
    sizes = {entry.path: entry.size for entry in evidence.manifest.files}
    dtype = (evidence.meta or {}).get("dtype")
    width, is_older = {"uint16": 2, "uint32": 4}.get(str(dtype)), _is_older(evidence.manifest)
    if width is None:
        if is_older or not evidence.manifest.ledger:
            yield skipped("files", "meta.json does not name the width of a token")
        else:
            yield failed("files", f"meta.json says that tokens are {dtype}", "uint16 or uint32", DEFECT)
        return
    for split in ("train", "heldout"):
        mine = evidence.manifest.ledger.get(split, {})
        counted = {
            "documents": (_items(sizes, f"documents/{split}/bytes.npy", 8), number_at(mine, "documents", "documents")),
            "tokens": (_tokens(sizes, f"documents/{split}/tokens-", width), number_at(mine, "documents", "tokens")),
            "conversations": (
                _rows(sizes, f"conversations/{split}/ids-offsets.npy"),
                number_at(mine, "conversations", "kept"),
            ),
            "preferences": (
                _rows(sizes, f"preferences/{split}/chosen-ids-offsets.npy"),
                number_at(mine, "preferences", "kept"),
            ),
        }
        if "unpaired" in mine:
            counted["unpaired"] = (
                _rows(sizes, f"unpaired/{split}/ids-offsets.npy"),
                number_at(mine, "unpaired", "kept"),
            )
        if "prompt_sets" in mine:
            kept = number_at(mine, "prompt_sets", "kept")
            counted["prompt_sets"] = (_rows(sizes, f"prompt_sets/{split}/ids-offsets.npy"), kept)
        for what, (found, told) in counted.items():
            yield _equal(
                f"files_{split}_{what}",
                found,
                told,
                found_is="in the files",
                allowed_is="in the ledger",
                is_older=is_older,
            )


def _items(sizes: Mapping[str, int], path: str, width: int) -> int:
    return (sizes[path] - 128) // width if path in sizes else 0


def _rows(sizes: Mapping[str, int], path: str) -> int:
    """Offsets are one more than rows."""
    return max(0, _items(sizes, path, 8) - 1)


def _tokens(sizes: Mapping[str, int], prefix: str, width: int) -> int:
    shards = [path for path in sizes if path.startswith(prefix) and not path.endswith("offsets.npy")]
    return sum(_items(sizes, path, width) for path in shards)


def trained_on(evidence: Evidence) -> Iterable[Check]:
    """What a training found in the tokens is what tokenize published."""
    tokens = evidence.inputs.get("tokens")
    if tokens is None:
        yield skipped("ledger_tokens", "its tokens are no input with a manifest")
        return
    train, mine = tokens.ledger.get("train", {}), evidence.manifest.ledger
    is_older = _is_older(evidence.manifest, tokens)
    spec = GRAPH[evidence.manifest.stage]
    part = _part_of(spec)
    told = {_COUNTED[part]: number_at(train, part, "tokens" if part == DOCUMENTS else "kept")}
    if part == PROMPTS:
        asked = PROMPT_FIELDS.get(evidence.manifest.config.get("prompts_from", INSTRUCTIONS), ())
        of_sets = {"prompt_sets": number_at(train, "prompt_sets", "kept")} if PROMPTS in asked else {}
        told = (told if INSTRUCTIONS in asked else {}) | of_sets
    if part in ("conversations", "preferences"):
        trained, masked = (number_at(train, part, f"{kind}_tokens") for kind in ("target", "masked"))
        told["targets_available"] = trained
        told["tokens_available"] = None if trained is None or masked is None else trained + masked
    if "unpaired" in mine:
        told["unpaired"] = number_at(train, "unpaired", "kept")
    for name, published in told.items():
        yield _equal(
            f"ledger_{name}",
            number_at(mine, name),
            published,
            found_is="found by training",
            allowed_is="published",
            # Trainings of today's version count tokens of examples only since their gates compare them.
            is_older=is_older or (name != _COUNTED[part] and name not in mine),
        )
    for unit in ("pairs", "examples"):
        if f"{unit}_of_the_reasons" in mine:
            yield _reasons(unit, mine)
    length = tokens.config.get("sequence_length")
    if spec.needs == DOCUMENTS and isinstance(length, int) and (available := number_at(mine, "tokens_available")):
        yield _equal(
            "ledger_rows_available",
            number_at(mine, "rows_available"),
            available // length,
            found_is="rows found by training",
            allowed_is=f"whole rows of {length:,} in {available:,} tokens",
            is_older=is_older,
        )
    if "rows_trained" in mine and isinstance(length, int):
        yield _equal(
            "ledger_tokens_trained",
            mine.get("tokens_trained"),
            mine["rows_trained"] * length,
            found_is="tokens trained",
            allowed_is=f"{mine['rows_trained']:,} rows of {length:,}",
        )


def _reasons(unit: str, mine: Mapping[str, Any]) -> Check:
    """What is there = what the reasons leave + what they leave out + what the other half has."""
    left = sum(number_at(mine, f"{unit}_of_{what}") or 0 for what in ("the_reasons", "other_reasons", "the_other_half"))
    pairs, alone = (number_at(mine, name) or 0 for name in ("pairs", "unpaired"))
    return _equal(
        "ledger_reasons",
        left,
        pairs if unit == "pairs" else 2 * pairs + alone,
        found_is="of these reasons, of others, and of the other half",
        allowed_is=f"{unit} there are",
    )


_COUNTED = {
    "documents": "tokens_available",
    "conversations": "conversations",
    "preferences": "pairs",
    "prompts": "prompts",
}
"""What a training counts, by the part of the tokens that it reads."""


def _part_of(spec: StageSpec) -> str:
    if learns_from_scores(spec):
        return PROMPTS
    return {DOCUMENTS: "documents", INSTRUCTIONS: "conversations", PREFERENCES: "preferences"}[spec.needs]
