"""The graph of all imports, those inside functions and under TYPE_CHECKING included: no circles, one way across."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise

import grimp
import pytest

PACKAGES = ("dags", "operators", "stages", "infra")
SPLIT_ROOMS = ("stages", "stages.data", "operators", "infra")
"""Packages whose folders are rooms of their own; deeper folders belong to their room."""
FOR_AIRFLOW = ("stages.config", "stages.artifacts", "stages.tracking.spool", "stages.tracking.events")
"""All that Airflow's side may import of the stages."""

Graph = Mapping[str, frozenset[str]]


@pytest.fixture(scope="module")
def files() -> Graph:
    """Each module with those that it imports."""
    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    return {module: frozenset(graph.find_modules_directly_imported_by(module)) for module in graph.modules}


def room_of(module: str) -> str:
    """The folder that a module lies in. A command line (`__main__`) stands above its room, as does a loose file."""
    parts = module.split(".")
    if parts[-1] == "__main__":
        return module
    depth = 1
    while ".".join(parts[:depth]) in SPLIT_ROOMS and depth < len(parts):
        depth += 1
    loose = depth == len(parts) and depth > 1 and parts[0] == "operators"
    return parts[0] if loose else ".".join(parts[:depth])


def between_rooms(files: Graph) -> Graph:
    rooms: dict[str, set[str]] = defaultdict(set)
    for module, imported in files.items():
        rooms[room_of(module)] |= {room_of(other) for other in imported} - {room_of(module)}
    return {room: frozenset(others) for room, others in rooms.items()}


def circle_in(graph: Graph) -> list[str] | None:
    """One circle of imports, each module importing the next; None when there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(reversed(error.args[1]))
    return None


def ties(files: Graph, rooms: Iterable[str] | None) -> str:
    """The imports that tie a circle of rooms, for the message of a failure."""
    pairs = set(pairwise(rooms or ()))
    found = [(a, b) for a, others in files.items() for b in others if (room_of(a), room_of(b)) in pairs]
    return "\n".join(f"{a} imports {b}" for a, b in sorted(found))


def test_no_files_import_each_other_in_a_circle(files: Graph) -> None:
    assert circle_in(files) is None


def test_no_rooms_import_each_other_in_a_circle(files: Graph) -> None:
    circle = circle_in(between_rooms(files))
    assert circle is None, f"{' -> '.join(circle)}\n{ties(files, circle)}"


def test_a_circle_is_found_where_there_is_one() -> None:
    graph = {"a": frozenset({"b"}), "b": frozenset({"c"}), "c": frozenset({"a"})}
    circle = circle_in(graph)
    assert circle is not None
    assert set(circle) == {"a", "b", "c"}


def test_airflows_side_imports_nothing_of_the_stages_but_what_is_allowed(files: Graph) -> None:
    crossing = {
        f"{module} imports {other}"
        for module, imported in files.items()
        if module.startswith(("dags.", "operators."))
        for other in imported
        if other.startswith("stages.")
        if not any(other == allowed or other.startswith(f"{allowed}.") for allowed in FOR_AIRFLOW)
    }
    assert crossing == set()


def test_what_is_allowed_needs_nothing_else_of_the_stages(files: Graph) -> None:
    """Otherwise Airflow's image would need what the stages need."""
    reached, waiting = set[str](), [module for module in files if module.startswith(FOR_AIRFLOW)]
    while waiting:
        module = waiting.pop()
        reached.add(module)
        waiting += [other for other in files[module] if other.startswith("stages.") and other not in reached]
    assert {module for module in reached if not module.startswith(FOR_AIRFLOW)} <= {"stages"}
