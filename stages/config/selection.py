"""Which stages a run executes, and in which order."""

from stages.config.graph import GRAPH, Alignment, Stage, aligned_models, pipeline_stages


def direct_inputs(stage: Stage) -> tuple[Stage, ...]:
    """Return the stages right before this one: its inputs, less those that another input was made from."""
    sources = tuple(dict.fromkeys(source for _, source in GRAPH[stage].inputs))
    earlier = set().union(*map(_ancestors, sources))
    return tuple(source for source in sources if source not in earlier)


def _ancestors(stage: Stage) -> set[Stage]:
    sources = {source for _, source in GRAPH[stage].inputs}
    return sources.union(*map(_ancestors, sources))


def selected_stages(
    *, alignment: Alignment, last_stage: Stage, has_base_model: bool, continue_pretraining: bool = False
) -> frozenset[Stage]:
    """Return the stages that a run executes; the rest show as skipped.

    A base model stands in for pretraining, unless its pretraining goes on.

    A run that stops before alignment is neither evaluated nor promoted unless `last_stage` says so: stopping at
    `sft` gives the SFT model and ends.
    """
    aligners = {spec.stage for spec in aligned_models() if alignment in (Alignment.BOTH, spec.stage.value)}
    # Aligned models are judged by the reward model, also those that were trained without it.
    unneeded = set() if aligners else {spec.stage for spec in GRAPH.values() if spec.scores}
    unneeded |= {spec.stage for spec in aligned_models()} - aligners
    if has_base_model and not continue_pretraining:
        unneeded.add(Stage.PRETRAIN)
    return frozenset(_up_to(last_stage) - unneeded)


def _up_to(last_stage: Stage) -> set[Stage]:
    """Return the pipeline's stages until this one; of the aligned models, which stand side by side, it alone."""
    if not GRAPH[last_stage].in_pipeline:
        return set()
    stages = pipeline_stages()
    until = set(stages[: stages.index(last_stage) + 1])
    if GRAPH[last_stage].aligned:
        until -= {spec.stage for spec in aligned_models() if spec.stage is not last_stage}
    return until
