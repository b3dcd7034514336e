"""What one curation has found out so far: each act reads what earlier acts left here and adds its own."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stages.data.curation.dedup_keys import KEY
from stages.data.curation.extract import Extracted
from stages.data.curation.ledger import Amount, PairsAccount, Step
from stages.data.curation.passes import PassResult
from stages.data.curation.planted import Planted
from stages.data.curation.pool import Pool
from stages.data.curation.workbench import Workbench


@dataclass
class Curation:
    """One execution of the stage. It stays in the driver; worker processes are given the workbench only."""

    bench: Workbench
    pool: Pool
    progress: Callable[..., None]

    seen: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=KEY))
    """Keys of what earlier increments have judged."""
    units: list[Extracted] = field(default_factory=list)
    unread: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By document source: what was passed over, how many and which, by reason."""
    marks: list[np.ndarray] = field(default_factory=list)
    """By unit: why a document must be dropped (see `marks.Mark`)."""
    planted: list[Planted] = field(default_factory=list)
    pairs: "Future[PairsAccount] | None" = None
    filtered: list[PassResult] = field(default_factory=list)
    near_marks: list[np.ndarray] = field(default_factory=list)
    """By shard: which of the documents that passed the filters are near copies."""
    finished: list[PassResult] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    """The account over all units and shards."""
    published: dict[str, Amount] = field(default_factory=dict)
    """Documents by split, the carried ones included."""
    carried: Amount = field(default_factory=Amount)
    """Held-out documents taken over from the previous data."""
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the time of this block to a phase."""
        started = time.monotonic()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - started

    def pairs_account(self) -> PairsAccount:
        """Wait for the pairs; raises what went wrong in their process."""
        assert self.pairs is not None, "no act has started the pairs"
        return self.pairs.result()
