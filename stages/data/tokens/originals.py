"""The texts behind a `tokens` artifact, row by row, for a model that reads them with another tokenizer.

The artifact holds ids alone. Which published rows they are is found by encoding the split once more: what is left out,
cut or repeated is left out, cut or recognised again. The ids must come out the same, or the texts are not those.
"""

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from stages.config.errors import DataError
from stages.config.tokens import TokenizeConfig
from stages.data.tokens.encoding import ConversationWriter, Originals, PairWriter
from stages.data.tokens.ragged import Ragged
from stages.data.tokens.tokenizer import LoadedTokenizer, with_spans
from stages.data.tokens.views import Split, TokensArtifact

_SETTINGS, _TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
_PARTS = {
    "conversations": ("ids", "mask"),
    "prompts": ("ids",),
    "preferences": ("chosen-ids", "chosen-mask", "rejected-ids", "rejected-mask"),
}

Rows = Callable[[str], Iterable[Mapping[str, Any]]]
"""The curated rows of the split, by part: `instructions` or `preferences`."""


def published_tokenizer(tokens: TokensArtifact, config: TokenizeConfig) -> LoadedTokenizer:
    """Return the tokenizer of a `tokens` artifact with its chat template, as `tokenize` used it."""
    settings = _settings(tokens.tokenizer_dir / _SETTINGS)
    written = tokens.tokenizer_dir / _TEMPLATE
    template = written.read_text(encoding="utf-8") if written.is_file() else str(settings.get("chat_template") or "")
    special = {name: _content(settings.get(name)) for name in ("bos_token", "eos_token", "pad_token")}
    made = LoadedTokenizer(
        tokens.tokenizer(), template, special, tokens.sequence_length, template_origin=str(tokens.tokenizer_dir)
    )
    return with_spans(made, config.chat_template)


def _settings(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: {error}", advice="Run `tokenize` again.") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} is no JSON object", advice="Run `tokenize` again.")
    return found


def _content(token: Any) -> str:
    """A special token's text; transformers writes some as an object."""
    return str((token.get("content") if isinstance(token, Mapping) else token) or "")


def originals_of(
    tokens: TokensArtifact, tokenizer: LoadedTokenizer, config: TokenizeConfig, rows: Rows, *, split: Split
) -> Originals:
    """Return the texts of a split's rows; raises DataError when the curated rows are not those of the artifact."""
    originals = Originals()
    dtype = np.dtype(tokens.meta["dtype"])
    with tempfile.TemporaryDirectory(prefix="athanor-originals-") as scratch:
        again = Path(scratch)
        for writer, part in ((ConversationWriter, "instructions"), (PairWriter, "preferences")):
            writer(again, split, tokenizer.chat(), config, dtype, originals=originals).write(rows(part))
        for part, names in _PARTS.items():
            for name in names:
                _require_equal(tokens.folder / part / split, again / part / split, name)
    return originals


def _require_equal(published: Path, again: Path, name: str) -> None:
    ours, theirs = Ragged(published, name), Ragged(again, name)
    same = np.array_equal(ours.offsets, theirs.offsets)
    if not (same and np.array_equal(ours.slice(0, ours.num_items), theirs.slice(0, theirs.num_items))):
        raise DataError(
            f"{published}/{name}: the curated rows give {len(theirs)} rows of other ids than the {len(ours)} published",
            advice="The curated data and the tokens are not of one run; run `tokenize` again on this data.",
        )
