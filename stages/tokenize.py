"""From curated text to token ids: byte-level BPE (or the base model's tokenizer), chat template, memory-mapped shards.

Text is always encoded with special tokens switched off: a document that quotes `<|end|>` holds ordinary tokens.
"""

import gzip
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from stages.config.errors import ConfigError, DataError
from stages.config.graph import BASE_MODEL
from stages.config.tokens import TokenizeConfig
from stages.data.tokens.chat import ChatEncoder
from stages.data.tokens.encoding import ConversationWriter, PairWriter, UnpairedWriter
from stages.data.tokens.prompt_sets import PromptSetWriter
from stages.data.tokens.ragged import RaggedWriter
from stages.data.tokens.tokenizer import LoadedTokenizer, train_tokenizer
from stages.data.tokens.views import Split
from stages.job.context import StageContext, StageOutcome
from stages.models.given_tokenizer import given_tokenizer

_BATCH_DOCUMENTS = 2000
_LOG = logging.getLogger(__name__)


def run(context: StageContext) -> StageOutcome:
    """Write tokenizer, shards and ledger."""
    config = context.config
    assert isinstance(config, TokenizeConfig)
    curated = context.input_dir("curated")
    tokenizer = _tokenizer(config, curated, context)
    chat = tokenizer.chat()
    turn_end_id = chat.check(only_last_turn=config.trained_turns == "last")
    tokenizer.save(context.output_dir / "tokenizer")
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)  # by the largest id
    ledger: dict[str, Any] = {}
    for split in Split:
        parts = _SplitWriter(
            curated=curated,
            output=context.output_dir,
            split=split,
            tokenizer=tokenizer,
            chat=chat,
            config=config,
            dtype=dtype,
        )
        ledger[split.value] = {
            "documents": parts.documents(context),
            **parts.conversations(),
            "preferences": parts.preferences(),
            **parts.unpaired(),
            **parts.prompt_sets(),
        }
    if not context.has_base_model:  # a given model may continue with SFT, without new text
        _require_training_text(ledger, config)
    meta: dict[str, Any] = {
        "vocab_size": tokenizer.vocab_size,
        "sequence_length": config.sequence_length,
        "dtype": dtype.name,
        "bos_id": tokenizer.bos_id,
        "eos_id": turn_end_id,
        "pad_id": tokenizer.pad_id,
    }
    if context.has_base_model:  # the template of a tokenizer that we train is ours
        meta["chat_template"] = list(chat.notes)
        for note in chat.notes:
            _LOG.info("%s", note)
    (context.output_dir / "meta.json").write_text(json.dumps(meta, indent=1))
    (context.output_dir / "ledger.json").write_text(json.dumps(ledger, indent=1))
    return StageOutcome(metrics=_metrics(ledger, tokenizer), ledger=ledger)


def _tokenizer(config: TokenizeConfig, curated: Path, context: StageContext) -> LoadedTokenizer:
    if context.has_base_model:
        return given_tokenizer(context.given_dir(BASE_MODEL), chat_template=config.chat_template)
    return train_tokenizer(evenly(curated, config.bpe_train_bytes), config)


def evenly(curated: Path, max_bytes: int) -> Iterator[str]:
    """Take every n-th training document so that about `max_bytes` are spread over the whole corpus.

    The ledger says how much there is; the documents are read once, and only those that are taken are decoded.
    """
    ledger = json.loads((curated / "ledger.json").read_text(encoding="utf-8"))
    total = ledger["documents"]["published"][Split.TRAIN]["bytes"]
    if not total:
        raise DataError(
            "there are no training documents", advice="Look at curate's ledger for what was dropped and why."
        )
    keep, due = min(1.0, max_bytes / total), 0.0
    for line in _lines(curated / "documents" / Split.TRAIN):
        due += keep
        if due >= 1.0:
            due -= 1.0
            yield json.loads(line)["text"]


def _lines(path: Path) -> Iterator[str]:
    """Lines of one .jsonl.gz file or of all of a folder, in name order; a split without documents has no folder."""
    paths = [path] if path.suffix == ".gz" else sorted(path.glob("*.jsonl.gz"))
    for file in paths:
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            yield from lines


@dataclass(frozen=True, kw_only=True)
class _SplitWriter:
    """Encodes one split, counting everything that is left out."""

    curated: Path
    output: Path
    split: Split
    tokenizer: LoadedTokenizer
    chat: ChatEncoder
    config: TokenizeConfig
    dtype: np.dtype

    def documents(self, context: StageContext) -> dict[str, int]:
        folder = self.output / "documents" / self.split
        writer = RaggedWriter(folder, "tokens", self.dtype)
        sizes: list[int] = []
        tokens = 0
        lines = _lines(self.curated / "documents" / self.split)
        while texts := [json.loads(line)["text"] for line in islice(lines, _BATCH_DOCUMENTS)]:
            for text, ids in zip(texts, self.tokenizer.encode_texts(texts), strict=True):
                writer.append(ids)
                sizes.append(len(text.encode()))
                tokens += len(ids)
            context.progress(len(sizes), len(sizes), "document", tokens=tokens)
        writer.close()
        np.save(folder / "bytes.npy", np.asarray(sizes, dtype=np.int64))
        return {"documents": len(sizes), "bytes": int(sum(sizes)), "tokens": tokens}

    def conversations(self) -> dict[str, Any]:
        writer = ConversationWriter(self.output, self.split, self.chat, self.config, self.dtype)
        return writer.write(self._rows("instructions"))

    def preferences(self) -> dict[str, Any]:
        writer = PairWriter(self.output, self.split, self.chat, self.config, self.dtype)
        return writer.write(self._rows("preferences"))

    def unpaired(self) -> dict[str, Any]:
        """Only where the data has some: other data's tokens stay as they were."""
        if not (self.curated / "unpaired").exists():
            return {}
        writer = UnpairedWriter(self.output, self.split, self.chat, self.config, self.dtype)
        return {"unpaired": writer.write(self._rows("unpaired"))}

    def prompt_sets(self) -> dict[str, Any]:
        """Nothing where the curated data has none."""
        if not (self.curated / "prompts").is_dir():
            return {}
        writer = PromptSetWriter(self.output, self.split, self.chat, self.config, self.dtype)
        return {"prompt_sets": writer.write(self._rows("prompts"))}

    def _rows(self, part: str) -> Iterator[dict[str, Any]]:
        return map(json.loads, _lines(self.curated / part / f"{self.split}.jsonl.gz"))


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
        **({"tokens/unpaired": float(single["kept"])} if (single := ledger["train"].get("unpaired")) else {}),
        **({"tokens/prompts": float(sets["kept"])} if (sets := ledger["train"].get("prompt_sets")) else {}),
    }
