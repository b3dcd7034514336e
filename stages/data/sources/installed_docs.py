"""The corpus that every machine has: the docs inside its installed Python packages, read by `ast`, never imported.

A function or a class with its methods is a document of its own when it is long enough; a module's docstring and all
its short ones together make the module's document. Names are the ones users type: what a public package takes
from its private modules is shown there (numpy._core.fromnumeric.argsort is `numpy.argsort`).
"""

import ast
import difflib
import inspect
import json
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from email.parser import BytesParser
from email.policy import compat32
from functools import lru_cache
from importlib import metadata
from pathlib import Path, PurePosixPath

from stages.config.curate import CurateConfig
from stages.config.errors import ConfigError
from stages.data.sources.records import BadRecord, Record, SourceDocument, Symbol, is_drawn

SOURCE = "installed-docs"
STDLIB = "python"
MIN_SYMBOL_CHARACTERS = 400
_UNIT_BYTES = 3_000_000
_TEXT_SUFFIXES = frozenset({".rst", ".md", ".txt"})
# Test code has few docstrings and much source; licences and author lists are not prose and are full of addresses.
_SKIPPED_FOLDERS = frozenset(
    {"tests", "test", "testing", "_vendor", "vendored", "__pycache__", "node_modules", "idlelib"}
)
_SKIPPED_NAMES = re.compile(r"(?i)licen[cs]e|copying|notice|authors|contributors|requirements|cmakelists|entry_points")
_ROLE = re.compile(r":[a-zA-Z][\w:.+-]*:`(?:[^`<]*<)?[~!]?([^`>]+)>?`")
_MARKUP = re.compile(r"``([^`]*)``|\*\*([^*\n]+)\*\*|`([^`\n]+)`_{0,2}")
_SENTENCE_END = re.compile(r"(?<![A-Z])(?<!e\.g)(?<!i\.e)(?<!etc)(?<!vs)(?<!cf)(?<!et al)[.!?](?=\s+[A-Z(\"'`])")


@dataclass(frozen=True)
class Package:
    """An installed distribution with the folder its files are relative to."""

    name: str
    version: str
    root: str

    @property
    def group(self) -> str:
        return f"{self.name}=={self.version}"


@dataclass(frozen=True)
class PackageFiles:
    """A share of a package's files, small enough to be one unit of work."""

    package: Package
    files: tuple[str, ...]
    heldout: bool


