"""Who may say a stage by its name: what else a file needs to know of stages, it asks the graph.

A name that is written out is a place to remember when a stage is added, and a list of them is one that fails silently.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

from stages.config.graph import Stage
from tests.places import REPOSITORY

NAMES = {stage.value for stage in Stage}

# File -> names that it may write out as strings, and why.
ALLOWED: dict[str, tuple[set[str], str]] = {
    "stages/config/graph.py": (NAMES, "the facts"),
    "stages/config/pipeline.py": ({"tokenize"}, "one setting of one stage"),
    "stages/config/resolve.py": (
        {"curate", "tokenize", "evaluate", "promote", "report"},
        "where each field of the form goes, and the level of the promotion",
    ),
    "stages/config/evaluation.py": ({"reward", "gold"}, "section of metrics.json, name of a suite"),
    "stages/judge/results.py": ({"reward"}, "section of metrics.json"),
    "stages/judge/gates/acceptance.py": ({"gold"}, "column of a table: the gain by the gold scorer"),
    "stages/judge/gates/best_of.py": ({"gold"}, "column of a table: the gain by the gold scorer"),
    "stages/config/forms.py": ({"reward"}, "an example in the form"),
    "stages/config/compare.py": ({"ppo", "dpo"}, "defaults and examples of its form"),
    "stages/config/benchmarks.py": ({"gold"}, "name of a suite"),
    "stages/config/closing.py": ({"gold"}, "name of a suite"),
    "stages/config/recipes.py": ({"gold"}, "name of a suite"),
    "stages/judge/judges/gold.py": ({"gold"}, "name of a suite"),
    "stages/reporting/gold_views.py": ({"gold"}, "name of a suite"),
    "stages/judge/benchmarks/items.py": ({"gold"}, "a field that rows have"),
    "stages/ppo.py": ({"reward"}, "role of its own input"),
    "stages/config/rollouts.py": ({"reward"}, "where a penalty is paid"),
    "stages/train/rollout/experience.py": ({"reward"}, "where a penalty is paid"),
    "stages/reward.py": ({"reward"}, "part of its own checkpoints"),
    "stages/train/scores.py": ({"reward"}, "part of the training that scores"),
    "stages/reporting/model_views.py": ({"reward"}, "section of metrics.json"),
    "operators/evaluation.py": ({"reward"}, "field of its form"),
    "stages/data/pairs/preferences.py": ({"reward"}, "a field that rows have"),
    "stages/data/pairs/margins.py": ({"reward"}, "a field that rows have"),
    "stages/convert.py": ({"convert"}, "phase of its own progress"),
    "stages/job/progress.py": ({"rate"}, "steps a second"),
    "operators/ray/logs.py": ({"rate"}, "steps a second"),
    "infra/run_state.py": ({"rate"}, "steps a second"),
    "infra/screen.py": ({"rate"}, "steps a second"),
}

# Files that may write two or more members of Stage side by side, and why.
LISTING: dict[str, str] = {
    "stages/config/scoring.py": "the two stages that learn scores from pairs",
    "stages/config/pipeline.py": "the class of each stage's settings, and who starts from a given base model",
    "operators/evaluation.py": "an aligned model comes with the SFT and the reward model that it was made from",
}


def test_stage_names_are_written_out_only_where_they_may_be() -> None:
    found = {
        f"{file}: {name!r}"
        for file, tree in _files()
        for name in _written_out(tree)
        if name not in ALLOWED.get(file, (set(), ""))[0]
    }
    assert found == set(), "ask stages.config.graph instead, or say Stage.<NAME> for this one stage"


def test_lists_of_stages_are_asked_of_the_graph() -> None:
    found = {file for file, tree in _files() if _lists_stages(tree)}
    assert found <= LISTING.keys(), "derive the list from a fact in GRAPH"


def test_a_name_and_a_list_are_found() -> None:
    tree = ast.parse('"""sft"""\nif role in ("ppo", "dpo"): pass\nkinds = [Stage.SFT, Stage.DPO]\none = (Stage.SFT, 1)')
    assert _written_out(tree) == {"ppo", "dpo"}
    assert _lists_stages(tree)
    assert not _lists_stages(ast.parse("one = (Stage.SFT, 1)"))


def _files() -> Iterator[tuple[str, ast.Module]]:
    for room in ("dags", "operators", "stages", "infra"):
        for path in sorted((REPOSITORY / room).rglob("*.py")):
            yield str(path.relative_to(REPOSITORY)), ast.parse(Path(path).read_text(encoding="utf-8"))


def _written_out(tree: ast.Module) -> set[str]:
    """Strings that are a stage's name, docstrings aside."""
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in alone]
    return {node.value for node in constants if isinstance(node.value, str)} & NAMES


def _lists_stages(tree: ast.Module) -> bool:
    return any(sum(map(_is_member, _elements(node))) > 1 for node in ast.walk(tree))


def _elements(node: ast.AST) -> list[ast.expr]:
    match node:
        case ast.Dict(keys=keys):
            return [key for key in keys if key is not None]
        case ast.Tuple(elts=elements) | ast.List(elts=elements) | ast.Set(elts=elements):
            return elements
        case _:
            return []


def _is_member(node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "Stage"
