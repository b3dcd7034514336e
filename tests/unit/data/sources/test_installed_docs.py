"""Docs out of source files: what is a document, what is a symbol, what it is called."""

from pathlib import Path

import pytest

from stages.config.curate import CurateConfig
from stages.config.errors import ConfigError
from stages.data.sources.installed_docs import (
    Package,
    PackageFiles,
    chosen_packages,
    clean,
    first_sentence,
    plan,
    public_name,
    read,
)
from stages.data.sources.records import BadRecord, SourceDocument, Symbol

_LONG = "It explains at length what happens to each of the values and why that is so. " * 6
_MODULE = f'''"""About the module."""

def gather(values, *, limit=10, _hidden=None):
    """Gather the values of all the workers.

    {_LONG}
    """

def short(x): "Return the one value that was given."

class Scheduler:
    """Decides which :class:`~pkg.Task` runs next. It never waits.

    {_LONG}
    """

    def __init__(self, size: int = 3): ...

    def push(self, task):
        """Add a task to the end of the queue."""

    def _private(self):
        """Never mentioned anywhere at all."""

def undocumented(): ...
'''


def _read(tmp_path: Path, files: dict[str, str | bytes]) -> list[SourceDocument | BadRecord | Symbol]:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    package = Package("pkg", "1.0", str(tmp_path))
    return list(read(PackageFiles(package, tuple(files), heldout=False), CurateConfig(heldout_packages=("pkg",))))


def test_long_symbols_are_documents_and_short_ones_join_their_module(tmp_path: Path) -> None:
    records = _read(tmp_path, {"pkg/work.py": _MODULE})
    documents = {record.symbol: record.text for record in records if isinstance(record, SourceDocument)}
    assert set(documents) == {"pkg.work", "pkg.work.gather", "pkg.work.Scheduler"}
    assert documents["pkg.work"] == (
        "pkg.work\n\nAbout the module.\n\npkg.work.short(x)\n\nReturn the one value that was given."
    )
    assert documents["pkg.work.gather"].startswith("pkg.work.gather(values, *, limit=10, _hidden=None)\n\nGather")
    scheduler = documents["pkg.work.Scheduler"]
    assert scheduler.startswith("class pkg.work.Scheduler(size=3)\n\nDecides which `pkg.Task` runs next.")
    assert scheduler.endswith("push(task)\n\nAdd a task to the end of the queue.")


def test_symbols_are_public_and_carry_their_first_sentence(tmp_path: Path) -> None:
    symbols = [record for record in _read(tmp_path, {"pkg/work.py": _MODULE}) if isinstance(record, Symbol)]
    assert {symbol.name: symbol.summary for symbol in symbols} == {
        "pkg.work.gather": "Gather the values of all the workers.",
        "pkg.work.short": "Return the one value that was given.",
        "pkg.work.Scheduler": "Decides which pkg.Task runs next.",
        "pkg.work.Scheduler.push": "Add a task to the end of the queue.",
    }
    assert [symbol.kind for symbol in symbols] == ["function", "function", "class", "method"]


def test_names_are_those_of_the_package_that_exports_them(tmp_path: Path) -> None:
    (tmp_path / "pkg" / "_core").mkdir(parents=True)
    (tmp_path / "pkg" / "__init__.py").write_text("from pkg._core.sorting import argsort")
    assert public_name(str(tmp_path), "pkg._core.sorting", "argsort") == "pkg.argsort"
    assert public_name(str(tmp_path), "pkg._core.sorting", "helper") == ""
    assert public_name(str(tmp_path), "pkg.io", "load") == "pkg.io.load"


def test_damaged_source_is_counted_and_reading_goes_on(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {
        "pkg/broken.py": "def (:",
        "pkg/nul.py": b"x = 1\0",
        "pkg/latin.rst": "Caf\xe9".encode("latin-1"),
        "pkg/good.md": "Fine.",
    }
    records = _read(tmp_path, files)
    assert [record.reason for record in records if isinstance(record, BadRecord)] == [
        "unparseable_source",
        "unparseable_source",
        "invalid_utf8",
    ]
    assert [record.text for record in records if isinstance(record, SourceDocument)] == ["Fine."]


@pytest.mark.parametrize(
    ("paragraph", "sentence"),
    [
        ("Return the ``x`` of :func:`numpy.sin`, e.g. Pi. More text.", "Return the x of numpy.sin, e.g. Pi."),
        ("Compute the mean of the given values", "Compute the mean of the given values."),
        ("Too short.", ""),
        ("Parameters of this function are given below.", ""),
        (":param x: what is given to the function here", ""),
        ("The following values are allowed in this place:", ""),
        ("word " * 80, ""),
    ],
)
def test_a_summary_is_one_usable_sentence(paragraph: str, sentence: str) -> None:
    assert first_sentence(paragraph) == sentence


def test_roles_and_blank_runs_are_cleaned() -> None:
    assert clean("See :py:class:`~a.b.C`  \n\n\n\nEnd ") == "See `a.b.C`\n\nEnd"


def test_unknown_package_is_named_with_its_neighbour() -> None:
    with pytest.raises(ConfigError, match=r"'pydantc' is not installed.*did you mean 'pydantic'"):
        chosen_packages(CurateConfig(packages=("pydantc",)))


def test_generated_clients_and_tests_are_left_out() -> None:
    chosen = {package.name for package in chosen_packages(CurateConfig())}
    assert not chosen & {"kubernetes", "kubernetes-asyncio"}
    files = [path for unit in plan(CurateConfig(packages=("numpy",))) for path in unit.files]
    assert any(path == "numpy/__init__.py" for path in files)
    assert not [path for path in files if "/tests/" in path]


def test_modules_that_the_parser_does_not_survive_are_counted(tmp_path: Path) -> None:
    sources = {
        "deep.py": "x = " + "-" * 100_000 + "1",
        "nul.py": "x = '\0'",
        "cut.py": "def f(",
        "good.py": '"""Docs."""',
    }
    for name, text in sources.items():
        (tmp_path / name).write_text(text)
    unit = PackageFiles(Package("odd", "1", str(tmp_path)), tuple(sorted(sources)), heldout=False)
    records = list(read(unit, CurateConfig()))
    reasons = [record.reason for record in records if isinstance(record, BadRecord)]
    assert reasons == ["unparseable_source"] * 3


def test_a_package_without_a_name_is_not_installed() -> None:
    with pytest.raises(ConfigError, match="packages: '' is not installed"):
        chosen_packages(CurateConfig(packages=("",)))
