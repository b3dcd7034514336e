"""Raw text for tests of retraining: new documents, and one that earlier data has seen."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

WORDS = ("river", "mill", "letter", "city", "house", "winter", "sailor", "teacher", "garden", "window", "kitchen")


def prose(seed: int) -> str:
    """English sentences that say nothing and repeat nothing."""
    rng = random.Random(seed)
    shape = "The {} of the {} was taken to the {} before anybody in the {} had heard of that {}."
    return " ".join(shape.format(*rng.sample(WORDS, 5)) for _ in range(8))


def a_document_of(curated: Path) -> str:
    """The text of a training document in a fetched `curated` artifact, as it was before curation."""
    with gzip.open(next((curated / "documents" / "train").glob("*.jsonl.gz")), "rt") as lines:
        return next(text for text in (json.loads(line)["text"] for line in lines) if "<" not in text)  # not scrubbed


def jsonl(texts: list[str]) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)
