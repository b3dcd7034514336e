"""Foreign texts on pages and in Markdown: shown as they are, never obeyed as mark-up.

Airflow reads Markdown as GitHub does, MLflow with Showdown, and they disagree on what a backslash may stand before. The
escapes made here mean the same to both: entities for `<`, `>` and `&`, backslashes before what Showdown knows as well.
"""

import re
from collections.abc import Iterable, Sequence
from urllib.parse import quote

from stages.config.text import printable

_PUNCTUATION = re.compile(r"[\\`*_{}\[\]()#+\-.!|~=:]")
_ENTITIES = str.maketrans({"<": "&lt;", ">": "&gt;", "&": "&amp;"})
_LINKED = re.compile(r"(?i)(https?|www)(?=\\[:.])|(?=@[\w-]+\\\.)")
"""Where readers find addresses to link by themselves, after they have undone escapes; an empty comment parts them."""
_COPIED = re.compile(r"[\w./:@%+=,~#&?;()-]+", re.ASCII)


def plain(text: str, *, at_most: int = 0) -> str:
    """One line of text, every character that means something in Markdown or HTML escaped; says what it left out."""
    line = printable(" ⏎ ".join(part.strip() for part in text.splitlines() if part.strip()))
    left_out = len(line) - at_most if at_most and len(line) > at_most else 0
    escaped = _PUNCTUATION.sub(r"\\\g<0>", line[: len(line) - left_out]).translate(_ENTITIES)
    shown = _LINKED.sub(r"\g<0><!---->", escaped)
    return f"{shown} … *{left_out} more characters*" if left_out else shown


def code(text: str) -> str:
    """An address or a digest as people copy it; with characters that could end a code span or a cell it is `plain`."""
    return f"`{text}`" if _COPIED.fullmatch(text) else plain(text)


def link(words: str, address: str) -> str:
    """A link that ends where the address does."""
    return f"[{plain(words)}]({quote(address, safe='/:?#[]@!$&*+,;=%~')})"


def block(text: str) -> str:
    """A text with its line breaks, fenced by more back-ticks than it holds in a row."""
    text = printable(text)
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are Markdown already: pass foreign text through `plain` or `code` first."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