def normalised(name: str) -> str:
    """Distribution names compare without regard to case and to '-', '_' and '.' (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def chosen_packages(config: CurateConfig) -> list[Package]:
    """The distributions to read, by name; raises ConfigError for one that is not installed."""
    excluded = set(map(normalised, config.exclude_packages))
    packages: dict[str, Package] = {}
    if config.packages:
        for name in config.packages:
            if normalised(name) not in excluded:
                packages[normalised(name)] = _package(name)
    else:
        for distribution in metadata.distributions():
            name = normalised(distribution.metadata["Name"] or "")
            if name and name not in excluded and name not in packages and not _editable(distribution):
                packages[name] = Package(name, distribution.version, str(distribution.locate_file("")))
    chosen = [packages[name] for name in sorted(packages)]
    if config.include_stdlib:
        chosen.append(Package(STDLIB, platform.python_version(), sysconfig.get_path("stdlib")))
    missing = {normalised(name) for name in config.heldout_packages} - {package.name for package in chosen}
    if missing:
        raise ConfigError(
            f"heldout_packages={sorted(missing)} are not among the packages that are read",
            advice="Install them, add them to packages, or hold out others.",
        )
    return chosen


def _package(name: str) -> Package:
    try:
        distribution = metadata.distribution(name)
    except (metadata.PackageNotFoundError, ValueError):  # ValueError: an empty name
        installed = sorted({normalised(entry.metadata["Name"] or "") for entry in metadata.distributions()})
        near = difflib.get_close_matches(normalised(name), installed, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"packages: {name!r} is not installed where curate runs{hint}",
            advice="Install it there or take it out of packages.",
        ) from None
    return Package(normalised(name), distribution.version, str(distribution.locate_file("")))


def _editable(distribution: metadata.Distribution) -> bool:
    """An editable install changes without changing its version, so it has no identity."""
    direct = distribution.read_text("direct_url.json")
    return bool(direct) and bool(json.loads(direct).get("dir_info", {}).get("editable"))


def plan(config: CurateConfig) -> list[PackageFiles]:
    """Units of work in a fixed order: whole small packages, large ones in parts of about 3 MB of source."""
    heldout = set(map(normalised, config.heldout_packages))
    units: list[PackageFiles] = []
    for package in chosen_packages(config):
        part: list[str] = []
        size = 0
        for path in _files(package):
            part.append(path)
            size += (Path(package.root) / path).stat().st_size
            if size > _UNIT_BYTES:
                units.append(PackageFiles(package, tuple(part), package.name in heldout))
                part, size = [], 0
        if part:
            units.append(PackageFiles(package, tuple(part), package.name in heldout))
    return units


def _files(package: Package) -> list[str]:
    root = Path(package.root)
    if package.name == STDLIB:
        found = (path.relative_to(root).as_posix() for path in root.rglob("*") if "site-packages" not in path.parts)
    else:
        found = (str(path) for path in metadata.distribution(package.name).files or ())
    return sorted(path for path in set(found) if _wanted(PurePosixPath(path)) and (root / path).is_file())


def _wanted(path: PurePosixPath) -> bool:
    if ".." in path.parts or _SKIPPED_FOLDERS.intersection(path.parts):
        return False
    if path.parts[0].endswith(".dist-info"):
        return path.name == "METADATA" and len(path.parts) == 2
    return path.suffix == ".py" or (path.suffix in _TEXT_SUFFIXES and not _SKIPPED_NAMES.search(path.name))


def read(unit: PackageFiles, config: CurateConfig) -> Iterator[Record]:
    """Documents, symbols and unreadable files of one unit, in the order of the files."""
    for path in unit.files:
        data = (Path(unit.package.root) / path).read_bytes()
        heldout = unit.heldout
        if not config.heldout_packages:
            heldout = is_drawn(config.heldout_fraction, config.seed, "heldout", unit.package.name, path)
        identity = f"{unit.package.group}/{path}"
        if path.endswith(".py"):
            yield from _read_module(data, unit.package, identity=identity, path=path, heldout=heldout)
            continue
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            yield BadRecord(identity, "invalid_utf8", len(data), str(error))
            continue
        if path.endswith("METADATA"):
            text = _readme(data)
        if text.strip():
            yield SourceDocument(identity, text.strip(), SOURCE, unit.package.group, path, heldout=heldout)


def _readme(data: bytes) -> str:
    """The description in METADATA, which is the project's README."""
    message = BytesParser(policy=compat32).parsebytes(data)
    payload = message.get_payload(decode=True)
    body = payload.decode("utf-8", "replace") if isinstance(payload, bytes) else ""
    description = message.get("Description", "")
    return body if body.strip() else inspect.cleandoc(str(description))


def _read_module(data: bytes, package: Package, *, identity: str, path: str, heldout: bool) -> Iterator[Record]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(data)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # NUL bytes; nested too deeply
        yield BadRecord(identity, "unparseable_source", len(data), str(error))
        return
    module, group = module_name(path), package.group
    overview = [documentation] if (documentation := ast.get_docstring(tree)) else []
    seen: dict[str, int] = {}
    for node in tree.body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        name = public_name(package.root, module, node.name)
        text = render_symbol(node, name or f"{module}.{node.name}")
        if not text:
            continue
        count = seen[node.name] = seen.get(node.name, 0) + 1
        key = f"{identity}#{node.name}" + (f"~{count}" if count > 1 else "")
        if len(text) >= MIN_SYMBOL_CHARACTERS:
            yield SourceDocument(key, text, SOURCE, group, path, symbol=f"{module}.{node.name}", heldout=heldout)
        else:
            overview.append(text)
        if name and not node.name.startswith("_"):
            yield from _symbols(node, identity=key, name=name, group=group, heldout=heldout)
    if overview:
        text = f"{module}\n\n" + "\n\n".join(overview)
        yield SourceDocument(identity, clean(text), SOURCE, group, path, symbol=module, heldout=heldout)


def module_name(path: str) -> str:
    """The dotted name of a source file."""
    return PurePosixPath(path).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")


def public_name(root: str, module: str, symbol: str) -> str:
    """The dotted name users type, empty when there is none.

    A symbol of a private module is public when the `__init__.py` above that module mentions it, and is shown there.
    """
    parts = module.split(".")
    private = next((index for index, part in enumerate(parts) if index and part.startswith("_")), None)
    if private is None:
        return f"{module}.{symbol}"
    exporter = "/".join(parts[:private])
    return ".".join([*parts[:private], symbol]) if symbol in _mentioned(root, exporter) else ""


