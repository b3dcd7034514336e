"""Dotted overrides: which settings they reach, in which order they are applied, and who fills the others."""

from collections.abc import Mapping
from typing import Any

from stages.config.errors import ConfigError
from stages.config.nested import dotted, dotted_once
from stages.config.pipeline import PipelineConfig
from stages.config.validation import did_you_mean

FILLED = {
    "run_name": "Set the field run_name of the form.",
    "recipe": "Set the field recipe of the form.",
    "promote.run_name": "It is the field run_name of the form.",
    "tokenize.base_model": "It is the field base_model of the form.",
    "evaluate.judge.endpoint": "It is the field judge of the form.",
    "given": "Athanor fills it when the run starts, with what the models and previous_data of the form name.",
    "only": "The DAG evaluate_model fills it; trigger that one to measure a model again.",
    "gates.override": "It is the field override_gates of the form.",
    "gates.reason": "It is the field override_reason of the form.",
    "evaluate.champion": "The task evaluate fills it, with the champion that it finds when it starts.",
    "evaluate.champion_missing": "The task evaluate fills it, when it cannot find the champion's artifact.",
    "evaluate.comparison": "Set promote.level, promote.power and promote.least_difference, from which it follows.",
    "constitution.critic.endpoint": "It is the field critic of the form.",
    "synthesize.generator.endpoint": "It is the field generator of the form.",
    "synthesize.method": "It is the field synthesis of the form.",
    "constitution.makes": "It is the field ai_feedback of the form.",
    "promote.approval": "The task approve fills it, with the answer of the person whom promotion=approval asks.",
}
"""What `overrides` must not set, and who does: names would no longer agree, or a person's decision would be made up."""


def filled_by(path: str) -> str:
    """Return who fills a field, as a sentence; empty when overrides may set it."""
    return next((who for name, who in FILLED.items() if f"{path}.".startswith(f"{name}.")), "")


def ordered(overrides: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Overrides by today's paths; those that choose a `kind` first, because it says which fields there are."""
    given: dict[str, str] = {}
    pairs = []
    for path, value in dotted_once(overrides, "overrides").items():
        current = PipelineConfig.current_path(path)
        if instead := PipelineConfig.instead_of(current):
            raise ConfigError(f"overrides: {path!r} is no longer a setting; got {value!r}", advice=instead)
        if who := filled_by(current):
            raise ConfigError(f"overrides: {path!r} cannot be set; got {value!r}", advice=who)
        if current in given:
            raise ConfigError(
                f"overrides: {given[current]!r} and {path!r} are two names of one field", advice="Give one of them."
            )
        given[current] = path
        pairs.append((current, value))
    return sorted(pairs, key=lambda pair: not pair[0].endswith(".kind"))


def set_dotted(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, leaf = path.split(".")
    node: Any = tree
    for depth, part in enumerate((*parents, leaf)):
        if not isinstance(node, dict) or part not in node:
            here = ".".join((*parents, leaf)[:depth])
            raise ConfigError(
                f"overrides: {path!r} does not exist" + (f" ({part!r} is not a field of {here!r})" if here else ""),
                advice=did_you_mean(path, dotted(tree)) or f"Known fields: {', '.join(sorted(tree))}.",
            )
        if depth < len(parents):
            node = node[part]
    if isinstance(node[leaf], dict):
        raise ConfigError(
            f"overrides: {path!r} is a group of fields, not a value; got {value!r}",
            advice=f"Set one of its fields: {', '.join(f'{path}.{name}' for name in sorted(node[leaf]))}.",
        )
    if leaf == "kind" and PipelineConfig.members(".".join(parents)):
        _choose_kind(node, path, value)
    node[leaf] = value


def _choose_kind(group: dict[str, Any], path: str, kind: Any) -> None:
    """Put the defaults of another kind in a group's place: kinds share no settings, even of the same name."""
    members = PipelineConfig.members(path.removesuffix(".kind"))
    if not isinstance(kind, str) or kind not in members:
        raise ConfigError(
            f"overrides: {path}={kind!r} does not exist", advice=f"Allowed: {', '.join(sorted(members))}."
        )
    if kind != group["kind"]:
        group.clear()
        # Not validated: what has no useful default is empty until a later override fills it.
        group.update(members[kind].model_construct().model_dump(mode="json"))
