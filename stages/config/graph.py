"""The pipeline as data: what every stage is, which artifact it publishes, and from which inputs.

Each list of stages elsewhere (form, plan, screen, report, registry, ...) is computed from GRAPH when it is needed. None
is a constant of its module, so a stage that is added here is in all of them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from stages.config.base import Choice

BASE_MODEL, REWARD_MODEL, REWARD_BASE = "base_model", "reward_model", "reward_base"
GOLD_MODEL, JUDGE, CRITIC, GENERATOR = "gold_model", "judge", "critic", "generator"
"""Roles of the models that a run is given: what its policy starts from, the reward model that is used instead of a
trained one, what a trained one starts from, the gold scorer that judges instead of a trained one, the model that
compares responses, the one that criticises and revises them, and the one that writes instruction data. Each is a field
of the form under the same name."""

GIVEN_MODELS = (BASE_MODEL, REWARD_MODEL, REWARD_BASE, GOLD_MODEL, JUDGE, CRITIC, GENERATOR)
MAY_BE_ENDPOINTS = (JUDGE, CRITIC, GENERATOR)
"""Of these, the ones that an HTTP endpoint may be."""
AI_FEEDBACK, SYNTHESIS = "ai_feedback", "synthesis"
"""Fields of the form that ask for data by a constitution, and for instruction data that a model writes."""

DOCUMENTS, INSTRUCTIONS, PREFERENCES, PROMPTS = "documents", "instructions", "preferences", "prompts"
DATA_FIELDS = (DOCUMENTS, INSTRUCTIONS, PREFERENCES, PROMPTS)
"""The kinds of data, each a field of the form."""

BENCHMARKS = "benchmarks"
"""What models are measured by and never trained on; a field of the form, too."""


class Stage(Choice):
    """The stages, in the order in which a run needs them."""

    CONVERT = "convert", "Convert: a given GGUF file as a Hugging Face model"
    CONSTITUTION = "constitution", "Constitution: responses criticised, revised and compared by principles"
    SYNTHESIZE = "synthesize", "Synthesize: instruction data that a model writes"
    CURATE = "curate", "Curate: clean, deduplicated text and pairs"
    TOKENIZE = "tokenize", "Tokenize: tokenizer and packed tokens"
    PRETRAIN = "pretrain", "Pretrain: the base model"
    SFT = "sft", "SFT: the model that follows instructions"
    REWARD = "reward", "Reward: the model of preferences"
    GOLD = "gold", "Gold: a scorer that no training sees"
    PPO = "ppo", "PPO: aligned by reinforcement learning"
    DPO = "dpo", "DPO: aligned by preference optimisation"
    EVALUATE = "evaluate", "Evaluate: all models side by side"
    PROMOTE = "promote", "Promote: registered models and the champion"
    REPORT = "report", "Report: the whole pipeline"
    # Outside the pipeline, in DAGs of their own: what a model says, what people say about it, which method is better.
    RESPOND = "respond"
    RATE = "rate"
    COMPARE = "compare", "Compare: alignment methods side by side"


class Alignment(Choice):
    """How the SFT model is aligned."""

    PPO = "ppo", "PPO: reinforcement learning against the reward model"
    DPO = "dpo", "DPO: directly from preference pairs"
    BOTH = "both", "Both, side by side"
    NONE = "none", "None: stop at instructions"


@dataclass(frozen=True)
class Headline:
    """A metric that sums a stage up in one number: on the screen, in the lineage graph, in progress."""

    key: str
    """Its key in the manifest's metrics."""
    label: str
    format: str
    """Python's format of the number, such as `.1%`."""
    better: Literal["higher", "lower", ""] = ""
    """Which way is better; empty for counts and distances, which are neither."""


@dataclass(frozen=True)
class Curve:
    """A figure of the report, drawn from the history of a training."""

    title: str
    lines: tuple[tuple[str, str], ...]
    """Metric key and its name in the legend."""


_LOSS = Curve("Loss", (("train/loss", "training"), ("eval/loss", "held-out")))

