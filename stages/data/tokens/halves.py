"""The two halves of the training pairs, one for the models that learn from them and one for the gold scorer.

The prompt of a pair alone decides its half, by a hash of its token ids: no prompt is in both, and a pair stays where it
is when other pairs come or go. So a gold scorer of an earlier run has not seen what a later run trains on.
"""

import hashlib

import numpy as np

from stages.config.preferences import PairsHalf
from stages.data.tokens.views import Pair, PairView, Sources


def prompt_digest(pair: Pair) -> bytes:
    """Return what identifies the prompt of a pair: a hash of the tokens that precede the answer."""
    targets = np.flatnonzero(pair.chosen.loss_mask)
    prompt = pair.chosen.ids[: int(targets[0]) if len(targets) else len(pair.chosen.ids)]
    return hashlib.sha256(np.asarray(prompt, dtype="<i8").tobytes()).digest()


def half_of(pair: Pair) -> PairsHalf:
    """Return the half that a pair belongs to."""
    return PairsHalf.SECOND if prompt_digest(pair)[0] & 1 else PairsHalf.FIRST


def indices_of(pairs: PairView, half: PairsHalf) -> np.ndarray:
    """Return which pairs are in a half, in order."""
    if half is PairsHalf.BOTH:
        return np.arange(len(pairs))
    return np.asarray([index for index in range(len(pairs)) if half_of(pairs[index]) is half], dtype=np.int64)


def some_sources(sources: Sources, indices: np.ndarray) -> Sources:
    """Return the sources of some pairs, without those that none of them is of."""
    kept = np.unique(sources.indices[indices])
    names = tuple(sources.names[int(place)] for place in kept)
    return Sources(names, np.searchsorted(kept, sources.indices[indices]).astype(sources.indices.dtype))
