"""What both sides of the benchmark train on: real text, conversations and preference pairs, tokenized by `tokenize`.

Text is Python enhancement proposals and novels, conversations are Dolly's, pairs are Anthropic's harmless ones, from
files beside the checkout (`ATHANOR_BENCH_DATA`). Both sides start from the same random weights.
"""

import gzip
import json
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stages.config.curate import CurateConfig
from stages.config.errors import ConfigError
from stages.config.graph import Stage
from stages.config.request import ArtifactRef
from stages.config.sources import PreferenceFormat
from stages.config.tokens import TokenizeConfig
from stages.config.train import ModelConfig, OptimizerConfig, SFTConfig
from stages.data.pairs.preferences import to_preferences
from stages.data.pairs.sides import Preference
from stages.data.pairs.turns import Unusable
from stages.data.tokens.packing import TokenSequence
from stages.data.tokens.views import Pair, Split, TokensArtifact
from stages.train.plan import epochs
from tests.small_world import make_context, published, write_ledger

SEQUENCE_LENGTH = 512
MODEL = ModelConfig(hidden_size=320, intermediate_size=864, num_layers=6, num_heads=5, num_kv_heads=5)
OPTIMIZER = OptimizerConfig(learning_rate=3e-4, warmup_fraction=0.0, weight_decay=0.1)

_DOCUMENT_BYTES = 4_000_000
_HELDOUT = 8


def make_data(home: Path, sources: Path) -> dict[str, ArtifactRef]:
    """Tokenize the sources and save a random model; done once, later calls find it."""
    record = home / "inputs.json"
    if not record.exists():
        shutil.rmtree(home, ignore_errors=True)  # what a run that failed left
        refs = {"tokens": _tokens(home, sources)}
        refs["model"] = _model(home, refs["tokens"])
        record.write_text(json.dumps({role: ref.model_dump(mode="json") for role, ref in refs.items()}))
        _for_peers(home, TokensArtifact(_folder(refs["tokens"])))
    return {role: ArtifactRef.model_validate(ref) for role, ref in json.loads(record.read_text()).items()}


def num_pairs(inputs: dict[str, ArtifactRef]) -> int:
    return len(TokensArtifact(_folder(inputs["tokens"])).pairs(Split.TRAIN))


def model_dir(inputs: dict[str, ArtifactRef]) -> Path:
    return _folder(inputs["model"])


def _folder(ref: ArtifactRef) -> Path:
    return Path(ref.uri.removeprefix("file://"))


def _tokens(home: Path, sources: Path) -> ArtifactRef:
    from stages import tokenize

    curated = make_context(home, Stage.CURATE, CurateConfig())
    _write_curated(curated.output_dir, sources)
    config = TokenizeConfig(vocab_size=8192, sequence_length=SEQUENCE_LENGTH, bpe_train_bytes=2_000_000)
    context = make_context(home, Stage.TOKENIZE, config, {"curated": published(curated)})
    tokenize.run(context)
    return published(context)


def _model(home: Path, tokens: ArtifactRef) -> ArtifactRef:
    from stages.models.build import new_causal_lm, save_model

    context = make_context(home, Stage.SFT, SFTConfig(optimizer=OPTIMIZER, global_batch_size=1), {"tokens": tokens})
    artifact = TokensArtifact(context.input_dir("tokens"))
    model = new_causal_lm(MODEL, artifact, seed=1)
    save_model(model, model.state_dict(), context.output_dir, artifact)
    return published(context)


def _write_curated(folder: Path, sources: Path) -> None:
    if not sources.is_dir():
        raise ConfigError(
            f"ATHANOR_BENCH_DATA={sources} is no folder", advice="Point it to one with corpus/, sft/ and preference/."
        )
    documents = [{"id": name, "text": text} for name, text in _documents(sources)]
    instructions = list(_instructions(sources / "sft" / "dolly_hhrlhf_small.jsonl.gz"))
    preferences = list(_preferences(sources / "preference" / "hh_harmless_base_test.jsonl.gz"))
    for split, rows in (("train", slice(_HELDOUT, None)), ("heldout", slice(_HELDOUT))):
        _write(folder / "documents" / split / "part-00000.jsonl.gz", documents[rows])
        _write(folder / "instructions" / f"{split}.jsonl.gz", instructions[rows])
        _write(folder / "preferences" / f"{split}.jsonl.gz", preferences[rows])
    write_ledger(folder)


def _documents(sources: Path) -> Iterator[tuple[str, str]]:
    """Proposals and chapters of novels in turn, until there are enough bytes."""
    size = 0
    for proposal, chapter in zip(_members(sources, "peps"), _chapters(sources), strict=False):
        for name, text in (proposal, chapter):
            size += len(text)
            yield name, text
        if size > _DOCUMENT_BYTES:
            return


def _chapters(sources: Path) -> Iterator[tuple[str, str]]:
    for name, text in _members(sources, "novels"):
        for start in range(0, len(text), 20_000):
            yield f"{name}-{start}", text[start : start + 20_000]


def _members(sources: Path, name: str) -> Iterator[tuple[str, str]]:
    with tarfile.open(sources / "corpus" / f"{name}.tar.gz") as archive:
        for member in archive:
            if file := archive.extractfile(member):
                yield member.name, file.read().decode()


def _instructions(path: Path) -> Iterator[dict[str, Any]]:
    head, tail = "### Instruction:\n", "\n\n### Response:\n"
    for number, row in enumerate(_rows(path)):
        question = row["prompt"].partition(head)[2].removesuffix(tail)
        if question and row["response"].strip():
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": row["response"].strip()}]
            yield {"id": f"dolly-{number}", "origin": "dolly", "messages": turns}


def _preferences(path: Path) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(_rows(path)):
        try:
            (pair,) = to_preferences(PreferenceFormat.TRANSCRIPTS, row)
        except Unusable:
            continue
        if isinstance(pair, Preference):
            yield {"id": f"hh-{number}", "origin": "harmless", **asdict(pair)}


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def _for_peers(home: Path, tokens: TokensArtifact) -> None:
    """Write what the peers read, in the order in which we train, as JSON lines: they need nothing of ours."""
    documents, size = tokens.documents(Split.TRAIN), SEQUENCE_LENGTH
    conversations, pairs = tokens.conversations(Split.TRAIN), tokens.pairs(Split.TRAIN)
    items: dict[str, Iterator[dict[str, Any]]] = {
        "pretrain": (
            {"input_ids": documents.slice(row * size, (row + 1) * size).tolist()}
            for row in epochs(documents.num_items // size, num_epochs=1, seed=0).tolist()
        ),
        "sft": (_conversation(conversations[i]) for i in epochs(len(conversations), num_epochs=1, seed=0).tolist()),
        "pairs": (_pair(pairs[i]) for i in epochs(len(pairs), num_epochs=1, seed=0).tolist()),
    }
    for name, rows in items.items():
        _write(home / "peers" / f"{name}.jsonl.gz", list(rows))


def _conversation(one: TokenSequence) -> dict[str, Any]:
    return {"input_ids": one.ids.tolist(), "completion_mask": one.loss_mask.tolist()}


def _pair(pair: Pair) -> dict[str, Any]:
    start = int(pair.chosen.loss_mask.argmax())
    return {
        "prompt_ids": pair.chosen.ids[:start].tolist(),
        "chosen_ids": pair.chosen.ids[start:].tolist(),
        "rejected_ids": pair.rejected.ids[start:].tolist(),
    }