@lru_cache(maxsize=64)
def _mentioned(root: str, package: str) -> frozenset[str]:
    """All identifiers in a package's __init__.py: its imports, its __all__ and the lists in its docstring."""
    path = Path(root, package, "__init__.py")
    return (
        frozenset(re.findall(r"\w+", path.read_text(encoding="utf-8", errors="replace")))
        if path.is_file()
        else frozenset()
    )


_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def render_symbol(node: _Definition, name: str) -> str:
    """Dotted name, signature and docstring; for a class also its documented public methods. Empty without docstring."""
    parts: list[str] = []
    if documentation := ast.get_docstring(node):
        parts.append(f"{_heading(node, name)}\n\n{documentation}")
    if isinstance(node, ast.ClassDef):
        for child in node.body:
            if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) or child.name.startswith("_"):
                continue
            if documentation := ast.get_docstring(child):
                parts.append(f"{_heading(child, child.name)}\n\n{documentation}")
    return clean("\n\n".join(parts))


def _heading(node: _Definition, name: str) -> str:
    if not isinstance(node, ast.ClassDef):
        return f"{name}({_parameters(node.args)})"
    for child in node.body:
        if isinstance(child, ast.FunctionDef) and child.name == "__init__":
            return f"class {name}({_parameters(child.args)})"
    return f"class {name}"


def _parameters(arguments: ast.arguments) -> str:
    """Names and short defaults; annotations are left out, they take more room than the names."""
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    shown = [_parameter(entry.arg, default) for entry, default in zip(positional, defaults, strict=True)]
    if arguments.vararg:
        shown.append(f"*{arguments.vararg.arg}")
    elif arguments.kwonlyargs:
        shown.append("*")
    shown += [
        _parameter(entry.arg, default)
        for entry, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    if arguments.kwarg:
        shown.append(f"**{arguments.kwarg.arg}")
    return ", ".join(entry for entry in shown if entry not in ("self", "cls"))


def _parameter(name: str, default: ast.expr | None) -> str:
    if default is None:
        return name
    text = repr(default.value) if isinstance(default, ast.Constant) else ast.unparse(default)
    return f"{name}={text}" if len(text) <= 30 else f"{name}=..."


def clean(text: str) -> str:
    """Strip roles such as :class:`~a.b.C`, trailing blanks and runs of empty lines."""
    if ":`" in text:
        text = _ROLE.sub(lambda match: f"`{match[1].strip()}`", text)
    text = re.sub(r"[ \t]+(?=\n)", "", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _symbols(node: _Definition, *, identity: str, name: str, group: str, heldout: bool) -> Iterator[Symbol]:
    """The symbol itself and, for a class, its public methods, each with a usable summary."""
    kind = "class" if isinstance(node, ast.ClassDef) else "function"
    yield from _symbol(node, identity=identity, name=name, kind=kind, group=group, heldout=heldout)
    if isinstance(node, ast.ClassDef):
        for child in node.body:
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
                key, method = f"{identity}.{child.name}@{child.lineno}", f"{name}.{child.name}"
                yield from _symbol(child, identity=key, name=method, kind="method", group=group, heldout=heldout)


def _symbol(node: _Definition, *, identity: str, name: str, kind: str, group: str, heldout: bool) -> Iterator[Symbol]:
    documentation = ast.get_docstring(node)
    if not documentation:
        return
    first, _, rest = documentation.partition("\n\n")
    if summary := first_sentence(first):
        body = plain(rest)[:600]
        yield Symbol(identity, name, kind, summary=summary, body=body, group=group, heldout=heldout)


def plain(text: str) -> str:
    """One line without reStructuredText markup."""
    text = _ROLE.sub(lambda match: match[1].strip(), text)
    text = _MARKUP.sub(lambda match: match[1] or match[2] or match[3] or "", text)
    return " ".join(text.split())


def first_sentence(paragraph: str) -> str:
    """The first sentence of a summary paragraph of 20 to 300 characters, with its full stop; empty if unusable."""
    text = plain(paragraph)
    if not 20 <= len(text) <= 300 or re.search(r"(?i)^(?::|\.\.|>>>|\||=|-{3}|@|parameters|args:|returns?:)|^\W", text):
        return ""
    end = _SENTENCE_END.search(text)
    text = text[: end.end()] if end else text
    if len(text) < 20 or text[-1] in ":,;(" or len(text.split()) < 3:
        return ""
    return text if text[-1] in ".!?" else f"{text}."
