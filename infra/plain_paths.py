"""Links to the checkout, its state and its Python, for paths that would not survive the way to a stage.

Between `make up` and a stage, shells, configuration files, URLs and Ray's own splitting of command lines read some
characters as theirs: Airflow expands `$`, supervisord's file ends a value at ` ;`, raylets split at quotes, scripts of
a virtual environment start with its path. So where a path has other characters than the plain ones, programs get a link
to it in the runtime directory, whose own name is plain.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

_PLAIN = re.compile(r"[A-Za-z0-9/._+@=,-]*")


def is_plain(path: Path) -> bool:
    """Whether every program of the stack reads the path as it is."""
    return _PLAIN.fullmatch(str(path)) is not None


def plain(path: Path, *, links: Path, name: str) -> Path:
    """`path` itself, or a link to it, `links/name`."""
    if is_plain(path):
        return path
    link = links / name
    if not (link.is_symlink() and os.readlink(link) == str(path)):
        with tempfile.TemporaryDirectory(dir=links) as aside:  # replaced in one step: programs may be using it
            (Path(aside) / name).symlink_to(path)
            (Path(aside) / name).replace(link)
    return link