_SCORER_HEADLINES = (
    Headline("eval/reward_accuracy", "held-out accuracy", ".1%", "higher"),
    Headline("eval/reward_margin", "margin", "+.3f", "higher"),
    Headline("reward/accuracy", "accuracy in training", ".1%", "higher"),
)
_SCORER_CURVES = (
    _LOSS,
    Curve("Accuracy", (("reward/accuracy", "training"), ("eval/reward_accuracy", "held-out"))),
    Curve("Margin", (("reward/margin", "training"), ("eval/reward_margin", "held-out"))),
)


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
    in_pipeline: bool = True
    """A task of `llm_pipeline`, with a part of PipelineConfig; the others have a DAG of their own."""
    heavy: bool = False
    """Fills the machine: waits for a slot of the pool `gpu` and may take days."""
    dataset: bool = False
    """MLflow shows its artifact as a dataset."""
    gated: bool = False
    """A gate after it decides whether the run goes on; so does one after every stage that trains."""
    trains: bool = False
    """A model comes out of the training loop."""
    trained_models: int = 1
    """Models of the policy's size that each worker trains at most, if it trains at all; how many, its settings say
    (`TrainConfig.models`)."""
    frozen_models: int = 0
    """Models of that size that each worker holds at most only to read from."""
    pipeline_parallel: bool = False
    """Predicts next tokens and nothing else, so a pipeline of workers can share its model's layers."""
    scores: bool = False
    """Its model gives scores and no text."""
    judges: bool = False
    """Its model measures the others and none is trained with it, so a run that judges nothing does without."""
    replaced_by: str = ""
    """Role of the given model that a run may have in its place."""
    aligned: bool = False
    """Its model may become champion."""
    closing: bool = False
    """Runs after all models are made, over all of them."""
    strength: str = ""
    """Setting that says how strongly an aligned model is kept to its start: the beta of a comparison."""
    seeded: bool = False
    """Has a `seed`, which the run's seed fills."""
    seed_shift: int = 0
    """Added to the run's seed, where a model must not share its random choices with another one."""
    weighs: Literal["instructions", "preferences", ""] = ""
    """Field of the form whose sources it trains on; their `#weight=` becomes its mixture."""
    needs: Literal["documents", "instructions", "preferences", ""] = ""
    """Field of the form without whose data it has nothing to train on; a run reads no data that none of its stages
    needs."""
    given: tuple[tuple[str, str], ...] = ()
    """Given models that it may read: the role, and the input whose place the model takes (empty: in addition to its
    inputs). Of two for one place the first that is given counts."""
    asked_by: str = ""
    """Field of the form that asks for it; a run that does not ask does without."""
    makes: tuple[str, ...] = ()
    """Fields of the form whose kind of data it can make: curation reads its artifact as a source of its name."""
    provides: str = ""
    """Role of the given model that its artifact stands for in every other stage."""
    registered_as: str = ""
    """Suffix of the registered model's name: `<run name>-<this>`."""
    page: str = ""
    """HTML page that it adds to the MLflow parent run; the task in Airflow gets a button for it."""
    headlines: tuple[Headline, ...] = ()
    """Most telling first; the first two that a manifest has are shown."""
    curves: tuple[Curve, ...] = (_LOSS,)
    """Figures of the report, if it trains."""

    @property
    def inputs_of_models(self) -> tuple[str, ...]:
        """Roles of the inputs in whose place a given model may stand."""
        return tuple(role for role, _ in self.inputs if role in {place for _, place in self.given})

    @property
    def learnt_from(self) -> bool:
        """Whether its artifact is a reward model, whose scores other models are trained by."""
        return self.trains and self.scores and not self.judges

    @property
    def is_language_model(self) -> bool:
        """Whether its artifact is a model that writes text."""
        return self.trains and not self.scores

    def summary(self, metrics: Mapping[str, float], *, at_most: int = 2) -> str:
        """Return the headlines that `metrics` has, such as `perplexity 8.21, loss 2.105`."""
        known = [headline for headline in self.headlines if headline.key in metrics]
        return ", ".join(f"{one.label} {metrics[one.key]:{one.format}}" for one in known[:at_most])


