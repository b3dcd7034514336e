"""Secrets that are planted to be looked for: words that have no business anywhere but where they were put."""

from __future__ import annotations

import base64
import gzip
import json
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def canary(name: str) -> str:
    """A secret that is easy to recognise; letters, digits and hyphens, so that no encoding of text changes it."""
    return f"canary-{name}-{secrets.token_hex(8)}"


def as_login(user: str, password: str) -> str:
    """What an HTTP header makes of a login, which is as good as the password."""
    return base64.b64encode(f"{user}:{password}".encode()).decode()


SEALING_KEY = base64.urlsafe_b64encode(secrets.token_bytes(32)).decode()
"""What seals keys of endpoints, on both sides, in tests with a Ray of their own."""


@dataclass
class Search:
    """Looks for words by name in everything it is given; `found` are (place, name), `seen` counts what it looked at."""

    needles: Mapping[str, str]
    found: list[tuple[str, str]] = field(default_factory=list)
    seen: int = 0

    def text(self, place: str, text: str) -> None:
        self.data(place, text.encode())

    def data(self, place: str, data: bytes) -> None:
        self.seen += 1
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        self.found += [(place, name) for name, needle in self.needles.items() if needle.encode() in data]

    def folder(self, root: Path, name: str, *, except_for: tuple[Path, ...] = ()) -> None:
        """Every file below `root`, databases and logs too, but for those that are there to keep secrets."""
        for path in sorted(root.rglob("*")):
            if path.is_file() and not path.is_symlink() and path not in except_for:
                self.data(f"{name} {path.relative_to(root).as_posix()}", path.read_bytes())


def airflow_answers(call: Callable[..., Any], dag_id: str, run_id: str) -> Iterator[Any]:
    """What anybody who may log in can read of a run: XComs, rendered templates, logs, pools, the connection to Ray."""
    run = f"dags/{dag_id}/dagRuns/{run_id}"
    yield call("GET", run)
    for task in call("GET", f"{run}/taskInstances")["task_instances"]:
        yield task  # rendered_fields among it
        path = f"{run}/taskInstances/{task['task_id']}"
        for entry in call("GET", f"{path}/xcomEntries")["xcom_entries"]:
            yield call("GET", f"{path}/xcomEntries/{entry['key']}", params={"stringify": True})
        if task["try_number"]:
            yield call("GET", f"{path}/logs/{task['try_number']}", headers={"Accept": "application/json"})
    yield call("GET", "pools")


def as_text(answers: Any) -> str:
    return json.dumps(list(answers) if isinstance(answers, Iterator) else answers)
