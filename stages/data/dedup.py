"""Exact and near duplicates over everything at once, so that held-out text has no found duplicate in training.

Of several equal documents the one that stays is chosen by rank: held out before training before planted, then by
order. Near duplicates are datatrove's MinHash stages 1 to 3; its stage 4 keeps the root of a union-find tree, which is
nobody's choice, so the last stage is ours.
"""

import contextlib
import hashlib
import io
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupSignature,
)

from stages.config.curate import CurateConfig
from stages.data.filters import SimplifiedTokenizer

_SPACES = re.compile(r"\s+")


@dataclass(frozen=True, slots=True)
class Candidate:
    """What deduplication must know of a document. `shard` and `index` are its place."""

    shard: int
    index: int
    key: str
    heldout: bool
    planted: bool

    @property
    def rank(self) -> tuple[bool, bool, int, int]:
        return (self.planted, not self.heldout, self.shard, self.index)


def text_key(text: str) -> str:
    """Hash of the text without regard to case and white space."""
    simplified = _SPACES.sub(" ", text.lower()).strip()
    return hashlib.blake2b(simplified.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def extra_copies(candidates: Iterable[Candidate]) -> set[tuple[int, int]]:
    """Places of all but the best-ranked document of each key."""
    best: dict[str, Candidate] = {}
    extra: set[tuple[int, int]] = set()
    for candidate in candidates:
        other = best.get(candidate.key)
        if other is None:
            best[candidate.key] = candidate
            continue
        loser = max(candidate, other, key=lambda entry: entry.rank)
        best[candidate.key] = other if loser is candidate else candidate
        extra.add((loser.shard, loser.index))
    return extra


def minhash_config(config: CurateConfig) -> MinhashConfig:
    return MinhashConfig(
        n_grams=config.minhash_ngram, num_buckets=config.minhash_buckets, hashes_per_bucket=config.minhash_hashes
    )


def signature_block(config: CurateConfig, folder: Path) -> MinhashDedupSignature:
    """Stage 1: writes each document's signatures, one file per bucket and shard."""
    words: str = SimplifiedTokenizer()  # pyright: ignore[reportAssignmentType]
    return MinhashDedupSignature(str(folder / "signatures"), config=minhash_config(config), language=words)


def match_bucket(config: CurateConfig, folder: Path, bucket: int) -> None:
    """Stage 2: writes the pairs of documents that agree in one bucket."""
    block = MinhashDedupBuckets(
        str(folder / "signatures"), str(folder / "pairs"), config=minhash_config(config), lines_to_buffer=1000
    )
    for _ in block.run(rank=bucket, world_size=config.minhash_buckets) or ():
        pass


def clusters(config: CurateConfig, folder: Path) -> dict[tuple[int, int], int]:
    """Stage 3: the cluster number of every document that has a near duplicate, by (shard, index)."""
    block = MinhashDedupCluster(
        str(folder / "pairs"), str(folder / "clusters"), config=minhash_config(config), save_cluster_id=True
    )
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar per bucket, in a log nobody can redraw
        block.run(None, 0, 1)
    numbers: dict[tuple[int, int], int] = {}
    for path in sorted((folder / "clusters").glob("*.clusters")):
        for index, cluster in struct.iter_unpack("<2I", path.read_bytes()):
            numbers[int(path.stem), index] = cluster
    return numbers
