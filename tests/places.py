"""Where tests find the checkout, and the real data and cases that may lie next to it."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared"
