"""From the form to the frozen configuration: recipe, then the form's fields, then dotted overrides. Wrong input fails
here."""

import difflib
import json
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from stages.config.benchmarks import LM_EVAL
from stages.config.closing import ComparisonConfig
from stages.config.combinations import contradictions
from stages.config.curate import DERIVED, INSTALLED_DOCS
from stages.config.endpoints import check_endpoint, is_endpoint
from stages.config.errors import ConfigError
from stages.config.feedback import add_made_data, apply_feedback, refuse_closed_feedback, refuse_useless_feedback
from stages.config.forms import GoldScorer, PipelineParams, RunOutline
from stages.config.graph import (
    BENCHMARKS,
    DATA_FIELDS,
    DOCUMENTS,
    GRAPH,
    INSTRUCTIONS,
    PREFERENCES,
    PROMPTS,
    REWARD_BASE,
    Stage,
    pipeline_stages,
    trained_stages,
)
from stages.config.nested import dotted, dotted_once, leaves
from stages.config.pipeline import PipelineConfig
from stages.config.places import check_source
from stages.config.preferences import PairsHalf
from stages.config.recipes import RECIPES
from stages.config.rollout_inputs import refuse_what_rollouts_lack
from stages.config.rollouts import PROMPT_FIELDS
from stages.config.scorers import endpoints_of
from stages.config.scoring import refuse_aggregation_of_one, refuse_margins_without_effect
from stages.config.selection import asks_for_gold, learns_from_scores, needed_data
from stages.config.sources import parse_source, take_weights
from stages.config.suites import check_suites
from stages.config.synthetic import apply_synthesis, refuse_closed_synthesis, refuse_useless_synthesis
from stages.config.text import HALVES, one_line
from stages.config.train import TrainConfig
from stages.config.unpaired import refuse_unused, weights_of

Model = TypeVar("Model", bound=BaseModel)
_HALF = re.compile(f"[{HALVES}]")

