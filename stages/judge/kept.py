"""Measurements that are kept in the store, so that the same model is not measured twice on the same items.

`measurements/<identity of the model>/<digest of the suite>.parquet`, also across runs: whoever measures a champion
again finds what the run that made it has measured. One object is one measurement and is written at once, so a reader
sees a whole one or none, and an evaluation that was killed continues with the measurements that are missing. Nothing
but speed depends on them: a damaged one is named and measured again, and garbage collection removes old ones.
`measurements/<evaluation>/done-<rank>` says that a worker has nothing left to measure.
"""

import io
import json
import logging
import math
from collections import Counter
from collections.abc import Callable

from stages.artifacts.store import Store
from stages.judge.suite import Measurement, Score, Suite

logger = logging.getLogger(__name__)

ROOM = "measurements"
_ABOUT = b"athanor"
_COLUMNS = ("item", "value", "cluster", "tokens", "response")


class Measurements:
    """Reads and writes kept measurements; `check_lease` raises when this process may write nothing any more.

    One that is not final is kept for `evaluation` alone, whose workers find it there.
    """

    def __init__(self, store: Store, check_lease: Callable[[], None], *, evaluation: str = "") -> None:
        self._store, self._check_lease, self._evaluation = store, check_lease, evaluation

    def is_there(self, subject_identity: str, suite: Suite) -> bool:
        """Whether there is a measurement, be it damaged."""
        return any(self._store.exists(key) for key in self._keys(subject_identity, suite))

    def read(self, subject_identity: str, suite: Suite) -> Measurement | None:
        """Return a kept measurement; None where there is none, or only one that cannot be used."""
        found = (self._read(key, subject_identity, suite) for key in self._keys(subject_identity, suite))
        return next((measured for measured in found if measured is not None), None)

    def _read(self, key: str, subject_identity: str, suite: Suite) -> Measurement | None:
        try:
            data = self._store.read_bytes(key)
        except FileNotFoundError:
            return None
        try:
            return _unpacked(data, about=_about(subject_identity, suite), num_items=len(suite))
        except _UnusableError as error:
            logger.warning("%s/%s is not used, and measured again: %s", self._store.root_uri, key, error)
            return None

    def write(self, subject_identity: str, suite: Suite, measured: Measurement) -> None:
        keys = self._keys(subject_identity, suite)
        if not measured.is_final and len(keys) < 2:
            return
        data = _packed(measured, about=_about(subject_identity, suite))
        # Whoever lost the lease may be running beside its successor, and must write nothing any more.
        self._check_lease()
        self._store.write_bytes(keys[0 if measured.is_final else 1], data)

    def write_done(self, rank: int) -> None:
        """Say that a worker of this evaluation has measured its share."""
        self._check_lease()
        self._store.write_bytes(self._done_key(rank), b"")

    def is_done(self, rank: int) -> bool:
        return self._store.exists(self._done_key(rank))

    def forget_done(self, rank: int) -> None:
        if self.is_done(rank):
            self._check_lease()
            self._store.delete(self._done_key(rank))

    def _done_key(self, rank: int) -> str:
        return f"{ROOM}/{self._evaluation}/done-{rank}"

    def _keys(self, identity: str, suite: Suite) -> list[str]:
        """Of what is there for every evaluation, and of what is there for this one alone."""
        digests = [suite.digest, *([f"{suite.digest}-{self._evaluation[:16]}"] if self._evaluation else [])]
        return [f"{ROOM}/{identity}/{digest}.parquet" for digest in digests]


class _UnusableError(Exception):
    """What is wrong with a kept measurement."""


def _about(identity: str, suite: Suite) -> dict[str, str]:
    # Not its name: the digest decides, and a benchmark may be called otherwise in another run.
    return {"model": identity, "digest": suite.digest}


def _packed(measured: Measurement, *, about: dict[str, str]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = (pa.string(), pa.float64(), pa.string(), pa.int64(), pa.string())
    columns = [
        pa.array([getattr(score, name) for score in measured.scores], type=kind)
        for name, kind in zip(_COLUMNS, types, strict=True)
    ]
    told = {**about, "skipped": dict(measured.skipped)}
    table = pa.table(dict(zip(_COLUMNS, columns, strict=True))).replace_schema_metadata({_ABOUT: json.dumps(told)})
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def _unpacked(data: bytes, *, about: dict[str, str], num_items: int) -> Measurement:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(pa.BufferReader(data))
        told = json.loads((table.schema.metadata or {}).get(_ABOUT, b"{}"))
        rows = table.select(_COLUMNS).to_pylist()
        skipped = Counter({str(reason): int(count) for reason, count in told.pop("skipped").items()})
        scores = [
            Score(row["item"], float(row["value"]), row["cluster"], int(row["tokens"]), row["response"]) for row in rows
        ]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, pa.ArrowException) as error:
        raise _UnusableError(f"it cannot be read: {error}") from error
    if told != about:
        raise _UnusableError(f"it is of {told}")
    if len(scores) + skipped.total() != num_items or len({score.item for score in scores}) != len(scores):
        raise _UnusableError(f"it has {len(scores)} scores and {skipped.total()} skipped items of {num_items}")
    if not all(math.isfinite(score.value) for score in scores):
        raise _UnusableError("it has values that are not finite")
    return Measurement(scores, skipped)
