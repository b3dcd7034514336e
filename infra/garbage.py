"""`make gc`: lists, and with `--delete` deletes, what `stages.artifacts.retention` finds in the store."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable

from stages.artifacts.addresses import open_default_store
from stages.artifacts.deletion import delete
from stages.artifacts.retention import Policy, Waste, find
from stages.config.errors import StageError
from stages.config.text import byte_size
from stages.tracking.client import all_registered


def collect(policy: Policy, *, remove: bool, say: Callable[[str], None]) -> int:
    """List the waste, and delete it when `remove`; the exit status."""
    try:
        store = open_default_store()
        found = find(store, all_registered, policy)
        for entry in found:
            say(f"{entry.what:<23} {byte_size(entry.size):>10}  {entry.key}  ({entry.why})")
        if not remove:
            say(
                f"{_sum(found)}; nothing was deleted: this is what `--delete` would do"
                if found
                else "nothing to delete"
            )
            return 0
        gone = delete(store, found, all_registered, policy)
    except StageError as error:
        print(f"error: {error.message}\n{error.advice}", file=sys.stderr)
        return 1
    say(f"deleted: {_sum(gone)}")
    if kept := len(found) - len(gone):
        say(f"kept: {kept}, because they came to be needed or are being built")
    return 0


def _sum(waste: list[Waste]) -> str:
    kinds = Counter(entry.what for entry in waste)
    words = ", ".join(f"{number} x {what}" for what, number in kinds.items()) or "nothing"
    return f"{words}; {byte_size(sum(entry.size for entry in waste))}"
