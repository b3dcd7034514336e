"""From curated text to token ids: byte-level BPE (or the base model's tokenizer), chat template, memory-mapped shards.

Text is always encoded with special tokens switched off: a document that quotes `<|end|>` holds ordinary tokens.
"""

import gzip
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from stages.config.errors import ConfigError, DataError
from stages.config.tokens import TokenizeConfig
from stages.data.tokens.encoding import ConversationWriter, PairWriter
from stages.data.tokens.ragged import RaggedWriter
from stages.data.tokens.tokenizer import LoadedTokenizer, train_tokenizer
from stages.data.tokens.views import Split
from stages.job.context import StageContext, StageOutcome
from stages.models.given_tokenizer import given_tokenizer

_BATCH_DOCUMENTS = 2000


def run(context: StageContext) -> StageOutcome:
    """Write tokenizer, shards and ledger."""
    config = context.config
    assert isinstance(config, TokenizeConfig)
    curated = context.input_dir("curated")
    tokenizer = _tokenizer(config, curated, context)
    turn_end_id = tokenizer.chat().check()
    tokenizer.save(context.output_dir / "tokenizer")
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    ledger: dict[str, Any] = {}
    for split in Split:
        parts = _SplitWriter(curated, context.output_dir, split, tokenizer, config, dtype)
        ledger[split.value] = {
            "documents": parts.documents(context),
            **parts.conversations(),
            "preferences": parts.preferences(),
        }
    if not context.has_base_model:  # which may go on to SFT without new text
        _require_training_text(ledger, config)
    meta = {
        "vocab_size": tokenizer.vocab_size,
        "sequence_length": config.sequence_length,
        "dtype": dtype.name,
        "bos_id": tokenizer.bos_id,
        "eos_id": turn_end_id,
        "pad_id": tokenizer.pad_id,
    }
    (context.output_dir / "meta.json").write_text(json.dumps(meta, indent=1))
    (context.output_dir / "ledger.json").write_text(json.dumps(ledger, indent=1))
    return StageOutcome(metrics=_metrics(ledger, tokenizer), ledger=ledger)


def _tokenizer(config: TokenizeConfig, curated: Path, context: StageContext) -> LoadedTokenizer:
    if context.has_base_model:
        return given_tokenizer(context.base_model_dir(), chat_template=config.chat_template)
    return train_tokenizer(_evenly(curated, config.bpe_train_bytes), config)


def _evenly(curated: Path, max_bytes: int) -> Iterator[str]:
    """Take every n-th training document so that about `max_bytes` are spread over the whole corpus."""
    total = sum(len(row["text"].encode()) for row in _rows(curated / "documents" / Split.TRAIN))
    if not total:
        raise DataError(
            "there are no training documents", advice="Look at curate's ledger for what was dropped and why."
        )
    keep, seen = min(1.0, max_bytes / total), 0.0
    for row in _rows(curated / "documents" / Split.TRAIN):
        seen += keep
        if seen >= 1.0:
            seen -= 1.0
            yield row["text"]


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of one .jsonl.gz file or of all of a folder, in name order; a folder without documents was not published."""
    paths = [path] if path.suffix == ".gz" else sorted(path.glob("*.jsonl.gz"))
    for file in paths:
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)


class _SplitWriter:
    """Encodes one split, counting everything that is left out."""

    def __init__(
        self,
        curated: Path,
        output: Path,
        split: Split,
        tokenizer: LoadedTokenizer,
        config: TokenizeConfig,
        dtype: np.dtype,
    ) -> None:
        self._curated, self._output, self._split, self._dtype = curated, output, split, dtype
        self._tokenizer, self._config = tokenizer, config
        self._chat = tokenizer.chat()

    def documents(self, context: StageContext) -> dict[str, int]:
        folder = self._output / "documents" / self._split
        writer = RaggedWriter(folder, "tokens", self._dtype)
        sizes: list[int] = []
        tokens = 0
        for batch in _batched(_rows(self._curated / "documents" / self._split), _BATCH_DOCUMENTS):
            texts = [row["text"] for row in batch]
            for text, ids in zip(texts, self._tokenizer.encode_texts(texts), strict=True):
                writer.append(ids)
                sizes.append(len(text.encode()))
                tokens += len(ids)
            context.progress(len(sizes), len(sizes), "document", tokens=tokens)
        writer.close()
        np.save(folder / "bytes.npy", np.asarray(sizes, dtype=np.int64))
        return {"documents": len(sizes), "bytes": int(sum(sizes)), "tokens": tokens}

    def conversations(self) -> dict[str, Any]:
        writer = ConversationWriter(self._output, self._split, self._chat, self._config, self._dtype)
        return writer.write(_rows(self._curated / "instructions" / f"{self._split}.jsonl.gz"))

    def preferences(self) -> dict[str, Any]:
        writer = PairWriter(self._output, self._split, self._chat, self._config, self._dtype)
        return writer.write(_rows(self._curated / "preferences" / f"{self._split}.jsonl.gz"))


def _batched(rows: Iterable[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _require_training_text(ledger: dict[str, Any], config: TokenizeConfig) -> None:
    tokens = ledger["train"]["documents"]["tokens"]
    if tokens < config.sequence_length:
        raise ConfigError(
            f"tokenize.sequence_length={config.sequence_length} but the training text has only {tokens} tokens",
            advice="Bring more text or lower tokenize.sequence_length.",
        )


def _metrics(ledger: dict[str, Any], tokenizer: LoadedTokenizer) -> dict[str, float]:
    train, heldout = ledger["train"]["documents"], ledger["heldout"]["documents"]
    return {
        "tokens/train": float(train["tokens"]),
        "tokens/heldout": float(heldout["tokens"]),
        "tokens/vocab_size": float(tokenizer.vocab_size),
        "tokens/bytes_per_token": train["bytes"] / max(train["tokens"], 1),
        "tokens/conversations": float(ledger["train"]["conversations"]["kept"]),
        "tokens/preferences": float(ledger["train"]["preferences"]["kept"]),
    }
