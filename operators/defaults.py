"""What the tasks of every DAG have in common."""

from datetime import timedelta
from typing import Any

from operators.failures import MAX_RETRIES, StageRetryPolicy


def default_args(**changes: Any) -> dict[str, Any]:
    """Return a DAG's `default_args`: failures decide about their retries, and a retry comes soon."""
    return {
        "owner": "athanor",
        "retries": MAX_RETRIES,
        "retry_delay": timedelta(seconds=5),
        "retry_policy": StageRetryPolicy(),
        **changes,
    }
