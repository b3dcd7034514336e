"""What curation has seen, over all increments: `index/` of each curated artifact, the earlier ones' part included.

Two parts. Hashes of every document that was judged, kept or dropped, so that none is judged twice; what `max_bytes`
left out was not judged and may come again. And MinHash signatures of those that passed the filters, one file a bucket,
so that near copies of earlier text are found without the text. Files are sorted records of a fixed size, each once.
"""

import json
import struct
from collections.abc import Iterable
from pathlib import Path

from stages.config.curate import CurateConfig
from stages.config.errors import ConfigError
from stages.data.curation.dedup import minhash_config

_KEY_BYTES = 16
_SETTINGS = ("near_duplicates", "minhash_ngram", "minhash_buckets", "minhash_hashes")

Place = tuple[int, int]


def require_same_signatures(previous: Path, config: CurateConfig) -> None:
    """Raise ConfigError unless the signatures of the previous data compare with those of this run."""
    path = previous / "index" / "settings.json"
    if not path.is_file():
        raise ConfigError(
            "previous_data has no index of what it has seen: an older version of curate made it",
            advice="Curate it once more with this version, then build on that.",
        )
    before = json.loads(path.read_text())
    for name in _SETTINGS:
        if before[name] != getattr(config, name):
            raise ConfigError(
                f"curate.{name}={getattr(config, name)!r}, but previous_data was made with {before[name]!r}: their "
                "signatures do not compare",
                advice=f"Set the override curate.{name} to {before[name]!r}, or curate everything (no previous_data).",
            )


def seen_keys(previous: Path | None) -> frozenset[str]:
    """Return the keys (see `dedup_keys.text_key`) of all documents that were judged before."""
    if previous is None:
        return frozenset()
    return frozenset(record.hex() for record in _records(previous / "index" / "documents.bin", _KEY_BYTES))


def write_keys(output: Path, seen: Iterable[str], judged: Iterable[str], config: CurateConfig) -> None:
    """Write the keys of before and now, and the settings that later signatures must share."""
    folder = output / "index"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "documents.bin").write_bytes(b"".join(sorted({bytes.fromhex(key) for key in (*seen, *judged)})))
    (folder / "settings.json").write_text(json.dumps({name: getattr(config, name) for name in _SETTINGS}) + "\n")


def match_seen(
    bucket: int, config: CurateConfig, folder: Path, planted: frozenset[Place], previous: Path | None, output: Path
) -> set[Place]:
    """Return the documents that agree with earlier ones in this bucket; write the bucket of before and now.

    Planted documents measure filters and are nobody's data: they are neither matched nor remembered.
    """
    settings = minhash_config(config)
    signature = struct.calcsize(f"<{settings.hashes_per_bucket}{settings.hash_config.struct_format}")
    name = f"bucket-{bucket:03d}.bin"
    before = frozenset(_records(previous / "index" / name, signature) if previous else ())
    found: set[Place] = set()
    now: set[bytes] = set()
    for path in sorted((folder / "signatures" / f"bucket_{bucket:03d}").glob("*.minhash.sig")):
        shard = int(path.name.partition(".")[0])
        for record in _records(path, signature + 4):
            place = (shard, int.from_bytes(record[signature:], "little"))
            if place in planted:
                continue
            now.add(record[:signature])
            if record[:signature] in before:
                found.add(place)
    (output / "index").mkdir(parents=True, exist_ok=True)
    (output / "index" / name).write_bytes(b"".join(sorted(before | now)))
    return found


def _records(path: Path, size: int) -> Iterable[bytes]:
    data = path.read_bytes()
    return (data[start : start + size] for start in range(0, len(data), size))
