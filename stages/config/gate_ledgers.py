"""The ledgers conserve: in a stage, from stage to stage, and against the published files.

What one stage publishes is what the next one counts in; in = kept + dropped by reason; tokens in = trained + masked +
dropped.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from stages.config.gate_evidence import DEFECT, Evidence
from stages.config.gate_records import Check, compared, skipped
from stages.config.request import Manifest


def _equal(name: str, found: Any, allowed: Any, *, found_is: str, allowed_is: str) -> Check:
    """Compare two counts, which must be one number."""
    if found is None or allowed is None:
        missing = found_is if found is None else allowed_is
        return skipped(name, f"{missing}: not recorded by the version that built it")
    return compared(name, found == allowed, f"{found:,} ({found_is})", f"{allowed:,} ({allowed_is})", DEFECT)


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
    )


def tokenized(evidence: Evidence) -> Iterable[Check]:
    """What curate published is what tokenize counts in, and every row and token is kept or dropped."""
    curated = evidence.inputs.get("curated")
    for split in ("train", "heldout"):
        mine = evidence.manifest.ledger.get(split, {})
        for unit in ("documents", "bytes"):
            yield _equal(
                f"ledger_{split}_{unit}",
                number_at(mine, "documents", unit),
                number_at(curated.ledger if curated else {}, "documents", "published", split, unit),
                found_is=f"{split} {unit} tokenized",
                allowed_is="published by curate",
            )
        for part, theirs in (("conversations", "instructions"), ("preferences", "preferences")):
            yield _equal(
                f"ledger_{split}_{part}",
                number_at(mine, part, "in"),
                number_at(curated.ledger if curated else {}, "published_pairs", f"{theirs}/{split}"),
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


def recounted(evidence: Evidence) -> Iterable[Check]:
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


def trained_on(evidence: Evidence) -> Iterable[Check]:
    """What a training found in the tokens is what tokenize published."""
    tokens = evidence.inputs.get("tokens")
    if tokens is None:
        yield skipped("ledger_tokens", "its tokens are no input with a manifest")
        return
    train, mine = tokens.ledger.get("train", {}), evidence.manifest.ledger
    found = {
        "tokens_available": number_at(train, "documents", "tokens"),
        "conversations": number_at(train, "conversations", "kept"),
        "pairs": number_at(train, "preferences", "kept"),
        "prompts": number_at(train, "prompts", "kept"),
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