_DATA = (
    StageSpec(
        Stage.CONVERT,
        kind="given-model",
        version=1,
        inputs=(),
        label="Given model",
        heavy=True,  # it holds the whole model in memory
        given=((BASE_MODEL, ""),),
        provides=BASE_MODEL,
        headlines=(Headline("convert/parameters", "parameters", ",.0f"),),
    ),
    StageSpec(
        Stage.CONSTITUTION,
        kind="constitution-data",
        version=2,
        inputs=(),
        given=((BASE_MODEL, ""), (CRITIC, "")),
        asked_by=AI_FEEDBACK,
        makes=(INSTRUCTIONS, PREFERENCES),
        heavy=True,
        frozen_models=2,  # what responds, and what criticises
        dataset=True,
        gated=True,
        seeded=True,
        page="constitution.html",
        headlines=(
            Headline("constitution/accepted_share", "accepted", ".0%", "higher"),
            Headline("constitution/pairs", "pairs", ",.0f"),
            Headline("constitution/length_ratio", "length of revisions", ".2f"),
        ),
    ),
    StageSpec(
        Stage.SYNTHESIZE,
        kind="synthetic-data",
        version=2,
        inputs=(),
        given=((GENERATOR, ""), (BASE_MODEL, ""), (REWARD_MODEL, "")),
        asked_by=SYNTHESIS,
        makes=(INSTRUCTIONS,),
        heavy=True,
        frozen_models=1,
        dataset=True,
        gated=True,
        seeded=True,
        page="synthesis.html",
        headlines=(
            Headline("synthesize/rows", "rows", ",.0f"),
            Headline("synthesize/accepted_share", "accepted", ".0%", "higher"),
            Headline("synthesize/cost", "cost", ",.2f"),
        ),
    ),
    StageSpec(
        Stage.CURATE,
        kind="curated",
        version=3,
        inputs=(("constitution", Stage.CONSTITUTION), ("synthesize", Stage.SYNTHESIZE)),
        role="curated",
        asset="llm/documents",
        heavy=True,
        dataset=True,
        gated=True,
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
        given=((BASE_MODEL, ""),),  # its tokenizer
        role="tokens",
        dataset=True,
        gated=True,
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
        given=((BASE_MODEL, ""),),
        needs=DOCUMENTS,
        role="base",
        label="Base",
        asset="llm/base-model",
        heavy=True,
        trains=True,
        pipeline_parallel=True,
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
        given=((BASE_MODEL, "model"),),
        needs=INSTRUCTIONS,
        role="sft",
        label="SFT",
        asset="llm/sft-model",
        heavy=True,
        trains=True,
        pipeline_parallel=True,
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
        given=((REWARD_BASE, "model"), (BASE_MODEL, "model")),
        needs=PREFERENCES,
        role="reward",
        label="Reward model",
        asset="llm/reward-model",
        heavy=True,
        trains=True,
        scores=True,
        replaced_by=REWARD_MODEL,
        seeded=True,
        weighs="preferences",
        registered_as="reward",
        headlines=_SCORER_HEADLINES,
        curves=_SCORER_CURVES,
    ),
    StageSpec(
        Stage.GOLD,
        kind="gold-model",
        version=1,
        inputs=(("tokens", Stage.TOKENIZE), ("model", Stage.SFT)),
        given=((REWARD_BASE, "model"), (BASE_MODEL, "model")),
        needs=PREFERENCES,
        role="gold",
        label="Gold scorer",
        asset="llm/gold-model",
        heavy=True,
        trains=True,
        scores=True,
        judges=True,
        replaced_by=GOLD_MODEL,
        seeded=True,
        seed_shift=1,
        weighs="preferences",
        registered_as="gold",
        headlines=_SCORER_HEADLINES,
        curves=_SCORER_CURVES,
    ),
    StageSpec(
        Stage.PPO,
        kind="ppo-model",
        version=2,
        # The gold scorer, where the run has one, is measured with and never trained with.
        inputs=(("tokens", Stage.TOKENIZE), ("model", Stage.SFT), ("reward", Stage.REWARD), ("gold", Stage.GOLD)),
        given=((BASE_MODEL, "model"), (REWARD_MODEL, "reward"), (GOLD_MODEL, "gold")),
        needs=INSTRUCTIONS,  # their prompts
        role="ppo",
        label="PPO",
        asset="llm/aligned-model",
        heavy=True,
        trains=True,
        trained_models=2,  # policy and critic
        frozen_models=2,  # reference and reward model
        aligned=True,
        strength="kl_coefficient",
        seeded=True,
        registered_as="aligned",
        headlines=(
            Headline("eval/score", "held-out score", "+.3f", "higher"),
            Headline("eval/kl", "KL", ".2f"),
            Headline("ppo/score", "score in training", "+.3f", "higher"),
            Headline("ppo/kl", "KL in training", ".2f"),
        ),
        curves=(
            Curve(
                "Score",
                (("ppo/score", "sampled"), ("eval/score", "held-out prompts"), ("ppo/reward", "after KL penalty")),
            ),
            Curve("KL to its start (nats a response)", (("ppo/kl", "sampled"), ("eval/kl", "held-out prompts"))),
            Curve("Loss", (("train/loss", "policy and value"), ("ppo/value_loss", "value"))),
            Curve(
                "Response length (tokens)",
                (("ppo/response_length", "sampled"), ("eval/response_length", "held-out prompts")),
            ),
        ),
    ),
    StageSpec(
        Stage.DPO,
        kind="dpo-model",
        version=2,
        inputs=(("tokens", Stage.TOKENIZE), ("model", Stage.SFT)),
        given=((BASE_MODEL, "model"),),
        needs=PREFERENCES,
        role="dpo",
        label="DPO",
        asset="llm/aligned-model",
        heavy=True,
        trains=True,
        aligned=True,
        strength="loss.beta",
        seeded=True,
        weighs="preferences",
        registered_as="aligned",
        headlines=(
            Headline("eval/dpo_accuracy", "held-out accuracy", ".1%", "higher"),
            Headline("eval/dpo_margin", "margin", "+.3f", "higher"),
            Headline("dpo/accuracy", "accuracy in training", ".1%", "higher"),
        ),
        curves=(
            _LOSS,
            Curve("Accuracy", (("dpo/accuracy", "training"), ("eval/dpo_accuracy", "held-out"))),
            Curve("Margin", (("dpo/margin", "training"), ("eval/dpo_margin", "held-out"))),
            Curve(
                "Drift of the chosen (nats a response)",
                (("dpo/chosen_drift", "training"), ("eval/dpo_chosen_drift", "held-out")),
            ),
            Curve(
                "Rewards by label, of the loss kto",
                (("dpo/desirable_reward", "desirable"), ("dpo/undesirable_reward", "undesirable")),
            ),
        ),
    ),
)


