"""Tasks of lm-evaluation-harness, loaded so that a task file is data and not code.

The harness itself trusts task files: they may import any function (`!function`), render templates that reach Python's
internals, and load scripts. Here a file may use data of its own folder or of the hub, templates run in a sandbox, and
Python files next to it run only if the workers' administrators allow exactly that code. Tasks that the installed
package brings are part of the locked environment, as every other package is.
"""

import logging
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from stages.config.benchmarks import LM_EVAL, Benchmark
from stages.config.errors import ConfigError, StageError
from stages.config.places import real_path
from stages.data.sources.benchmarks import FILE_READERS, HARNESS, copied_task, harness_version, installed_folder
from stages.data.sources.hub import hub_splits, loading
from stages.data.sources.streams import plain_name
from stages.models.foreign_code import ALLOWED, code_digest, code_files, is_allowed

logger = logging.getLogger(__name__)

_FORBIDDEN = ("use_prompt", "unsafe_code", "custom_dataset", "doc_to_image", "doc_to_audio")
_DEEPEST = 8
_SEEDS = {"python": 0, "numpy": 1234}
"""Those of the harness's own command line: tasks may draw when they are loaded."""


@dataclass(frozen=True)
class _Function:
    """What a `!function` names, not yet imported."""

    name: str
    folder: Path


def load_tasks(benchmark: Benchmark, into: Path) -> list[Any]:
    """Return the tasks of an address: one, or all of a group. Raises ConfigError for one that cannot be used."""
    harness_version()
    _use_sandbox()
    _hush()
    random.seed(_SEEDS["python"])
    np.random.seed(_SEEDS["numpy"])
    try:
        if benchmark.uri.startswith(LM_EVAL):
            with loading(benchmark.uri):
                return _installed(benchmark.uri.removeprefix(LM_EVAL))
        into.mkdir(parents=True, exist_ok=True)
        return _local(benchmark, copied_task(benchmark.uri, into), into)
    except StageError:
        raise
    except Exception as error:
        # Whatever a task file breaks in the harness, from a missing split to a template without an end.
        raise ConfigError(
            f"benchmarks: {benchmark.uri!r} makes no task of {HARNESS} {harness_version()}: "
            f"{type(error).__name__}: {error}",
            advice="Try it with the harness's own command line; docs/BENCHMARKS.md says what task files may use.",
        ) from error


