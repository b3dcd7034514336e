"""The pipeline as data: which stage produces which kind of artifact from which inputs. DAGs, operators and the runner
read it here."""

from dataclasses import dataclass

from stages.config.base import Choice


class Stage(Choice):
    """The pipeline's units in the order in which they first make sense."""

    CURATE = "curate", "Curate: clean, deduplicated text and pairs"
    TOKENIZE = "tokenize", "Tokenize: tokenizer and packed tokens"
    PRETRAIN = "pretrain", "Pretrain: the base model"
    SFT = "sft", "SFT: the model that follows instructions"
    REWARD = "reward", "Reward: the model of preferences"
    PPO = "ppo", "PPO: aligned by reinforcement learning"
    DPO = "dpo", "DPO: aligned by preference optimisation"
    EVALUATE = "evaluate", "Evaluate: all models side by side"
    PROMOTE = "promote", "Promote: registered models and the champion"
    REPORT = "report", "Report: the whole pipeline"
    # Outside the pipeline, in DAGs of their own: what a model says, and what people say about it.
    RESPOND = "respond"
    RATE = "rate"


PIPELINE_STAGES: tuple[Stage, ...] = tuple(stage for stage in Stage if stage not in (Stage.RESPOND, Stage.RATE))
"""The stages of `llm_pipeline`, in order; a PipelineConfig has a part for each of them."""


class Alignment(Choice):
    """How the SFT model is aligned."""

    PPO = "ppo", "PPO: reinforcement learning against the reward model"
    DPO = "dpo", "DPO: directly from preference pairs"
    BOTH = "both", "Both, side by side"
    NONE = "none", "None: stop at instructions"


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
        StageSpec(Stage.CURATE, "curated", 3, (), asset="llm/documents"),
        StageSpec(Stage.TOKENIZE, "tokens", 2, (("curated", Stage.CURATE),)),
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
            2,
            (("tokens", Stage.TOKENIZE), ("model", Stage.SFT)),
            asset="llm/reward-model",
            trains=True,
        ),
        StageSpec(
            Stage.PPO,
            "ppo-model",
            2,
            (("tokens", Stage.TOKENIZE), ("model", Stage.SFT), ("reward", Stage.REWARD)),
            asset="llm/aligned-model",
            trains=True,
        ),
        StageSpec(
            Stage.DPO,
            "dpo-model",
            2,
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
        # Its model is any language model and its tokens are that model's, so the DAG says who fills the roles.
        StageSpec(Stage.RESPOND, "responses", 1, ()),
        StageSpec(Stage.RATE, "preferences", 1, (("responses", Stage.RESPOND),), asset="llm/preferences"),
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
    if last_stage not in PIPELINE_STAGES:
        return set()
    if last_stage in (Stage.PPO, Stage.DPO):
        return {stage for stage in _CHAIN if stage is last_stage or stage not in (Stage.PPO, Stage.DPO)}
    return set(_CHAIN[: _CHAIN.index(last_stage) + 1])
