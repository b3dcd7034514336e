"""From the form to the frozen configuration: recipe, then the form's fields, then dotted overrides. Wrong input fails
here."""

from collections.abc import Mapping
from typing import Any

from stages.config.closing import ComparisonConfig
from stages.config.curate import DERIVED
from stages.config.endpoints import is_endpoint
from stages.config.errors import ConfigError
from stages.config.feedback import apply_feedback
from stages.config.forms import GoldScorer, PipelineParams, RunOutline
from stages.config.graph import DATA_FIELDS, DOCUMENTS, GRAPH, INSTRUCTIONS, PREFERENCES, PROMPTS, Stage
from stages.config.made_data import add_made_data
from stages.config.nested import dotted, dotted_once
from stages.config.overrides import FILLED, ordered, set_dotted
from stages.config.pipeline import PipelineConfig
from stages.config.preferences import PairsHalf
from stages.config.recipes import RECIPES
from stages.config.refusals import check_end, check_run
from stages.config.rollouts import PROMPT_FIELDS
from stages.config.selection import asks_for_gold, needed_data
from stages.config.sources import parse_source, take_weights
from stages.config.synthetic import apply_synthesis
from stages.config.unpaired import weights_of
from stages.config.validation import did_you_mean, validated

_OF_THE_FORM = RunOutline.model_fields.keys() - FILLED.keys()
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
            advice=did_you_mean(params.recipe, RECIPES) or "Choose one of the recipes above.",
        )
    check_end(params)
    template = recipe(seed=params.seed)
    params = _with_gold_of_recipe(params, template)
    tree = template.model_dump(mode="json")
    _apply_form(tree, params)
    _leave_half_to_gold(tree, params)
    for path, value in ordered(params.overrides):
        set_dotted(tree, path, value)
    _apply_seed(tree, params)
    add_made_data(tree, params)
    _place_weights(tree)
    _leave_out_unneeded(tree, params)
    config = _with_comparison(validated(type(template), tree))
    check_run(config)
    return config


def parse_params(values: Mapping[str, Any]) -> PipelineParams:
    """Validate the form's fields alone."""
    return validated(PipelineParams, dict(values))


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
    fields = PROMPT_FIELDS.get(tree[Stage.PPO]["prompts_from"], (INSTRUCTIONS,))  # what is no choice is refused later
    needed = needed_data(params.read_for, has_base_model=True, prompt_fields=fields)
    for name in (INSTRUCTIONS, PREFERENCES, DOCUMENTS):  # documents last: pairs may be derived from them
        derived_from = name == DOCUMENTS and any(_is_derived(curate[kind]) for kind in (INSTRUCTIONS, PREFERENCES))
        if not (name in needed or getattr(params, name) or f"curate.{name}" in asked or derived_from):
            curate[name] = []


def _is_derived(lines: Any) -> bool:
    return any(isinstance(line, str) and parse_source(line).uri == DERIVED for line in lines)


def _trained_on(field: str) -> list[Stage]:
    """Return the stages that train on a field's sources."""
    return [stage for stage, spec in GRAPH.items() if spec.weighs == field]