def _use_sandbox() -> None:
    """Let the harness render templates as Jinja renders those of strangers."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from lm_eval import utils  # pyright: ignore[reportMissingImports]

    if isinstance(utils.env, ImmutableSandboxedEnvironment):
        return
    made = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    made.filters["regex_replace"] = utils.regex_replace
    utils.env = made


def _hush() -> None:
    """The harness logs a line for every default that it uses, and `datasets` draws a bar for every file."""
    from datasets import disable_progress_bars

    logging.getLogger(HARNESS).setLevel(logging.ERROR)
    disable_progress_bars()


def _installed(name: str) -> list[Any]:
    """A task or group of the package, from its own folder alone: an index of all takes half a minute."""
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    folder = installed_folder(name)
    return list(TaskManager(include_path=str(folder), include_defaults=False).load([name])["tasks"].values())


def _local(benchmark: Benchmark, path: Path, root: Path) -> list[Any]:
    """The task of a file, or the tasks of a group, all from the copy of its folder."""
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    config = _read(path, root)
    manager, address = TaskManager(include_defaults=False), benchmark.uri
    made = []
    for one in _members(config, path, root, address):
        made += manager.load([_usable(one, path.parent, root, address)])["tasks"].values()
    if not made:
        raise ConfigError(f"benchmarks: {address!r} is a group without tasks", advice="Name its tasks under `task`.")
    return made


def _members(config: dict[str, Any], path: Path, root: Path, address: str) -> Iterator[dict[str, Any]]:
    if "group" not in config and isinstance(config.get("task"), str):
        yield config
        return
    named = config.get("task")
    if not isinstance(named, list):
        raise ConfigError(
            f"benchmarks: {address!r} has task={named!r}", advice="Give the task a name, or a group a list of tasks."
        )
    known = {str(found.get("task")): found for found in _readable(path, root)}
    for entry in named:
        over = entry if isinstance(entry, dict) else {}
        name = over.get("task", entry)
        if name not in known and "dataset_path" not in over:
            raise ConfigError(
                f"benchmarks: the group {address!r} names the task {name!r}, which no file of its folder defines",
                advice=f"Known there: {', '.join(sorted(known)) or 'none'}.",
            )
        yield {**known.get(name, {}), **over}


def _readable(path: Path, root: Path) -> Iterator[dict[str, Any]]:
    for other in sorted(root.rglob("*.y*ml")):
        if other == path:
            continue
        try:
            found = _read(other, root)
        except ConfigError as error:  # it may not be one of the group's
            logger.warning("%s is not read: %s", other.name, error.message)
            continue
        if isinstance(found.get("task"), str):
            yield found


def _read(path: Path, root: Path, depth: int = 0) -> dict[str, Any]:
    """A task file with what it includes; functions stay names."""

    class Loader(yaml.SafeLoader):
        """Knows `!function`, which is not imported here."""

    def function(loader: yaml.SafeLoader, node: yaml.Node) -> _Function:
        assert isinstance(node, yaml.ScalarNode)
        return _Function(str(loader.construct_scalar(node)), path.parent)

    Loader.add_constructor("!function", function)
    if depth > _DEEPEST:
        raise ConfigError(f"benchmarks: {path.name} includes itself", advice="Remove the `include` that leads back.")
    try:
        with path.open("rb") as file:
            config = Loader(file).get_single_data()
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(
            f"benchmarks: {path.name} is no YAML: {' '.join(str(error).split())}", advice="Correct the task file."
        ) from None
    if not isinstance(config, dict):
        raise ConfigError(f"benchmarks: {path.name} holds no settings", advice="Give a task file of the harness.")
    included = config.pop("include", [])
    merged: dict[str, Any] = {}
    for name in included if isinstance(included, list) else [included]:
        other = _inside(path.parent / str(name), root, what=f"include: {name}")
        merged |= {key: value for key, value in _read(other, root, depth + 1).items() if key != "task_list"}
    return merged | config


def _inside(path: Path, root: Path, *, what: str) -> Path:
    place = Path(real_path(path))
    if not place.is_relative_to(real_path(root)) or not place.is_file():
        raise ConfigError(
            f"benchmarks: {what} is no file of the task's folder",
            advice="Put it next to the task file, by a relative path.",
        )
    return place


def _usable(config: dict[str, Any], folder: Path, root: Path, address: str) -> dict[str, Any]:
    """The settings with data and functions in place; raises ConfigError for what a task file may not use."""
    from lm_eval.api.registry import AGGREGATION_REGISTRY, METRIC_REGISTRY  # pyright: ignore[reportMissingImports]

    name = config.get("task")
    for key in _FORBIDDEN:
        if config.get(key):
            raise ConfigError(
                f"benchmarks: task {name!r} has {key}={config[key]!r}, which does not run here",
                advice="Use a task of text without it.",
            )
    for metric in config.get("metric_list") or []:
        used = (metric.get("metric"), METRIC_REGISTRY), (metric.get("aggregation"), AGGREGATION_REGISTRY)
        unknown = [found for found, known in used if isinstance(found, str) and found not in known]
        # With a function of its own a task may name its metrics as it likes.
        own = bool(config.get("process_results")) and unknown[:1] == [metric.get("metric")]
        if (unknown and not own) or metric.get("hf_evaluate"):
            raise ConfigError(
                f"benchmarks: task {name!r} has the metric {metric}, which would be looked for as a script",
                advice=f"Use metrics of the harness: {', '.join(sorted(METRIC_REGISTRY.keys()))}.",
            )
    usable = _with_functions(config, root, address)
    dataset = _dataset(usable, folder, root, address)
    dropped = ("dataset_path", "dataset_name", "dataset_kwargs")
    return {key: value for key, value in usable.items() if key not in dropped} | {
        "custom_dataset": lambda **ignored: dataset
    }


def _with_functions(value: Any, root: Path, address: str) -> Any:
    match value:
        case _Function():
            return _imported(value, root, address)
        case dict():
            return {key: _with_functions(one, root, address) for key, one in value.items()}
        case list():
            return [_with_functions(one, root, address) for one in value]
        case _:
            return value


def _imported(function: _Function, root: Path, address: str) -> Any:
    """A function of a Python file next to the task, whose digest is allowed."""
    from lm_eval.tasks._yaml_loader import _import_func_in_yml  # pyright: ignore[reportMissingImports]

    module = function.name.rpartition(".")[0]
    file = function.folder / f"{module.replace('.', '/')}.py"
    _inside(file, root, what=f"!function {function.name}")
    digest = code_digest(root)
    if not is_allowed(digest):
        raise ConfigError(
            f"benchmarks: {address!r} brings code ({', '.join(path.name for path in code_files(root))}), which does "
            f"not run: {ALLOWED} does not hold its digest {digest}",
            advice="Use a task without !function. Or read all its *.py files, and let whoever runs Ray set "
            f"{ALLOWED}={digest} there: this code will run with the workers' credentials.",
        )
    logger.warning("Running the code of task %s, digest %s, as %s allows.", address, digest, ALLOWED)
    return _import_func_in_yml(function.name, function.folder)


def _dataset(config: Mapping[str, Any], folder: Path, root: Path, address: str) -> Any:
    """The splits of a task: files of its folder, or a data set of the hub."""
    path, options = config.get("dataset_path"), dict(config.get("dataset_kwargs") or {})
    if not isinstance(path, str):
        raise ConfigError(
            f"benchmarks: task {config.get('task')!r} has dataset_path={path!r}",
            advice=f"Give one of {', '.join(FILE_READERS)} with dataset_kwargs.data_files, or a data set of the hub.",
        )
    if path not in FILE_READERS:
        options.pop("trust_remote_code", None)
        if options:
            raise ConfigError(
                f"benchmarks: task {config.get('task')!r} has dataset_kwargs={options} for {path!r}",
                advice=f"They are for files ({', '.join(FILE_READERS)}) only.",
            )
        return hub_splits(path, config.get("dataset_name"))
    from datasets import load_dataset

    files = options.pop("data_files", None)
    wrong = {key: value for key, value in options.items() if not isinstance(value, str | int | float | bool)}
    if not files or wrong or "data_dir" in options:
        raise ConfigError(
            f"benchmarks: task {config.get('task')!r} has dataset_kwargs={config.get('dataset_kwargs')}",
            advice="Give data_files by split, as paths relative to the task file, and options that are plain values.",
        )
    if not isinstance(files, dict):
        files = {"train": files}
    places = {
        split: [_data_file(one, folder, root, address) for one in (named if isinstance(named, list) else [named])]
        for split, named in files.items()
    }
    cache = str(root / ".datasets")  # not in the user's own cache, which would remember files of equal names
    return load_dataset(path, data_files=places, cache_dir=cache, **options)


def _data_file(name: Any, folder: Path, root: Path, address: str) -> str:
    """A relative path, or the absolute one of a file in the folder that the task was copied from."""
    text = str(name)
    original = address.removeprefix("file://").rpartition("/")[0]
    if original.startswith("/") and text.startswith(f"{original}/"):
        return str(_inside(root / text.removeprefix(f"{original}/"), root, what=f"data_files: {text}"))
    if "://" in text or not plain_name(text):
        raise ConfigError(
            f"benchmarks: {address!r} names the data file {text!r}", advice="Put it next to the task file."
        )
    return str(_inside(folder / text, root, what=f"data_files: {text}"))
