"""Near duplicates by datatrove's MinHash, stages 1 to 3, over everything at once.

Its stage 4 keeps the root of a union-find tree, which is nobody's choice, so which document of a cluster stays is
decided by `dedup_keys.extra_copies` instead.
"""

import contextlib
import io
import struct
from pathlib import Path

from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupSignature,
)
from loguru import logger

from stages.config.curate import CurateConfig
from stages.data.curation.filters import SimplifiedTokenizer


def minhash_config(config: CurateConfig) -> MinhashConfig:
    return MinhashConfig(
        n_grams=config.minhash_ngram, num_buckets=config.minhash_buckets, hashes_per_bucket=config.minhash_hashes
    )


def signature_block(config: CurateConfig, folder: Path) -> MinhashDedupSignature:
    """Stage 1: writes each document's signatures, one file per bucket and shard."""
    logger.disable("datatrove")  # every stage logs each file it opens, which drowns the stage's own progress
    words: str = SimplifiedTokenizer()  # pyright: ignore[reportAssignmentType]
    return MinhashDedupSignature(str(folder / "signatures"), config=minhash_config(config), language=words)


def match_bucket(bucket: int, config: CurateConfig, folder: Path) -> None:
    """Stage 2: writes the pairs of documents that agree in one bucket."""
    logger.disable("datatrove")
    block = MinhashDedupBuckets(
        str(folder / "signatures"), str(folder / "pairs"), config=minhash_config(config), lines_to_buffer=1000
    )
    for _ in block.run(rank=bucket, world_size=config.minhash_buckets) or ():
        pass


def clusters(config: CurateConfig, folder: Path) -> dict[tuple[int, int], int]:
    """Stage 3: the cluster number of every document that has a near duplicate, by (shard, index)."""
    logger.disable("datatrove")
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