_PEOPLE = (
    # Its model is any language model and its tokens are that model's, so the DAG says who fills the roles.
    StageSpec(Stage.RESPOND, kind="responses", version=1, inputs=(), in_pipeline=False, frozen_models=1),
    StageSpec(
        Stage.RATE,
        kind="preferences",
        version=1,
        inputs=(("responses", Stage.RESPOND),),
        in_pipeline=False,
        asset="llm/preferences",
    ),
)


# Its models are of many trainings of one stage, so the DAG says who fills the roles.
_COMPARE = StageSpec(
    Stage.COMPARE,
    kind="comparison",
    version=1,
    inputs=(),
    in_pipeline=False,
    closing=True,
    page="comparison.html",
    headlines=(Headline("compare/models", "models", ".0f"), Headline("compare/failed", "failed", ".0f")),
)


def graph_of(data: Iterable[StageSpec], trained: Iterable[StageSpec]) -> dict[Stage, StageSpec]:
    """Return the whole graph: the stages that make data, those that train, and the closing ones, which read both."""
    data, trained = tuple(data), tuple(trained)
    evaluate = StageSpec(
        Stage.EVALUATE,
        kind="evaluation",
        version=2,
        inputs=_as_inputs(*data, *trained),
        given=((BASE_MODEL, "base"), (REWARD_MODEL, "reward"), (GOLD_MODEL, "gold"), (JUDGE, "")),
        role="evaluation",
        heavy=True,
        dataset=True,
        gated=True,
        frozen_models=2,  # one policy at a time or the reference, and one scorer
        closing=True,
        seeded=True,
        headlines=(
            *(
                Headline(f"{spec.role}/eval/win_rate", f"{spec.label} wins", ".0%", "higher")
                for spec in trained
                if spec.aligned
            ),
            Headline("sft/eval/perplexity", "perplexity", ".2f", "lower"),
        ),
    )
    promote = StageSpec(
        Stage.PROMOTE,
        kind="promotion",
        version=2,
        inputs=_as_inputs(evaluate, *trained),
        role="promotion",
        closing=True,
        headlines=(
            Headline("promotion/registered", "models registered", ".0f"),
            Headline("promotion/promoted", "promoted", ".0f"),
        ),
    )
    report = StageSpec(
        Stage.REPORT,
        kind="report",
        version=1,
        inputs=_as_inputs(promote, evaluate, *data, *trained),
        closing=True,
        page="report.html",
        headlines=(Headline("report/bytes", "bytes", ",.0f"),),
    )
    return {spec.stage: spec for spec in (*data, *trained, evaluate, promote, report, *_PEOPLE, _COMPARE)}


