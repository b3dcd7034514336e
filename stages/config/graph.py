"""The pipeline as data: which stage produces which kind of artifact from which inputs. DAGs, operators and the runner
read it here."""

from dataclasses import dataclass
from typing import Literal

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
class Headline:
    """A metric that sums a stage up in one number: on the screen, in the report, in the approval table."""

    key: str
    """As it stands in the manifest."""
    label: str
    format: str
    """Python's format of the number, such as `.1%`."""
    better: Literal["higher", "lower", ""] = ""
    """Which way is better; empty for counts and distances, which are neither."""


@dataclass(frozen=True)
class StageSpec:
    """All that other files know about a stage; every list of stages is derived from these facts."""

    stage: Stage
    kind: str
    """Of the artifact that it publishes."""
    version: int
    """Raise it when the same config and inputs would now give another result: old artifacts then no longer hit."""
    inputs: tuple[tuple[str, Stage], ...]
    """The role that the verb uses, and the stage that fills it."""
    role: str = ""
    """Under which its artifact is an input of the closing stages; empty when it is none."""
    label: str = ""
    """Its model in tables and reports."""
    asset: str | None = None
    """Airflow's asset that its artifact updates."""
    trains: bool = False
    """A model comes out of the training loop."""
    scores: bool = False
    """Its model gives scores and no text."""
    aligned: bool = False
    """Its model may become champion."""
    closing: bool = False
    """Runs after all models are made, over all of them."""
    seeded: bool = False
    """Has a `seed`, which the run's seed fills."""
    weighs: Literal["instructions", "preferences", ""] = ""
    """Field of the form whose sources it trains on; their `#weight=` becomes its mixture."""
    registered_as: str = ""
    """Suffix of the registered model's name: `<run name>-<this>`."""
    page: str = ""
    """HTML page that it adds to the MLflow parent run; the task in Airflow gets a button for it."""
    headlines: tuple[Headline, ...] = ()
    """Most telling first; the first two that a manifest has are shown."""


_DATA = (
    StageSpec(
        Stage.CURATE,
        kind="curated",
        version=3,
        inputs=(),
        role="curated",
        asset="llm/documents",
        seeded=True,
        headlines=(
            Headline("curate/documents_kept", "documents", ",.0f"),
            Headline("curate/planted_found", "planted found", ".0%", "higher"),
        ),
    ),
    StageSpec(
        Stage.TOKENIZE,
        kind="tokens",
        version=2,
        inputs=(("curated", Stage.CURATE),),
        role="tokens",
        headlines=(
            Headline("tokens/train", "tokens", ",.0f"),
            Headline("tokens/vocab_size", "vocabulary", ",.0f"),
        ),
    ),
)

_TRAINED = (
    StageSpec(
        Stage.PRETRAIN,
        kind="base-model",
        version=1,
        inputs=(("tokens", Stage.TOKENIZE),),
        role="base",
        label="Base",
        asset="llm/base-model",
        trains=True,
        seeded=True,
        registered_as="base",
        headlines=(
            Headline("eval/perplexity", "perplexity", ".2f", "lower"),
            Headline("eval/loss", "loss", ".3f", "lower"),
        ),
    ),
    StageSpec(
        Stage.SFT,
        kind="sft-model",
        version=1,
        inputs=(("tokens", Stage.TOKENIZE), ("model", Stage.PRETRAIN)),
        role="sft",
        label="SFT",
        asset="llm/sft-model",
        trains=True,
        seeded=True,
        weighs="instructions",
        registered_as="sft",
        headlines=(
            Headline("eval/loss", "held-out loss", ".3f", "lower"),
            Headline("eval/perplexity", "perplexity", ".2f", "lower"),
        ),
    ),
    StageSpec(
        Stage.REWARD,
        kind="reward-model",
        version=2,
        inputs=(("tokens", Stage.TOKENIZE), ("model", Stage.SFT)),
        role="reward",
        label="Reward model",
        asset="llm/reward-model",
        trains=True,
        scores=True,
        seeded=True,
        weighs="preferences",
        registered_as="reward",
        headlines=(
            Headline("eval/reward_accuracy", "held-out accuracy", ".1%", "higher"),
            Headline("eval/reward_margin", "margin", "+.3f", "higher"),
            Headline("reward/accuracy", "accuracy in training", ".1%", "higher"),
        ),
    ),
    StageSpec(
        Stage.PPO,
        kind="ppo-model",
        version=2,
        inputs=(("tokens", Stage.TOKENIZE), ("model", Stage.SFT), ("reward", Stage.REWARD)),
        role="ppo",
        label="PPO",
        asset="llm/aligned-model",
        trains=True,
        aligned=True,
        seeded=True,
        registered_as="aligned",
        headlines=(
            Headline("eval/score", "held-out score", "+.3f", "higher"),
            Headline("eval/kl", "KL", ".2f"),
            Headline("ppo/score", "score in training", "+.3f", "higher"),
        ),
    ),
    StageSpec(
        Stage.DPO,
        kind="dpo-model",
        version=2,
        inputs=(("tokens", Stage.TOKENIZE), ("model", Stage.SFT)),
        role="dpo",
        label="DPO",
        asset="llm/aligned-model",
        trains=True,
        aligned=True,
        seeded=True,
        weighs="preferences",
        registered_as="aligned",
        headlines=(
            Headline("eval/dpo_accuracy", "held-out accuracy", ".1%", "higher"),
            Headline("eval/dpo_margin", "margin", "+.3f", "higher"),
            Headline("dpo/accuracy", "accuracy in training", ".1%", "higher"),
        ),
    ),
)