_FILLED = {
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
_LONGEST_NAME = 200
_OF_THE_FORM = RunOutline.model_fields.keys() - _FILLED.keys()
"""Fields of the form under the same name in the configuration: an override replaces what the form says, and then the
form's rules apply to it. (The field `overrides` of `retrain` is how to change them there.)"""


def resolve(values: Mapping[str, Any]) -> PipelineConfig:
    """Turn the trigger form's values into a validated PipelineConfig.

    Raises ConfigError that names the field, the value, what is allowed and what to do.
    """
    params = _with_outline(parse_params(_with_model_of_recipe(values)))
    recipe = RECIPES.get(params.recipe)
    if recipe is None:
        raise ConfigError(
            f"recipe={params.recipe!r} does not exist; allowed: {', '.join(sorted(RECIPES))}",
            advice=_did_you_mean(params.recipe, RECIPES) or "Choose one of the recipes above.",
        )
    _refuse_impossible_end(params)
    template = recipe(seed=params.seed)
    params = _with_gold_of_recipe(params, template)
    tree = template.model_dump(mode="json")
    _apply_form(tree, params)
    _leave_half_to_gold(tree, params)
    for path, value in _ordered(params.overrides):
        _set_dotted(tree, path, value)
    _apply_seed(tree, params)
    add_made_data(tree, params)
    _place_weights(tree)
    _leave_out_unneeded(tree, params)
    config = _with_comparison(validated(type(template), tree))
    _refuse_closed_places(config)
    _refuse_nothing_to_read(config)
    _refuse_unread_prompts(config)
    _refuse_underivable(config)
    refuse_useless_feedback(config)
    refuse_useless_synthesis(config)
    _refuse_uncuttable(config)
    _refuse_contradictions(config)
    refuse_unused(config)
    check_suites(config)
    refuse_what_rollouts_lack(config)
    refuse_margins_without_effect(config)
    refuse_aggregation_of_one(config)
    return config


def parse_params(values: Mapping[str, Any]) -> PipelineParams:
    """Validate the form's fields alone."""
    return validated(PipelineParams, dict(values))


def filled_by(path: str) -> str:
    """Return who fills a field, as a sentence; empty when overrides may set it."""
    return next((who for name, who in _FILLED.items() if f"{path}.".startswith(f"{name}.")), "")


def _with_model_of_recipe(values: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe may name the model that it starts from; the form's field replaces it."""
    recipe = RECIPES.get(str(values.get("recipe", "")))
    given = values.get("base_model") or (recipe().base_model if recipe else "")
    return {**values, "base_model": given} if given else dict(values)


def _with_gold_of_recipe(params: PipelineParams, recipe: PipelineConfig) -> PipelineParams:
    """What a recipe says about the gold scorer counts in runs that read preference pairs anyway and are given no gold
    scorer; and whose models the recipe sizes, because a given model may be of any size. Retraining starts from one of
    the recipe's own."""
    if params.gold_scorer is not GoldScorer.RECIPE:
        return params
    reads_pairs = PREFERENCES in needed_data(params.selected, has_base_model=bool(params.base_model))
    of_its_size = not params.base_model or bool(params.previous_data)
    wanted = recipe.gold_scorer is GoldScorer.TRAIN and reads_pairs and of_its_size and not params.gold_model
    return params.model_copy(update={"gold_scorer": GoldScorer.TRAIN if wanted else GoldScorer.NONE})


def _with_outline(params: PipelineParams) -> PipelineParams:
    """Take fields of the form out of the overrides and into the form."""
    overrides = dotted_once(params.overrides, "overrides")
    outline = {path: overrides.pop(path) for path in _OF_THE_FORM & overrides.keys()}
    if not outline:
        return params
    return parse_params({**params.model_dump(), **outline, "overrides": overrides})


def validated(model: type[Model], data: Mapping[str, Any]) -> Model:
    """Validate and turn pydantic's report into one sentence a field."""
    advice = "Correct the named fields and trigger the run again."
    try:
        found = model.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_explain(error, model), advice=advice) from None
    if wrong := next(
        (path for path, value in leaves(found) if _HALF.search(json.dumps(value, ensure_ascii=False, default=str))), ""
    ):
        raise ConfigError(f"{wrong}: it holds half a character (a surrogate), which no file can hold", advice=advice)
    return found


def _apply_form(tree: dict[str, Any], params: PipelineParams) -> None:
    for name in RunOutline.model_fields:
        tree[name] = getattr(params, name)
    for name in DATA_FIELDS:
        if given := getattr(params, name):
            tree["curate"][name] = given
    if params.prompts:
        tree[Stage.PPO]["prompts_from"] = PROMPTS
    if params.benchmarks:
        tree["evaluate"]["benchmarks"] = params.benchmarks
    apply_feedback(tree, params)
    apply_synthesis(tree, params)
    # What a stage of the run converts is an input of tokenize, like an artifact (PipelineConfig.with_given).
    tree["tokenize"]["base_model"] = "" if params.converts else params.base_model
    tree["promote"] |= {"run_name": params.run_name, "promotion": params.promotion}
    tree["report"]["title"] = params.run_name
    tree["gates"] |= {"override": params.override_gates, "reason": params.override_reason}
    if is_endpoint(params.judge):
        tree["evaluate"]["judge"]["endpoint"] = params.judge


def _leave_half_to_gold(tree: dict[str, Any], params: PipelineParams) -> None:
    """Where a gold scorer is trained, whatever it judges learns from the other half of the pairs."""
    if not asks_for_gold(params.way_until(params.last_stage)):
        return
    for stage in _trained_on(PREFERENCES):
        if "half" in tree[stage]:
            tree[stage]["half"] = (PairsHalf.SECOND if GRAPH[stage].judges else PairsHalf.FIRST).value


def _apply_seed(tree: dict[str, Any], params: PipelineParams) -> None:
    """The form's seed reaches every stage, except where an override set a stage's own."""
    overridden = dotted(params.overrides)
    for stage, spec in GRAPH.items():
        if spec.seeded and f"{stage}.seed" not in overridden:
            tree[stage]["seed"] = params.seed + spec.seed_shift


def _with_comparison(config: PipelineConfig) -> PipelineConfig:
    """The evaluation compares at the level that the promotion asks for: the aligned models of the run share it."""
    candidates = sum(GRAPH[stage].aligned for stage in config.selected) or 1
    stated = config.promote
    comparison = ComparisonConfig(
        level=stated.level / candidates, power=stated.power, least_difference=stated.least_difference
    )
    return config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"comparison": comparison})})


def _place_weights(tree: dict[str, Any]) -> None:
    """Weights behind sources become the mixture of the stages that train on them."""
    for name in (INSTRUCTIONS, PREFERENCES):
        try:
            tree["curate"][name], weights = take_weights(name, tree["curate"][name])
        except ValueError as error:
            raise ConfigError(str(error), advice=f"Correct {name}, one source a line: uri#weight=0.3.") from None
        for stage in _trained_on(name) if weights else ():
            mine = weights_of(stage, weights, tree["curate"][name]) if name == PREFERENCES else weights
            if tree[stage]["mixture"]:
                raise ConfigError(
                    f"{name} have weights and {stage.value}.mixture={tree[stage]['mixture']} is set; which one counts?",
                    advice=f"Give the weights behind the sources, or {stage.value}.mixture, not both.",
                )
            tree[stage]["mixture"] = [entry.model_dump(mode="json") for entry in mine]


