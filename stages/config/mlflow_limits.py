"""What MLflow's columns and checks allow, in one place, and how a value that is longer is made to fit.

The numbers are MLflow 3's (mlflow/utils/validation.py and the columns of its tables). SQLite enforces no length of a
column, Postgres and MySQL do: where the two differ, the smaller one counts.
"""

import hashlib
import posixpath
import re

KEY = 250
"""Metrics, params and tags of runs and models."""
PARAM_VALUE = 5000  # MLflow 3 allows 6000
TAG_VALUE = 5000  # of runs: 8000; but the column of a model version's tags holds 5000
VERSION_DESCRIPTION = 5000
"""Of a model version: the column's length, no check is in front of it."""
DESCRIPTION = 8000
"""The tag `mlflow.note.content` of a run, which MLflow shows as its description."""
RUN_NAME = 250
EXPERIMENT_NAME = 256  # the check allows 500, the column 256
DATASET_NAME = 500
DATASET_SOURCE = 65_535
DATASET_DIGEST = 32  # the column holds 36
INPUT_TAG_VALUE = 500
METRICS_PER_CALL = 1000
PARAMS_AND_TAGS_PER_CALL = 100
INPUTS_PER_CALL = 100
BYTES_PER_CALL = 900_000
"""A batch may have 1,000,000 bytes as JSON."""


def shortened(value: str, limit: int) -> str:
    """Return a value that fits and that a database takes; what is cut ends in a mark with length and hash."""
    value = value.encode("utf-8", "replace").decode().replace("\0", "\ufffd")  # Postgres has no NUL
    if len(value) <= limit:
        return value
    mark = f"… [cut: {len(value)} characters, sha256 {hashlib.sha256(value.encode()).hexdigest()[:12]}]"
    return value[: limit - len(mark)] + mark


def key(name: str, limit: int = KEY) -> str:
    """Return a key that MLflow takes: some contain kinds of preference pairs or sources, which users name."""
    clean = re.sub(r"[^A-Za-z0-9_\-. /:]", "-", name)
    # MLflow refuses keys that would be another path as a path: `a//b`, `../a`, `/a`.
    if posixpath.normpath(clean) != clean or clean.startswith(("/", "..")) or clean == ".":
        clean = "/".join("-" if part in ("", ".", "..") else part for part in clean.split("/"))
    if len(clean) <= limit:
        return clean
    return f"{clean[: limit - 13]}-{hashlib.sha256(name.encode('utf-8', 'replace')).hexdigest()[:12]}"