def _as_inputs(specs: tuple[StageSpec, ...]) -> tuple[tuple[str, Stage], ...]:
    return tuple((spec.role, spec.stage) for spec in specs)


_EVALUATE = StageSpec(
    Stage.EVALUATE,
    kind="evaluation",
    version=1,
    inputs=_as_inputs(_DATA + _TRAINED),
    role="evaluation",
    closing=True,
    seeded=True,
    headlines=(
        *(
            Headline(f"{spec.role}/eval/win_rate", f"{spec.label} wins", ".0%", "higher")
            for spec in _TRAINED
            if spec.aligned
        ),
        Headline("sft/eval/perplexity", "perplexity", ".2f", "lower"),
    ),
)
_PROMOTE = StageSpec(
    Stage.PROMOTE,
    kind="promotion",
    version=1,
    inputs=_as_inputs((_EVALUATE, *_TRAINED)),
    role="promotion",
    closing=True,
    headlines=(
        Headline("promotion/registered", "models registered", ".0f"),
        Headline("promotion/promoted", "promoted", ".0f"),
    ),
)
_REPORT = StageSpec(
    Stage.REPORT,
    kind="report",
    version=1,
    inputs=_as_inputs((_PROMOTE, _EVALUATE, *_DATA, *_TRAINED)),
    closing=True,
    page="report.html",
    headlines=(Headline("report/bytes", "bytes", ",.0f"),),
)
_PEOPLE = (
    # Its model is any language model and its tokens are that model's, so the DAG says who fills the roles.
    StageSpec(Stage.RESPOND, kind="responses", version=1, inputs=()),
    StageSpec(
        Stage.RATE, kind="preferences", version=1, inputs=(("responses", Stage.RESPOND),), asset="llm/preferences"
    ),
)

GRAPH: dict[Stage, StageSpec] = {
    spec.stage: spec for spec in (*_DATA, *_TRAINED, _EVALUATE, _PROMOTE, _REPORT, *_PEOPLE)
}

_CHAIN: tuple[Stage, ...] = tuple(spec.stage for spec in (*_DATA, *_TRAINED))
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


def trained_stages() -> tuple[StageSpec, ...]:
    """Return the stages that train a model, in order."""
    return tuple(spec for spec in GRAPH.values() if spec.trains)


def aligned_models() -> tuple[StageSpec, ...]:
    """Return the stages whose model may become champion, in order."""
    return tuple(spec for spec in GRAPH.values() if spec.aligned)


def spec_of_kind(kind: str) -> StageSpec | None:
    """Return the stage that publishes artifacts of this kind, None for what no stage of this version publishes."""
    return next((spec for spec in GRAPH.values() if spec.kind == kind), None)


def spec_of_role(role: str) -> StageSpec:
    """Return the stage whose artifact has this role in the closing stages; KeyError when there is none."""
    return {spec.role: spec for spec in GRAPH.values() if spec.role}[role]


def registered_name(run_name: str, spec: StageSpec) -> str:
    """Name under which a stage's model is registered in MLflow."""
    return f"{run_name}-{spec.registered_as}"