def _leave_out_unneeded(tree: dict[str, Any], params: PipelineParams) -> None:
    """A run that starts from a given model reads, of the recipe's data, only what its stages need; what a person names
    in the form or by an override is read all the same.

    Without a base model nothing is left out: a shorter run then makes the very data that a longer one goes on with.
    The same holds for a run that adds to previous data, whose text it compares with.
    """
    if not params.base_model or params.previous_data:
        return
    curate, asked = tree["curate"], dotted(params.overrides)
    # A run that ends with its data makes what a run to the end would go on with.
    last = GRAPH[params.last_stage]
    stages = params.selected if last.trains or last.closing else params.selected_until(Stage.REPORT)
    fields = PROMPT_FIELDS.get(tree[Stage.PPO]["prompts_from"], (INSTRUCTIONS,))  # what is no choice is refused later
    needed = needed_data(stages, has_base_model=True, prompt_fields=fields)
    for name in (INSTRUCTIONS, PREFERENCES, DOCUMENTS):  # documents last: pairs may be derived from them
        derived_from = name == DOCUMENTS and any(_is_derived(curate[kind]) for kind in (INSTRUCTIONS, PREFERENCES))
        if not (name in needed or getattr(params, name) or f"curate.{name}" in asked or derived_from):
            curate[name] = []


def _is_derived(lines: Any) -> bool:
    return any(isinstance(line, str) and parse_source(line).uri == DERIVED for line in lines)


def _trained_on(field: str) -> list[Stage]:
    """Return the stages that train on a field's sources."""
    return [stage for stage, spec in GRAPH.items() if spec.weighs == field]


def _refuse_impossible_end(params: PipelineParams) -> None:
    if params.last_stage not in params.selected:
        allowed = params.selected_until(Stage.REPORT)
        names = ", ".join(stage for stage in pipeline_stages() if stage in allowed)
        start = f"base_model={params.base_model!r}"
        if params.first_stage:
            start += f" and first_stage={params.first_stage.value!r}"
        raise ConfigError(
            f"last_stage={params.last_stage.value!r} is not part of a run with alignment={params.alignment.value!r} "
            f"and {start} ({params.skipped.get(params.last_stage, 'it is a stage of another DAG')}); allowed: {names}",
            advice="Choose another last stage or another alignment.",
        )


def _refuse_closed_places(config: PipelineConfig) -> None:
    """Jobs check again: they run where the data is, and their environment may open other folders."""
    for address, field in config.curate.outside_sources.items():
        if address != INSTALLED_DOCS:
            check_source(address, field=field)
    refuse_closed_feedback(config)
    refuse_closed_synthesis(config)
    for address in config.evaluate.outside_benchmarks:
        if not address.startswith(LM_EVAL):
            check_source(address, field=BENCHMARKS)
    if endpoint := config.evaluate.judge.endpoint:
        check_endpoint(endpoint, field="judge", with_key=bool(config.evaluate.judge.api_key_env), for_judges=True)
    if any(learns_from_scores(GRAPH[stage]) for stage in config.selected):
        for field, asked in endpoints_of(config.ppo.scorer, "ppo.scorer").items():
            check_endpoint(asked.endpoint, field=f"{field}.endpoint", with_key=bool(asked.api_key_env), for_judges=True)
    for field, address in {**config.given_models, "previous_data": config.previous_data}.items():
        if address and not address.startswith("models:/"):
            check_source(address, field=field)


def _refuse_nothing_to_read(config: PipelineConfig) -> None:
    """What a stage of the run trains on must come from somewhere: from a source, or from the data before."""
    if config.previous_data:
        return
    for name, stage in _needed(config).items():
        if not getattr(config.curate, name):
            raise ConfigError(
                f"{name} is empty, and {stage} has nothing to work on without",
                advice=f"Give {name}, or leave {stage} out of the run (first_stage, last_stage, alignment).",
            )
    if Stage.CURATE in config.selected and not any(getattr(config.curate, name) for name in DATA_FIELDS):
        raise ConfigError(
            f"{', '.join(DATA_FIELDS)} are all empty: there is nothing to measure the model on",
            advice="Give at least one of them; part of it is held out (curate.heldout_fraction).",
        )


def _needed(config: PipelineConfig) -> dict[str, str]:
    return needed_data(config.selected, has_base_model=bool(config.base_model), prompt_fields=config.ppo.prompt_fields)