def _as_inputs(*specs: StageSpec) -> tuple[tuple[str, Stage], ...]:
    return tuple((spec.role, spec.stage) for spec in specs if spec.role)


GRAPH: dict[Stage, StageSpec] = graph_of(_DATA, _TRAINED)
"""Every stage with its facts, in an order in which each one stands after its inputs."""


def pipeline_stages() -> tuple[Stage, ...]:
    """Return the stages of `llm_pipeline`, in order."""
    return tuple(stage for stage, spec in GRAPH.items() if spec.in_pipeline)


def makers_of(field: str) -> dict[str, Stage]:
    """Return the stages that make data of a kind, by the name under which curation reads it."""
    return {stage.value: stage for stage, spec in GRAPH.items() if field in spec.makes}


def gated_stages() -> tuple[Stage, ...]:
    """Return the stages that a gate stands after, in order."""
    return tuple(stage for stage, spec in GRAPH.items() if spec.gated or spec.trains)


def trained_stages() -> tuple[StageSpec, ...]:
    """Return the stages that train a model, in order."""
    return tuple(spec for spec in GRAPH.values() if spec.trains)


def language_models() -> tuple[StageSpec, ...]:
    """Return the stages whose artifact is a model that writes text, in order."""
    return tuple(spec for spec in GRAPH.values() if spec.is_language_model)


def aligned_models() -> tuple[StageSpec, ...]:
    """Return the stages whose model may become champion, in order."""
    return tuple(spec for spec in GRAPH.values() if spec.aligned)


def stage_providing(role: str) -> Stage | None:
    """Return the stage whose artifact stands for a given model; None where every stage reads the model itself."""
    return next((stage for stage, spec in GRAPH.items() if spec.provides == role), None)


def kinds_of_start() -> tuple[str, ...]:
    """Return the kinds of artifact that a run may start from: models that write text, given ones among them."""
    given = (spec for spec in GRAPH.values() if spec.provides == BASE_MODEL)
    return tuple(spec.kind for spec in (*language_models(), *given))


def spec_of_kind(kind: str) -> StageSpec | None:
    """Return the stage that publishes artifacts of this kind, None for what no stage of this version publishes."""
    return next((spec for spec in GRAPH.values() if spec.kind == kind), None)


def spec_of_role(role: str) -> StageSpec:
    """Return the stage whose artifact has this role in the closing stages; KeyError when there is none."""
    return {spec.role: spec for spec in GRAPH.values() if spec.role}[role]


def registered_name(run_name: str, spec: StageSpec) -> str:
    """Name under which a stage's model is registered in MLflow."""
    return f"{run_name}-{spec.registered_as}"
