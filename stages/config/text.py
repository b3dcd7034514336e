"""What people read: counts, sizes and durations, in one spelling each, and text of unknown origin, made harmless.

Escaping for HTML or Markdown comes on top, where a page is written.
"""

import re

_CONTROLS_EXCEPT_BREAKS = r"\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029"
CONTROLS = rf"{_CONTROLS_EXCEPT_BREAKS}\t\n\r"
"""For use between the brackets of a pattern: what terminals obey, XML forbids and PostgreSQL (NUL) cannot store, and
what ends a line."""
HALVES = r"\ud800-\udfff"
"""The same for halves of characters (surrogates), which UTF-8 does not have."""
# Marks that turn the direction of writing would let a text reach over what stands around it.
_TURNS = r"\u202a-\u202e\u2066-\u2069"
_UNPRINTABLE = re.compile(rf"[{_CONTROLS_EXCEPT_BREAKS}{_TURNS}{HALVES}\ufffe\uffff]|\r(?!\n)")


def printable(text: str) -> str:
    """Return text whose control characters are spelled out as in JSON (`\\u001b`), line breaks and tabs excepted."""
    return _UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def one_line(text: str, *, at_most: int = 0) -> str:
    """Return text of unknown origin for one line: breaks become spaces, the rest as `printable`; says what it cut."""
    line = printable(" ".join(text.split()))
    if not at_most or len(line) <= at_most:
        return line
    return f"{line[:at_most]}… ({len(line) - at_most} more characters)"


def compact(number: float) -> str:
    """Three digits with a decimal prefix: 10059840 -> `10.1 M`."""
    for size, prefix in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {prefix}"
    return f"{number:.3g}"


def byte_size(size: float) -> str:
    """Bytes in binary units, as memory is counted: `512 B`, `1.5 KiB`, `3.00 GiB`."""
    if abs(size) < 1024:
        return f"{size:.0f} B"
    for unit in ("KiB", "MiB"):
        size /= 1024
        if abs(size) < 1024:
            return f"{size:.1f} {unit}"
    size /= 1024
    return f"{size:.2f} GiB" if abs(size) < 1024 else f"{size / 1024:.2f} TiB"


def duration(seconds: float) -> str:
    """Two units at most: `4.2 s`, `42 s`, `3 min 20 s`, `1 h 02 min`."""
    if seconds < 9.95:  # from here on, one decimal would show 10.0
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