def _refuse_unread_prompts(config: PipelineConfig) -> None:
    """Prompt sets are there for reinforcement learning alone."""
    if not config.curate.prompts or Stage.CURATE not in config.selected:
        return
    learners = [stage.value for stage in config.selected_until(Stage.REPORT) if learns_from_scores(GRAPH[stage])]
    if not learners or config.ppo.prompts_from == INSTRUCTIONS:
        why = f"ppo.prompts_from={INSTRUCTIONS}" if learners else f"alignment={config.alignment.value} has no ppo"
        raise ConfigError(
            f"prompts={list(config.curate.prompts)} are given and {why}: no stage answers them",
            advice="Leave prompts empty, or use ppo.prompts_from=prompts in a run with ppo.",
        )


def _refuse_underivable(config: PipelineConfig) -> None:
    """Pairs are derived from documentation; other documents need instructions and preferences of their own, or those
    of the data before them."""
    if config.previous_data or INSTALLED_DOCS in config.curate.documents:
        return
    for name in (INSTRUCTIONS, PREFERENCES):
        needed_by = _needed(config).get(name)
        if needed_by and DERIVED in getattr(config.curate, name):
            raise ConfigError(
                f"{name}={DERIVED!r} needs {INSTALLED_DOCS!r} among documents; got {list(config.curate.documents)}",
                advice=f"Give {name} as files, or previous_data, or stop before {needed_by} with last_stage.",
            )


def _refuse_uncuttable(config: PipelineConfig) -> None:
    """A model that this run makes has the shape that the configuration says; workers look at given ones."""
    model = config.pretrain.model
    for stage in _selected_to_train(config) if not config.base_model else ():
        if REWARD_BASE in config.given_roles(stage):
            continue
        execution = config.stage_execution(stage)
        for name in ("num_heads", "num_kv_heads", "intermediate_size"):
            if getattr(model, name) % execution.tensor_parallel:
                raise ConfigError(
                    f"execution.{stage}.tensor_parallel={execution.tensor_parallel} does not divide "
                    f"pretrain.model.{name}={getattr(model, name)}",
                    advice="Use a divisor of the model's query heads, key and value heads and feed-forward width.",
                )
        if execution.pipeline_parallel > model.num_layers:
            raise ConfigError(
                f"execution.{stage}.pipeline_parallel={execution.pipeline_parallel} is more than "
                f"pretrain.model.num_layers={model.num_layers}",
                advice=f"Use at most {model.num_layers}.",
            )


def _refuse_contradictions(config: PipelineConfig) -> None:
    experts = 0 if config.base_model else config.pretrain.model.num_experts
    for stage in _selected_to_train(config):
        train = config.stage_config(stage)
        assert isinstance(train, TrainConfig)
        for what, advice in contradictions(stage.value, train, config.stage_execution(stage), experts=experts):
            raise ConfigError(what, advice=advice)


def _selected_to_train(config: PipelineConfig) -> list[Stage]:
    return [spec.stage for spec in trained_stages() if spec.stage in config.selected]


def _ordered(overrides: Mapping[str, Any]) -> list[tuple[str, Any]]:
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


def _set_dotted(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, leaf = path.split(".")
    node: Any = tree
    for depth, part in enumerate((*parents, leaf)):
        if not isinstance(node, dict) or part not in node:
            here = ".".join((*parents, leaf)[:depth])
            raise ConfigError(
                f"overrides: {path!r} does not exist" + (f" ({part!r} is not a field of {here!r})" if here else ""),
                advice=_did_you_mean(path, dotted(tree)) or f"Known fields: {', '.join(sorted(tree))}.",
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


def _did_you_mean(word: str, known: Mapping[str, Any] | list[str]) -> str:
    names = list(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if not close and "." not in word:
        leaves = {name.rsplit(".", 1)[-1]: name for name in names}
        close = [leaves[leaf] for leaf in difflib.get_close_matches(word, list(leaves), n=1, cutoff=0.6)]
    return f"Did you mean {close[0]!r}?" if close else ""


def _explain(error: ValidationError, model: type[BaseModel]) -> str:
    sentences = []
    for problem in error.errors():
        field = one_line(".".join(str(part) for part in problem["loc"]), at_most=_LONGEST_NAME) or model.__name__
        if problem["type"] == "extra_forbidden":
            hint = _did_you_mean(str(problem["loc"][-1]), list(model.model_fields)) if len(problem["loc"]) == 1 else ""
            sentences.append(f"{field}: unknown field. {hint}".strip())
        elif problem["type"] == "value_error":
            sentences.append(f"{field}: {problem['msg'].removeprefix('Value error, ')}")
        else:
            sentences.append(f"{field}={problem['input']!r}: {problem['msg']}")
    return "; ".join(sentences)
