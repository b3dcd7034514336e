"""Which stages a run executes, in which order, what it reads, and why it does without the rest.

`skipped_stages` is the one author of the choice: the stages of a run are those that it gives no reason against, and the
plan shows people the same reasons.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from stages.config.graph import (
    AI_FEEDBACK,
    BASE_MODEL,
    CRITIC,
    DOCUMENTS,
    GENERATOR,
    GOLD_MODEL,
    GRAPH,
    INSTRUCTIONS,
    JUDGE,
    REWARD_BASE,
    REWARD_MODEL,
    SYNTHESIS,
    Alignment,
    Stage,
    StageSpec,
    aligned_models,
    pipeline_stages,
    stage_providing,
)


@dataclass(frozen=True)
class Way:
    """Where a run enters and ends, what it is given, and what it is asked to make."""

    alignment: Alignment
    last_stage: Stage
    first_stage: Stage | None = None
    """The first stage that trains; None for the first that can."""
    given: frozenset[str] = frozenset()
    """Roles of the models that it is given."""
    continue_pretraining: bool = False
    train_reward: bool = False
    train_gold: bool = False
    converts: bool = False
    """Its base model is a GGUF file."""
    asks_for: frozenset[str] = frozenset()
    """Fields of the form that ask for a stage of their own."""
    scored_by_model: bool = True
    """Reinforcement learning takes its scores, or a part of them, from a reward model."""


def direct_inputs(stage: Stage) -> tuple[Stage, ...]:
    """Return the stages right before this one: its inputs, less those that another input was made from."""
    sources = _sources(stage)
    earlier = set().union(*map(_ancestors, sources))
    return tuple(source for source in sources if source not in earlier)


def _sources(stage: Stage) -> tuple[Stage, ...]:
    """Stages whose artifact it may read: its inputs, and what stands for the models that it may be given."""
    provided = (stage_providing(role) for role, _ in GRAPH[stage].given)
    inputs = [source for _, source in GRAPH[stage].inputs]
    return tuple(dict.fromkeys([*inputs, *(source for source in provided if source not in (None, stage))]))  # pyright: ignore[reportReturnType]


def _ancestors(stage: Stage) -> set[Stage]:
    sources = set(_sources(stage))
    return sources.union(*map(_ancestors, sources))


def first_stages() -> tuple[Stage, ...]:
    """Return the stages that a run with a base model may enter at: those that take it in the place of a model."""
    return tuple(
        stage for stage, spec in GRAPH.items() if any(role == BASE_MODEL and place for role, place in spec.given)
    )


def selected_stages(way: Way) -> frozenset[Stage]:
    """Return the stages that a run executes; the rest show as skipped."""
    return frozenset(pipeline_stages()) - skipped_stages(way).keys()


def skipped_stages(way: Way) -> dict[Stage, str]:
    """Return the stages of the pipeline that a run does without, each with the reason, in order.

    A run that stops before alignment is neither evaluated nor promoted unless `last_stage` says so: stopping at
    `sft` gives the SFT model and ends.
    """
    reasons = {stage: why for stage in pipeline_stages() if (why := _why_not(GRAPH[stage], way))}
    runs = [spec for stage, spec in GRAPH.items() if spec.in_pipeline and stage not in reasons]
    if not any(spec.trains for spec in runs) and Stage.PROMOTE not in reasons:
        reasons[Stage.PROMOTE] = "nothing is trained that could be registered"
    converter = stage_providing(BASE_MODEL)
    readers = [spec for spec in runs if spec.stage is not converter and BASE_MODEL in dict(spec.given)]
    if converter and converter not in reasons and not readers and way.last_stage is not converter:
        reasons[converter] = f"the run ends with {way.last_stage.value}, before any stage that reads base_model"
    return {stage: reasons[stage] for stage in pipeline_stages() if stage in reasons}


def _why_not(spec: StageSpec, way: Way) -> str:
    """Why a run does without a stage; empty when it runs, or when that depends on what else does."""
    stage, order = spec.stage, pipeline_stages()
    if spec.provides and not way.converts:
        return f"{spec.provides} is not a GGUF file" if spec.provides in way.given else f"no {spec.provides} is given"
    if way.last_stage not in order or order.index(stage) > order.index(way.last_stage):
        return f"the run ends with {way.last_stage.value} (last_stage)"
    if spec.asked_by and spec.asked_by not in way.asks_for:
        return f"it is not asked for ({spec.asked_by})"
    if not spec.trains:
        return ""
    if spec.replaced_by and spec.replaced_by in way.given:
        return f"{spec.replaced_by} is given in its place"
    if not spec.inputs_of_models and BASE_MODEL in way.given and not way.continue_pretraining:
        return f"{BASE_MODEL} is given in its place"
    if spec.aligned:
        if stage not in _aligners(way.alignment):
            return f"alignment={way.alignment.value}"
        if GRAPH[way.last_stage].aligned and stage is not way.last_stage:
            return f"the run ends with {way.last_stage.value} (last_stage), which stands beside it"
    if spec.judges:
        return _why_no_judge(spec, way)
    if way.first_stage is not None and order.index(stage) < order.index(way.first_stage):
        start = f": {BASE_MODEL} is given in its place" if not spec.scores and not spec.aligned else ""
        return f"the run starts with {way.first_stage.value} (first_stage){start}"
    if spec.scores and not _wants_reward(way):
        return "no stage of this run learns from it, and train_reward is off"
    return ""


def _why_no_judge(spec: StageSpec, way: Way) -> str:
    """Why a run trains no gold scorer. No model learns from it, so it does not matter where the run enters, if that is
    at a stage that trains."""
    if not asks_for_gold(way):
        return "no gold scorer is asked for (gold_scorer)"
    if way.first_stage is not None and not GRAPH[way.first_stage].trains:
        return f"the run starts with {way.first_stage.value} (first_stage), and trains nothing"
    last = GRAPH[way.last_stage]
    if last.stage is not spec.stage and not last.closing and spec.stage not in dict(last.inputs).values():
        return f"the run ends with {way.last_stage.value} (last_stage), before anything is judged"
    return ""


def asks_for_gold(way: Way) -> bool:
    """Whether a run is asked to train a gold scorer, by name or as its first or last stage. Then half of the pairs is
    left to that, also if the run ends before: a longer run goes on with the same models."""
    ends = (way.first_stage, way.last_stage)
    return GOLD_MODEL not in way.given and (
        way.train_gold or any(stage is not None and GRAPH[stage].judges for stage in ends)
    )


def _aligners(alignment: Alignment) -> set[Stage]:
    return {spec.stage for spec in aligned_models() if alignment in (Alignment.BOTH, spec.stage.value)}


def _wants_reward(way: Way) -> bool:
    """Whether a reward model is asked for: by name, or by a stage that learns from it."""
    if way.train_reward or REWARD_BASE in way.given:
        return True
    if any(stage is not None and GRAPH[stage].learnt_from for stage in (way.first_stage, way.last_stage)):
        return True
    return way.scored_by_model and any(
        learns_from_scores(spec) and not _why_not(spec, way) for spec in aligned_models()
    )


def learns_from_scores(spec: StageSpec) -> bool:
    """Whether a stage is trained with a reward model."""
    return spec.trains and any(GRAPH[source].learnt_from for _, source in spec.inputs)


def contradiction(way: Way) -> str:
    """Return the first thing in a way that cannot be, with what to do about it; empty when all goes together."""
    if way.continue_pretraining and BASE_MODEL not in way.given:
        return (
            "continue_pretraining=True needs base_model, which is empty; give the model to pretrain further, or "
            "leave continue_pretraining off to pretrain from scratch"
        )
    return _wrong_entry(way) or _wrong_reward(way) or _wrong_feedback(way)


def _wrong_entry(way: Way) -> str:
    first = way.first_stage
    if first is None:
        return ""
    here = f"first_stage={first.value!r}"
    allowed = ", ".join(stage.value for stage in first_stages())
    if first not in first_stages():
        return f"{here} is not a stage that a run can enter at; allowed: {allowed}, or empty"
    if BASE_MODEL not in way.given:
        return f"{here} needs base_model, which is empty; give the model to start from, or leave first_stage empty"
    if way.continue_pretraining:
        return (
            f"{here} and continue_pretraining=True contradict each other, because pretraining comes first; leave one "
            "of them out"
        )
    if GRAPH[first].aligned and first not in _aligners(way.alignment):
        return f"{here} is not part of a run with alignment={way.alignment.value!r}; choose alignment={first.value!r}"
    scorers = [spec for spec in GRAPH.values() if spec.learnt_from]
    order = pipeline_stages()
    before = [spec for spec in scorers if order.index(spec.stage) < order.index(first)]
    replaced_by = GRAPH[first].replaced_by
    if replaced_by and replaced_by in way.given:
        return f"{here} trains a {_named(first)} and {replaced_by} gives one; leave one of them empty"
    if not before or REWARD_MODEL in way.given:
        return ""
    learners = [
        spec.stage.value
        for spec in aligned_models()
        if way.scored_by_model
        and learns_from_scores(spec)
        and not _why_not(spec, replace(way, given=way.given | {REWARD_MODEL}))
    ]
    if learners:
        return (
            f"{here} trains no reward model and {learners[0]} needs one; give reward_model, or use "
            f"first_stage={before[0].stage.value!r} to train it"
        )
    asked = "reward_base" if REWARD_BASE in way.given else "train_reward" if way.train_reward else ""
    if asked:
        return (
            f"{asked} asks for a reward model and {here} comes after the stage that trains one; leave {asked} out, or "
            f"use first_stage={before[0].stage.value!r}"
        )
    return ""


def _wrong_reward(way: Way) -> str:
    if REWARD_MODEL in way.given:
        for name, is_set in ((REWARD_BASE, REWARD_BASE in way.given), ("train_reward", way.train_reward)):
            if is_set:
                return (
                    f"reward_model and {name} contradict each other: the first gives a reward model, the second trains "
                    "one; leave one of them out"
                )
    if way.train_gold and GOLD_MODEL in way.given:
        return (
            "gold_model and gold_scorer='train' contradict each other: the first gives a gold scorer, the second "
            "trains one; leave one of them out"
        )
    replaced_by = GRAPH[way.last_stage].replaced_by
    if replaced_by and replaced_by in way.given:
        return (
            f"last_stage={way.last_stage.value!r} trains a {_named(way.last_stage)} and {replaced_by} gives one; leave "
            f"{replaced_by} empty, or end with a later stage"
        )
    selected = selected_stages(way)
    for role in (REWARD_MODEL, REWARD_BASE, GOLD_MODEL, JUDGE):
        unread = role == REWARD_MODEL and not way.scored_by_model  # but in an evaluation
        readers = [
            stage
            for stage, spec in GRAPH.items()
            if role in dict(spec.given) and not (unread and learns_from_scores(spec))
        ]
        if role in way.given and not selected & set(readers):
            names = " or ".join(stage.value for stage in readers)
            return (
                f"{role} is given and no stage of this run reads it, because the run has no {names}; leave {role} "
                f"empty, or choose a last_stage (now {way.last_stage.value!r}) and an alignment with {names}"
            )
    if way.train_reward and not any(GRAPH[stage].learnt_from for stage in selected):
        return (
            f"train_reward=True and last_stage={way.last_stage.value!r}, which comes before the reward model; leave "
            "train_reward off, or end later"
        )
    return ""


def _wrong_feedback(way: Way) -> str:
    if CRITIC in way.given and AI_FEEDBACK not in way.asks_for:
        return f"{CRITIC} is given and {AI_FEEDBACK} is off; choose what {AI_FEEDBACK} makes, or leave {CRITIC} empty"
    if AI_FEEDBACK in way.asks_for and not way.given & {BASE_MODEL, CRITIC}:
        return (
            f"{AI_FEEDBACK} needs a model that responds, and {BASE_MODEL} and {CRITIC} are empty; give one of them, or "
            f"set {AI_FEEDBACK}=off"
        )
    if GENERATOR in way.given and SYNTHESIS not in way.asks_for:
        return f"{GENERATOR} is given and {SYNTHESIS} is off; choose a method, or leave {GENERATOR} empty"
    if SYNTHESIS in way.asks_for and not way.given & {BASE_MODEL, GENERATOR}:
        return (
            f"{SYNTHESIS} needs a model that writes, and {GENERATOR} and {BASE_MODEL} are empty; give one of them, or "
            f"set {SYNTHESIS}=off"
        )
    return ""


def _named(stage: Stage) -> str:
    return GRAPH[stage].label.lower()


def needed_data(
    selected: Iterable[Stage], *, has_base_model: bool, prompt_fields: Iterable[str] = (INSTRUCTIONS,)
) -> dict[str, str]:
    """Return the fields of data that a run cannot do without, each with the stage that needs it. `prompt_fields` are
    those whose prompts reinforcement learning answers.

    Documents of which pairs are derived are not among them: that depends on the sources.
    """
    selected = set(selected)
    needed: dict[str, str] = {}
    for stage, spec in reversed(GRAPH.items()):
        if stage in selected and spec.needs:
            fields = prompt_fields if learns_from_scores(spec) else (spec.needs,)
            needed |= dict.fromkeys(fields, stage.value)
    if Stage.TOKENIZE in selected and not has_base_model:  # nothing brings a tokenizer, so text must train one
        needed.setdefault(DOCUMENTS, Stage.TOKENIZE.value)
    return needed
