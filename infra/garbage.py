"""`make gc`: what `stages.artifacts.retention` finds in the store of the environment, for people to read first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from stages.artifacts.addresses import open_default_store
from stages.artifacts.deletion import delete
from stages.artifacts.retention import Policy, Waste, find
from stages.config.errors import StageError
from stages.tracking.client import all_registered


def collect(policy: Policy, *, remove: bool, say: Callable[[str], None]) -> int:
    """List the waste, and delete it when `remove`; the exit status."""
    try:
        store = open_default_store()
        found = find(store, all_registered, policy)
        for entry in found:
            say(f"{entry.what:<23} {_amount(entry.size):>10}  {entry.key}  ({entry.why})")
        if not remove:
            say(
                f"{_sum(found)}; nothing was deleted: this is what `--delete` would do"
                if found
                else "nothing to delete"
            )
            return 0
        gone = delete(store, found, all_registered, policy)
    except StageError as error:
        say(f"error: {error.message}\n{error.advice}")
        return 1
    say(f"deleted: {_sum(gone)}")
    if kept := len(found) - len(gone):
        say(f"kept: {kept}, because they came to be needed or are being built")
    return 0


def _sum(waste: list[Waste]) -> str:
    kinds = Counter(entry.what for entry in waste)
    words = ", ".join(f"{number} x {what}" for what, number in kinds.items()) or "nothing"
    return f"{words}; {_amount(sum(entry.size for entry in waste))}"


def _amount(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
