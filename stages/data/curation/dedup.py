"""Near duplicates by datatrove's MinHash, stages 1 to 3, over everything at once.

Its stage 4 is not used: it keeps the root of a union-find tree, which is arbitrary. Which document of a cluster stays
is decided by `dedup_keys.extra_copies` instead.
"""

import contextlib
import io
from collections.abc import Sequence

import numpy as np
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupSignature,
)
from loguru import logger

from stages.config.curate import CurateConfig
from stages.data.curation.filters import SimplifiedTokenizer
from stages.data.curation.workbench import Workbench


def minhash_config(config: CurateConfig) -> MinhashConfig:
    return MinhashConfig(
        n_grams=config.minhash_ngram, num_buckets=config.minhash_buckets, hashes_per_bucket=config.minhash_hashes
    )


def signature_block(bench: Workbench) -> MinhashDedupSignature:
    """Stage 1: writes each document's signatures, one file per bucket and shard."""
    logger.disable("datatrove")  # every stage logs each file it opens, which drowns the stage's own progress
    words: str = SimplifiedTokenizer()  # pyright: ignore[reportAssignmentType]
    return MinhashDedupSignature(bench.folder("signatures"), config=minhash_config(bench.config), language=words)


def match_bucket(bucket: int, bench: Workbench) -> None:
    """Stage 2: writes the pairs of documents that agree in one bucket."""
    logger.disable("datatrove")
    block = MinhashDedupBuckets(
        bench.folder("signatures"), bench.folder("pairs"), config=minhash_config(bench.config), lines_to_buffer=1000
    )
    for _ in block.run(rank=bucket, world_size=bench.config.minhash_buckets) or ():
        pass


def clusters(sizes: Sequence[int], bench: Workbench) -> list[np.ndarray]:
    """Stage 3: by shard of `sizes` documents, the cluster of each document, -1 for one without a near duplicate."""
    logger.disable("datatrove")
    block = MinhashDedupCluster(
        bench.folder("pairs"), bench.folder("clusters"), config=minhash_config(bench.config), save_cluster_id=True
    )
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar per bucket, which a log file cannot redraw
        block.run(None, 0, 1)
    numbers = [np.full(size, -1, dtype=np.int64) for size in sizes]
    for path in bench.files("clusters", "*.clusters"):
        records = np.fromfile(path, dtype=[("index", "<u4"), ("cluster", "<u4")])
        numbers[int(path.stem)][records["index"]] = records["cluster"]
    return numbers
