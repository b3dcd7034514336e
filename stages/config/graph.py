"""The pipeline as data: which stage produces which kind of artifact from which inputs. DAGs, operators and the runner
read it here."""

from dataclasses import dataclass
from enum import StrEnum


class Stage(StrEnum):
    """The pipeline's units in the order in which they first make sense."""

    CURATE = "curate"
    TOKENIZE = "tokenize"
    PRETRAIN = "pretrain"
    SFT = "sft"
    REWARD = "reward"
    PPO = "ppo"
    DPO = "dpo"
    EVALUATE = "evaluate"
    PROMOTE = "promote"
    REPORT = "report"


class Alignment(StrEnum):
    """How the SFT model is aligned."""

    PPO = "ppo"
    DPO = "dpo"
    BOTH = "both"
    NONE = "none"


@dataclass(frozen=True)
class StageSpec:
    """One node: `inputs` maps the role that the verb uses to the stage that fills it."""

    stage: Stage
    kind: str
    version: int
    """Raise it when the same config and inputs would now give another result: old artifacts then no longer hit."""
    inputs: tuple[tuple[str, Stage], ...]
    asset: str | None = None
    trains: bool = False


_MODELS = (
    ("base", Stage.PRETRAIN),
    ("sft", Stage.SFT),
    ("reward", Stage.REWARD),
    ("ppo", Stage.PPO),
    ("dpo", Stage.DPO),
)
_DATA = (("curated", Stage.CURATE), ("tokens", Stage.TOKENIZE))

GRAPH: dict[Stage, StageSpec] = {
    spec.stage: spec
    for spec in (
        StageSpec(Stage.CURATE, "curated", 2, (), asset="llm/documents"),
        StageSpec(Stage.TOKENIZE, "tokens", 1, (("curated", Stage.CURATE),)),
        StageSpec(Stage.PRETRAIN, "base-model", 1, (("tokens", Stage.TOKENIZE),), asset="llm/base-model", trains=True),
        StageSpec(
            Stage.SFT,
            "sft-model",
            1,
            (("tokens", Stage.TOKENIZE), ("model", Stage.PRETRAIN)),
            asset="llm/sft-model",
            trains=True,
        ),
        StageSpec(
            Stage.REWARD,
            "reward-model",
            1,
            (("tokens", Stage.TOKENIZE), ("model", Stage.SFT)),
            asset="llm/reward-model",
            trains=True,
        ),
        StageSpec(
            Stage.PPO,
            "ppo-model",
            1,
            (("tokens", Stage.TOKENIZE), ("model", Stage.SFT), ("reward", Stage.REWARD)),
            asset="llm/aligned-model",
            trains=True,
        ),
        StageSpec(
            Stage.DPO,
            "dpo-model",
            1,
            (("tokens", Stage.TOKENIZE), ("model", Stage.SFT)),
            asset="llm/aligned-model",
            trains=True,
        ),
        StageSpec(Stage.EVALUATE, "evaluation", 1, _DATA + _MODELS),
        StageSpec(Stage.PROMOTE, "promotion", 1, (("evaluation", Stage.EVALUATE), *_MODELS)),
        StageSpec(
            Stage.REPORT,
            "report",
            1,
            (("promotion", Stage.PROMOTE), ("evaluation", Stage.EVALUATE), *_DATA, *_MODELS),
        ),
    )
}

_CHAIN: tuple[Stage, ...] = (
    Stage.CURATE,
    Stage.TOKENIZE,
    Stage.PRETRAIN,
    Stage.SFT,
    Stage.REWARD,
    Stage.PPO,
    Stage.DPO,
)
_CLOSING = (Stage.EVALUATE, Stage.PROMOTE, Stage.REPORT)


def selected_stages(
    *, alignment: Alignment, last_stage: Stage, has_base_model: bool, continue_pretraining: bool = False
) -> frozenset[Stage]:
    """Return the stages that a run executes; the rest show as skipped.

    A base model stands in for pretraining, unless its pretraining goes on.

    A run that stops before alignment is neither evaluated nor promoted unless `last_stage` says so: stopping at
    `sft` gives the SFT model and ends.
    """
    aligners = {
        Alignment.PPO: {Stage.REWARD, Stage.PPO},
        Alignment.DPO: {Stage.REWARD, Stage.DPO},
        Alignment.BOTH: {Stage.REWARD, Stage.PPO, Stage.DPO},
        Alignment.NONE: set(),
    }[alignment]
    wanted = {Stage.CURATE, Stage.TOKENIZE, Stage.PRETRAIN, Stage.SFT} | aligners | set(_CLOSING)
    if has_base_model and not continue_pretraining:
        wanted.discard(Stage.PRETRAIN)
    wanted &= _up_to(last_stage)
    return frozenset(wanted)


def _up_to(last_stage: Stage) -> set[Stage]:
    if last_stage in _CLOSING:
        return set(_CHAIN) | set(_CLOSING[: _CLOSING.index(last_stage) + 1])
    if last_stage in (Stage.PPO, Stage.DPO):
        return {stage for stage in _CHAIN if stage is last_stage or stage not in (Stage.PPO, Stage.DPO)}
    return set(_CHAIN[: _CHAIN.index(last_stage) + 1])
