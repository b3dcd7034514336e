"""What curation has seen, over all increments: `index/` of each curated artifact, which includes the earlier ones.

It has two parts. Hashes of every document that was judged, kept or dropped, so that none is judged twice; what
`max_bytes` left out was not judged and may come again. And MinHash signatures of those that passed the filters, one
file a bucket, so that near copies of earlier text are found without the text. The files hold sorted records of one
size, each record once.
"""

import json
import struct
from pathlib import Path

import numpy as np

from stages.config.curate import CurateConfig
from stages.config.errors import ConfigError
from stages.data.curation.dedup import minhash_config
from stages.data.curation.dedup_keys import KEY
from stages.data.curation.workbench import Workbench

_SETTINGS = ("near_duplicates", "minhash_ngram", "minhash_buckets", "minhash_hashes")


def require_same_signatures(bench: Workbench) -> None:
    """Raise ConfigError unless the signatures of the previous data compare with those of this run."""
    if bench.previous is None:
        return
    path = bench.previous / "index" / "settings.json"
    if not path.is_file():
        raise ConfigError(
            "previous_data has no index of what it has seen: an older version of curate made it",
            advice="Curate it once more with this version, then build on that.",
        )
    before = json.loads(path.read_text())
    for name in _SETTINGS:
        if before[name] != getattr(bench.config, name):
            raise ConfigError(
                f"curate.{name}={getattr(bench.config, name)!r}, but previous_data was made with {before[name]!r}: "
                "their signatures do not compare",
                advice=f"Set the override curate.{name} to {before[name]!r}, or curate everything (no previous_data).",
            )


def seen_keys(previous: Path | None) -> np.ndarray:
    """The keys (see `dedup_keys.text_key`) of all documents that were judged before."""
    return np.fromfile(previous / "index" / "documents.bin", dtype=KEY) if previous else np.empty(0, dtype=KEY)


def index_files(previous: Path | None) -> list[Path]:
    """The files of the previous data's index."""
    return sorted((previous / "index").iterdir()) if previous else []


def write_keys(bench: Workbench, seen: np.ndarray, judged: np.ndarray) -> None:
    """Publish the keys of before and now, and the settings that later signatures must share."""
    bench.publish_bytes("index/documents.bin", np.union1d(seen, judged).tobytes())
    bench.publish_json("index/settings.json", {name: getattr(bench.config, name) for name in _SETTINGS})


def signature_record(config: CurateConfig) -> np.dtype:
    """How datatrove lays out the signatures of a bucket: the hashes of a document, then its index in the shard."""
    settings = minhash_config(config)
    size = struct.calcsize(f"<{settings.hashes_per_bucket}{settings.hash_config.struct_format}")
    return np.dtype([("signature", f"S{size}"), ("index", "<u4")])


def _among(signatures: np.ndarray, published: np.ndarray) -> np.ndarray:
    """Which signatures are in a published bucket. It is sorted, so there is no need to sort it again for every shard,
    as `np.isin` would: that took hundreds of times as long with a million earlier documents."""
    if not len(published):
        return np.zeros(len(signatures), dtype=bool)
    places = np.searchsorted(published, signatures)
    return published[np.minimum(places, len(published) - 1)] == signatures


def match_seen(bucket: int, planted: list[np.ndarray], bench: Workbench) -> list[np.ndarray]:
    """By shard, the documents that agree with earlier ones in this bucket; publishes the bucket of before and now.

    Planted documents measure the filters and are not data: they are neither matched nor remembered.
    """
    record, name = signature_record(bench.config), f"index/bucket-{bucket:03d}.bin"
    before = np.empty(0, dtype=record["signature"])
    if bench.previous is not None:
        before = np.fromfile(bench.previous / name, dtype=record["signature"])
    # Signatures are compared as fixed-length bytes; see `dedup_keys.KEY` on trailing zero bytes.
    found = [np.zeros(len(column), dtype=bool) for column in planted]
    now = [before]
    for path in bench.files(f"signatures/bucket_{bucket:03d}", "*.minhash.sig"):
        shard = int(path.name.partition(".")[0])
        records = np.fromfile(path, dtype=record)
        records = records[~planted[shard][records["index"]]]
        found[shard][records["index"]] = _among(records["signature"], before)
        now.append(records["signature"])
    # Sorted and unique, so the file does not depend on the order of shards or of increments.
    bench.publish_bytes(name, np.unique(np.concatenate(now)).tobytes())
    return found
