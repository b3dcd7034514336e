"""Arrays of unequal length in memory-mapped shards: the layout of token ids in a `tokens` artifact."""

from pathlib import Path

import numpy as np

from stages.config.errors import DataError

_SHARD_ITEMS = 1 << 28


class RaggedWriter:
    """Append arrays, then `close`; files are `<name>-00000.npy`, ... and `<name>-offsets.npy`."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype, *, shard_items: int = _SHARD_ITEMS) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._name, self._dtype, self._shard_items = folder, name, dtype, shard_items
        self._pending: list[np.ndarray] = []
        self._num_pending = 0
        self._num_shards = 0
        self._lengths: list[int] = []

    def append(self, values: np.ndarray) -> None:
        # An array is never cut by `append`; one that is longer than a shard makes a longer shard.
        if self._num_pending and self._num_pending + len(values) > self._shard_items:
            self._flush()
        stored = np.asarray(values, dtype=self._dtype)
        # numpy would wrap a value that needs more bits into another one.
        assert np.array_equal(stored, values), f"{self._name} holds values that do not fit into {self._dtype}"
        self._pending.append(stored)
        self._num_pending += len(values)
        self._lengths.append(len(values))

    def close(self) -> None:
        self._flush()
        offsets = np.concatenate([[0], np.cumsum(np.asarray(self._lengths, dtype=np.int64))])
        np.save(self._folder / f"{self._name}-offsets.npy", offsets.astype(np.int64))

    def _flush(self) -> None:
        if not self._num_pending and self._num_shards:  # but a first shard exists even without items
            return
        values = np.concatenate(self._pending) if self._pending else np.empty(0, dtype=self._dtype)
        np.save(self._folder / f"{self._name}-{self._num_shards:05d}.npy", values)
        self._num_shards += 1
        self._pending, self._num_pending = [], 0


class Ragged:
    """Read-only view; nothing is copied into memory before it is asked for."""

    def __init__(self, folder: Path, name: str) -> None:
        paths = sorted(folder.glob(f"{name}-[0-9]*.npy"))
        if not paths:
            raise DataError(f"{folder}/{name}-*.npy does not exist", advice="Run `tokenize` again.")
        self._shards = [np.load(path, mmap_mode="r") for path in paths]
        self._starts = np.concatenate([[0], np.cumsum([len(shard) for shard in self._shards])])
        self.offsets: np.ndarray = np.load(folder / f"{name}-offsets.npy")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.slice(int(self.offsets[index]), int(self.offsets[index + 1]))

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @property
    def num_items(self) -> int:
        return int(self.offsets[-1])

    def slice(self, start: int, stop: int) -> np.ndarray:
        """Return items [start, stop) of the concatenation, as int64."""
        pieces = []
        # side="right" skips empty shards, whose start equals that of the next one.
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        while start < stop:
            end = min(stop, int(self._starts[shard + 1]))
            base = int(self._starts[shard])
            pieces.append(self._shards[shard][start - base : end - base])
            start, shard = end, shard + 1
        return np.concatenate(pieces).astype(np.int64) if pieces else np.empty(0, dtype=np.int64)
