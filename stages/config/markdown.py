"""What models and people wrote, as Markdown for a page of Airflow: shown as it is, never obeyed as mark-up."""

import re
from collections.abc import Iterable, Sequence

_PUNCTUATION = re.compile(r"([!-/:-@\[-`{-~])")


def plain(text: str, *, at_most: int = 0) -> str:
    """One line of text, every character that means something in Markdown or HTML escaped; says what it left out."""
    line = " ⏎ ".join(part.strip() for part in text.splitlines() if part.strip())
    left_out = len(line) - at_most if at_most and len(line) > at_most else 0
    shown = _PUNCTUATION.sub(r"\\\1", line[: len(line) - left_out])
    return f"{shown} … *{left_out} more characters*" if left_out else shown


def block(text: str) -> str:
    """A text with its line breaks, fenced by more back-ticks than it holds in a row."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are Markdown already: pass foreign text through `plain` first."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
