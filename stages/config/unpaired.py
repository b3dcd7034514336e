"""Single labelled responses (`#format=unpaired`) have one use, the loss `kto` of DPO: a run that has some and trains
otherwise would read them for nothing."""

from collections.abc import Iterable
from typing import Any

from stages.config.errors import ConfigError
from stages.config.graph import GRAPH, PREFERENCES, Stage
from stages.config.pipeline import PipelineConfig
from stages.config.preference_losses import KTOLoss
from stages.config.sources import SourceWeight, parse_source


def weights_of(stage: Stage, weights: Iterable[SourceWeight], lines: Iterable[Any]) -> list[SourceWeight]:
    """Return the weights that a stage can have: those of single responses are for DPO alone."""
    alone = {source.uri for source in (parse_source(line) for line in lines) if source.is_unpaired}
    return [entry for entry in weights if stage is Stage.DPO or entry.source not in alone]


def refuse_unused(config: PipelineConfig) -> None:
    """Raise ConfigError for single responses that no stage of the run trains on, and for a stage that trains on pairs
    where all preferences are single responses."""
    sources = config.curate.preference_sources
    alone = [source.uri for source in sources if source.is_unpaired]
    if not alone:
        return
    uses = Stage.DPO in config.selected and isinstance(config.dpo.loss, KTOLoss)
    last = GRAPH[config.last_stage]
    if not uses and (last.trains or last.closing):
        trained = f"dpo.loss.kind={config.dpo.loss.kind!r}" if Stage.DPO in config.selected else "no stage dpo"
        raise ConfigError(
            f"preferences: {alone} have format=unpaired, which only the loss kto of stage dpo trains on; the run has "
            f"{trained}",
            advice="Set dpo.loss.kind=kto with alignment=dpo or both, or use format=labelled, which makes pairs of a "
            "good and a bad response to the same prompt.",
        )
    on_pairs = [stage for stage in config.selected if GRAPH[stage].needs == PREFERENCES and stage is not Stage.DPO]
    if on_pairs and len(alone) == len(sources) and not config.previous_data:
        raise ConfigError(
            f"preferences: all of {alone} have format=unpaired, and {', '.join(sorted(on_pairs))} trains on pairs",
            advice="Give pairs as well, or train without: alignment=dpo, gold_scorer=none, train_reward=false.",
        )
