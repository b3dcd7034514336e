"""What the documentation names exists: links and their headings, files, make targets, modules that can be run."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.places import REPOSITORY

PAGES = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")])
_LINK = re.compile(r"\]\(([^)\s]+)\)")
# `stages/losses.py`, `tests/chaos/`, docs/DATA.md; what holds a placeholder such as <stage> is left out
_PATH = re.compile(r"(?<![\w/.<>-])(?:dags|docs|infra|operators|stages|tests)/[\w./<>*-]*")
_COMMANDS = re.compile(r"`[^`\n]*`|^```.*?^```", re.MULTILINE | re.DOTALL)
_RUN = re.compile(r"python3? -m ((?:dags|infra|operators|stages|tests)[\w.]*)")


def names() -> list[str]:
    return [str(page.relative_to(REPOSITORY)) for page in PAGES]


def anchors(page: Path) -> set[str]:
    """The headings as GitHub makes anchors of them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page: Path) -> Iterator[str]:
    for found in _COMMANDS.finditer(page.read_text()):
        yield found.group()


def test_there_are_pages():
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/README.md"} <= set(names())


@pytest.mark.parametrize("page", PAGES, ids=names())
def test_every_link_leads_somewhere(page: Path):
    broken = []
    for target in _LINK.findall(page.read_text()):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=names())
def test_every_file_that_is_named_exists(page: Path):
    named = {path.rstrip(".") for path in _PATH.findall(page.read_text())}
    missing = [
        path for path in sorted(named) if not re.search(r"[<>*]", path) and not (REPOSITORY / path.rstrip("/")).exists()
    ]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=names())
def test_every_make_target_exists(page: Path):
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE))
    named = {
        word
        for text in commands(page)
        for call in re.findall(r"\bmake ((?:[a-z-]+ ?)+)", text)
        for word in call.split()
    }
    assert sorted(named - targets) == []


@pytest.mark.parametrize("page", PAGES, ids=names())
def test_every_module_that_is_run_has_a_command_line(page: Path):
    silent = []
    for module in sorted({name.rstrip(".") for name in _RUN.findall(page.read_text())}):
        file = REPOSITORY / module.replace(".", "/")
        source = file / "__main__.py" if file.is_dir() else file.with_suffix(".py")
        if not source.exists() or '__name__ == "__main__"' not in source.read_text():
            silent.append(module)
    assert silent == []


def test_the_licence_goes_into_wheel_and_images():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert project["license"] == "Apache-2.0"
    assert "Apache License" in (REPOSITORY / "LICENSE").read_text()
    ignored = (REPOSITORY / ".dockerignore").read_text().splitlines()
    copied = [
        line for line in (REPOSITORY / "infra/images/Dockerfile").read_text().splitlines() if "pyproject.toml" in line
    ]
    for file in project["license-files"]:
        assert (REPOSITORY / file).is_file()
        assert f"!{file}" in ignored
        assert all(file in line for line in copied if line.startswith("COPY")), (
            "a build without it fails or leaves it out"
        )
