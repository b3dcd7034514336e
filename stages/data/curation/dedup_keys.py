"""Which of several equal documents stays, so that held-out text has no found duplicate in training.

Held out before training before planted, then by order. The same rule serves exact duplicates (the key is a hash of the
text) and near duplicates (the key is the number of a cluster).
"""

import hashlib
import re

import numpy as np

_SPACES = re.compile(r"\s+")
KEY = np.dtype("S16")
"""A column of text keys. numpy drops trailing zero bytes of a single value, but compares and writes whole columns
correctly, because all keys have the same length."""


def text_key(text: str) -> bytes:
    """Hash of the text without regard to case and white space."""
    simplified = _SPACES.sub(" ", text.lower()).strip()
    return hashlib.blake2b(simplified.encode("utf-8", "surrogatepass"), digest_size=KEY.itemsize).digest()


def extra_copies(keys: np.ndarray, *, heldout: np.ndarray, planted: np.ndarray) -> np.ndarray:
    """Mark all documents but the best one of each key, given columns in the order of the documents."""
    # Sorted by key and then by rank (the last key of lexsort counts most), so the best one comes first of its key.
    order = np.lexsort((np.arange(len(keys)), ~heldout, planted, keys))
    ordered = keys[order]
    extra = np.zeros(len(keys), dtype=bool)
    extra[order[1:]] = ordered[1:] == ordered[:-1]
    return extra
