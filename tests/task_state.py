"""Airflow's task state store, for tests that run an operator without Airflow's server."""

import json
from typing import Any


class Memory:
    """Keeps what one process of a task leaves for the next, as JSON."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def get(self, key: str, default: Any = None) -> Any:
        return self.values.get(key, default)

    def set(self, key: str, value: Any, **retention: Any) -> None:
        self.values[key] = json.loads(json.dumps(value))
