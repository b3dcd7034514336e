"""The forms that a person fills in, one class per DAG; Airflow's trigger forms are generated from these classes.

The fields that the form of `llm_pipeline` shares with the run's configuration stand in `RunOutline`, for both."""

from typing import Annotated, Any, Literal

from pydantic import Field, GetPydanticSchema, field_validator, model_validator

from stages.config.base import Choice, Config
from stages.config.closing import LONGEST_WAIT_HOURS, Promotion
from stages.config.constitution import Feedback
from stages.config.endpoints import is_endpoint
from stages.config.gates import check_override
from stages.config.graph import (
    AI_FEEDBACK,
    BASE_MODEL,
    GIVEN_MODELS,
    GRAPH,
    INSTRUCTIONS,
    MAY_BE_ENDPOINTS,
    SYNTHESIS,
    Alignment,
    Stage,
    pipeline_stages,
)
from stages.config.names import Lines, ModelAddress, RunName
from stages.config.nested import dotted
from stages.config.places import is_gguf
from stages.config.selection import Way, contradiction, selected_stages, skipped_stages
from stages.config.synthesis import Synthesis

PipelineStage = Annotated[
    Stage,
    GetPydanticSchema(
        get_pydantic_json_schema=lambda schema, handler: {
            "type": "string",
            "enum": [stage.value for stage in pipeline_stages()],
        }
    ),
]
"""What the form offers; `resolve` refuses a stage that the run does not have."""

FirstStage = Annotated[
    Stage | Literal[""], GetPydanticSchema(get_pydantic_json_schema=lambda schema, handler: {"type": "string"})
]
"""A stage or nothing; the form proposes those that a run can enter at."""


class GoldScorer(Choice):
    """Whether a run trains a gold scorer."""

    RECIPE = "recipe", "As the recipe says"
    TRAIN = "train", "Train one on half of the pairs"
    NONE = "none", "None"


class RunOutline(Config):
    """Name, start and end of a run: the fields of the form that the configuration keeps as they are."""

    run_name: RunName = Field(default="athanor", title="Run name")
    """Prefix of the models (`<name>-base`, `-sft`, `-reward`, `-aligned`): letters, digits, `.`, `_`, `-`."""
    base_model: ModelAddress = Field(
        default="", title="Base model", examples=["models:/athanor-base@champion", "/models/llama"]
    )
    """Model to start from instead of pretraining: an artifact URI, `models:/name@alias`, a Hugging Face folder or hub
    id, or a GGUF file. Empty: pretrain from scratch."""
    first_stage: FirstStage = Field(default="", title="First stage")
    """With a base model: the first stage that trains, `sft`, `reward`, `ppo` or `dpo`, or `evaluate` to train nothing.
    The base model takes the place of the models that the stages before it would make. Empty: `sft`, or `pretrain` with
    Continue pretraining."""
    continue_pretraining: bool = Field(default=False, title="Continue pretraining")
    """With a base model: pretrain it further on the documents before SFT."""
    reward_model: ModelAddress = Field(
        default="", title="Reward model", examples=["models:/athanor-reward@candidate", "org/reward-model"]
    )
    """Reward model for PPO and evaluation, instead of training one: an artifact URI, `models:/name@alias`, or a Hugging
    Face folder or hub id of a sequence classifier with one output and the policy's tokenizer. Empty: train one where
    it is needed."""
    reward_base: ModelAddress = Field(default="", title="Reward base", examples=["org/small-model"])
    """Model that the reward model is trained from; it may be smaller than the policy and must have its tokenizer.
    Empty: what the policy starts from."""
    train_reward: bool = Field(default=False, title="Train a reward model")
    """Train a reward model although no stage of the run learns from it: with alignment `dpo` it judges the result."""
    gold_scorer: GoldScorer = Field(default=GoldScorer.RECIPE, title="Gold scorer")
    """A second reward model that judges the models of the run and that none of them is trained with. `train` trains one
    on half of the preference pairs, which reward model and DPO then do without. `recipe`: as the recipe says, where the
    run trains on pairs anyway and starts from no given model."""
    gold_model: ModelAddress = Field(
        default="", title="Gold model", examples=["models:/athanor-gold@candidate", "org/reward-model"]
    )
    """Gold scorer to judge with, instead of training one: an artifact URI, `models:/name@alias`, or a Hugging Face
    folder or hub id of a sequence classifier with one output. It may have a tokenizer of its own. The run's reward
    model and DPO learn from the half of the pairs that an artifact of Athanor's did not learn from."""
    judge: ModelAddress = Field(
        default="", title="Judge", examples=["models:/big-aligned@champion", "https://judge.example/v1"]
    )
    """Model that compares the responses of each model with those of the model that was aligned: an address like those
    of a base model, or an OpenAI-compatible endpoint, whose model `evaluate.judge.model` names. Empty: none."""
    previous_data: ModelAddress = Field(
        default="", title="Previous data", examples=["models:/athanor-aligned@champion"]
    )
    """Curate only what this data has not seen: the URI of a `curated` artifact, or `models:/name@alias` for the data
    that a model was made from. Its held-out text and its pairs are taken over. Empty: curate everything."""
    ai_feedback: Feedback = Field(default=Feedback.OFF, title="AI feedback")
    """Data by a constitution: the base model responds to prompts, and the critic criticises and revises the responses
    and compares them by principles. `revisions` are conversations for SFT, `pairs` are for reward model and DPO, `both`
    makes both, `off` nothing. It is curated next to the other data, as the source `constitution`."""
    critic: ModelAddress = Field(default="", title="Critic", examples=["org/instruct-model", "https://llm.example/v1"])
    """Model that criticises, revises and compares: an address like those of a base model. Empty: the base model does.
    Without a base model the critic responds, too."""
    synthesis: Synthesis = Field(default=Synthesis.OFF, title="Synthesis")
    """Instruction data that a model writes: new tasks like the seed tasks (`self_instruct`), responses to given prompts
    (`distillation`), or questions about given texts (`grounded`). It is curated next to the other instructions, as the
    source `synthesize`."""
    generator: ModelAddress = Field(
        default="", title="Generator", examples=["org/instruct-model", "https://llm.example/v1"]
    )
    """Model that writes: an address like those of a base model, or an OpenAI-compatible endpoint, whose model
    `synthesize.generator.model` names. Empty: the base model."""
    review_made_data: bool = Field(default=False, title="Review of made data")
    """With AI feedback or synthesis: a person reads examples of what was made, in Airflow under Required Actions, and
    approves or rejects it before it is curated. A rejection, or no answer within `review.timeout_hours`, fails the
    run."""
    alignment: Alignment = Field(default=Alignment.BOTH, title="Alignment")
    """Reinforcement learning (`ppo`), direct preference optimisation (`dpo`), `both`, or `none`."""
    last_stage: PipelineStage = Field(default=Stage.REPORT, title="Last stage")
    """Stop after this stage; later ones are skipped."""
    dry_run: bool = Field(default=False, title="Plan only")
    """Stop after the plan: what would run or is there already, how long it takes, what it costs. Nothing is spent."""

    @property
    def selected(self) -> frozenset[Stage]:
        """The stages that the run executes."""
        return self.selected_until(self.last_stage)

    def selected_until(self, last_stage: Stage) -> frozenset[Stage]:
        """The stages that the run would execute with another last stage."""
        return selected_stages(self.way_until(last_stage))

    @property
    def read_for(self) -> frozenset[Stage]:
        """The stages whose data the run reads. One that ends with its data makes what a run to the end would go on
        with."""
        last = GRAPH[self.last_stage]
        return self.selected if last.trains or last.closing else self.selected_until(Stage.REPORT)

    @property
    def skipped(self) -> dict[Stage, str]:
        """The stages that the run does without, each with the reason."""
        return skipped_stages(self.way_until(self.last_stage))

    @property
    def given_models(self) -> dict[str, str]:
        """Addresses of the models that the run is given, by role."""
        return {role: address for role in GIVEN_MODELS if (address := getattr(self, role)) and not is_endpoint(address)}

    @property
    def converts(self) -> bool:
        """Whether the base model is a GGUF file, which a stage of its own turns into a Hugging Face model."""
        return is_gguf(self.base_model)

    def makes(self, stage: Stage) -> tuple[str, ...]:
        """The fields of data of which a stage is asked to make something."""
        match stage:
            case Stage.CONSTITUTION:
                return self.ai_feedback.fields
            case Stage.SYNTHESIZE:
                return () if self.synthesis is Synthesis.OFF else (INSTRUCTIONS,)
        return ()

    @property
    def reviewed(self) -> tuple[Stage, ...]:
        """The stages of the run whose data a person reads before it is used."""
        if not self.review_made_data:
            return ()
        return tuple(stage for stage, spec in GRAPH.items() if spec.makes and stage in self.selected)

    @property
    def scored_by_model(self) -> bool:
        """Whether reinforcement learning takes its scores, or a part of them, from a reward model."""
        return True

    def way_until(self, last_stage: Stage) -> Way:
        """Where the run enters and ends, if it ended with `last_stage`."""
        return Way(
            alignment=self.alignment,
            last_stage=last_stage,
            first_stage=self.first_stage or None,
            given=frozenset(role for role in GIVEN_MODELS if getattr(self, role)),
            continue_pretraining=self.continue_pretraining,
            train_reward=self.train_reward,
            train_gold=self.gold_scorer is GoldScorer.TRAIN,
            converts=self.converts,
            asks_for=frozenset(
                field
                for field, is_asked in (
                    (AI_FEEDBACK, self.ai_feedback is not Feedback.OFF),
                    (SYNTHESIS, self.synthesis is not Synthesis.OFF),
                )
                if is_asked
            ),
            scored_by_model=self.scored_by_model,
        )


class PipelineParams(RunOutline):
    """What one run of `llm_pipeline` is asked to do."""

    recipe: str = Field(default="demo", title="Recipe")
    """Complete configuration to start from. `demo`: a small model on two CPU cores. `smollm`: a published model of 135
    million parameters on two CPU cores. `tiny`: seconds per stage, for tests. `llama_1b`: a billion parameters on
    GPUs."""
    documents: Lines = Field(default_factory=list, title="Documents", examples=["installed-docs", "s3://bucket/prefix"])
    """Raw text, one source per line: `installed-docs`, a folder, an `s3://` prefix (text, JSONL, Parquet) or
    `hf://dataset?split=train`. Empty: those of the recipe."""
    instructions: Lines = Field(
        default_factory=list,
        title="Instructions",
        examples=["derived", "s3://bucket/sft.jsonl", "s3://bucket/math.jsonl#weight=0.3"],
    )
    """Conversations, one source per line; `derived` makes pairs from the documents. After a source, `#weight=0.3` gives
    it 30 % of the training, and `#format=sharegpt` names the format if the fields do not show it. Empty: those of the
    recipe."""
    preferences: Lines = Field(
        default_factory=list,
        title="Preferences",
        examples=["derived", "s3://bucket/pairs.jsonl", "s3://bucket/harmless-base.jsonl#area=harmless"],
    )
    """Preference pairs, one source per line, with `#weight=` and `#format=` as above; `derived` makes pairs from the
    documents. `#area=harmless` says what the responses of a source were preferred for. Empty: those of the recipe."""
    constitution_prompts: Lines = Field(
        default_factory=list,
        title="Prompts of the constitution",
        examples=["s3://bucket/red-team.jsonl#area=harmless", "s3://bucket/questions.jsonl#area=helpful+honest"],
    )
    """With AI feedback: prompts to respond to, one source per line. `#area=harmless` after a source draws only
    principles of that area for its prompts."""
    principles: str = Field(default="", title="Principles", examples=["s3://bucket/principles.yaml"])
    """With AI feedback: a YAML file of principles. Empty: those that come with Athanor."""
    synthesis_sources: Lines = Field(
        default_factory=list,
        title="Sources of the synthesis",
        examples=["s3://bucket/seed-tasks.jsonl", "s3://bucket/prompts.jsonl", "/data/manuals"],
    )
    """With synthesis: seed tasks (`self_instruct`), prompts (`distillation`) or texts (`grounded`), one source per
    line."""
    prompts: Lines = Field(default_factory=list, title="Prompt sets", examples=["s3://bucket/gsm8k.jsonl"])
    """Prompts for reinforcement learning with something to judge responses by, one source per line: questions of GSM8K,
    or rows of `prompt` with `reference`, `tests` or `schema`. PPO then answers these instead of the prompts of the
    instructions (`ppo.prompts_from`). Empty: those of the recipe."""
    benchmarks: Lines = Field(
        default_factory=list,
        title="Benchmarks",
        examples=["refusals", "s3://bucket/gsm8k.jsonl#rule=number", "/tasks/arc.yaml"],
    )
    """What models are measured by besides held-out data, one per line: a file, a folder, `s3://` or `hf://` of items
    (`#name=`, `#format=`, `#rule=number` and more after it), a task file of lm-evaluation-harness or `lm-eval://task`,
    or `heldout-continuation`, `heldout-question`, `refusals`, `toxicity`. Empty: those of the recipe."""
    seed: int = Field(default=0, title="Seed", ge=0, le=2**31 - 1)
    """Every random choice of the run follows from it."""
    promotion: Promotion = Field(default=Promotion.AUTO, title="Promotion")
    """`auto` moves the alias `champion` when the aligned model wins, `approval`: a person decides in Airflow, `never`
    registers candidates only."""
    override_gates: Lines = Field(default_factory=list, title="Pass failed gates", examples=["reward", "all"])
    """Gates that may be passed although they fail, one stage per line, or `all`. What failed, who triggered the run and
    the reason are kept with it."""
    override_reason: str = Field(default="", title="Reason for passing them", max_length=1000)
    """Why these gates may be passed; needed when there are any, and with `gates.recompute=false`."""
    overrides: dict[str, Any] = Field(default_factory=dict, title="Overrides")
    """Changes to the recipe by dotted path, as JSON: `{"sft.optimizer.learning_rate": 0.0002}`. Unknown paths are
    refused."""

    @property
    def scored_by_model(self) -> bool:
        """As the overrides say; no recipe has another scorer than the reward model."""
        overrides = dotted(self.overrides)
        match overrides.get("ppo.scorer.kind", "reward_model"):
            case "reward_model":
                return True
            case "mixture":  # what is wrong about its parts is told when the configuration is validated
                given = overrides.get("ppo.scorer.parts")
                parts = [part for part in given if isinstance(part, dict)] if isinstance(given, list | tuple) else []
                scorers = [one for part in parts if isinstance(one := part.get("scorer"), dict)]
                return any(one.get("kind") == "reward_model" for one in scorers)
            case _:
                return False

    @model_validator(mode="after")
    def _all_goes_together(self) -> "PipelineParams":
        if self.override_gates:  # a reason alone may be for gates.recompute=false: GatesConfig knows
            check_override(self.override_gates, self.override_reason)
        for role in GIVEN_MODELS:
            if role not in MAY_BE_ENDPOINTS and is_endpoint(getattr(self, role)):
                allowed = " and ".join(MAY_BE_ENDPOINTS)
                raise ValueError(f"{role}={getattr(self, role)!r} is an endpoint, which only {allowed} may be")
        for role, address in self.given_models.items():
            if role != BASE_MODEL and is_gguf(address):
                raise ValueError(
                    f"{role}={address!r} is a GGUF file, which only base_model may be; give a Hugging Face folder or "
                    "an artifact"
                )
        if self.gold_model and _spelled_alike(self.gold_model, self.reward_model):
            raise ValueError(
                f"gold_model={self.gold_model!r} is reward_model too, and a scorer that a model learnt from cannot say "
                "whether it won; give another gold_model, or leave it empty"
            )
        if self.synthesis_sources and self.synthesis is Synthesis.OFF:
            raise ValueError(
                f"synthesis_sources={self.synthesis_sources!r} is given and {SYNTHESIS} is off; choose a method in "
                f"{SYNTHESIS}, or leave synthesis_sources empty"
            )
        for name in ("constitution_prompts", "principles"):
            if getattr(self, name) and self.ai_feedback is Feedback.OFF:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is given and {AI_FEEDBACK} is off; choose what {AI_FEEDBACK} "
                    f"makes, or leave {name} empty"
                )
        if self.review_made_data and self.ai_feedback is Feedback.OFF and self.synthesis is Synthesis.OFF:
            raise ValueError(
                f"review_made_data=True, and {AI_FEEDBACK} and {SYNTHESIS} are off: the run makes no data that a "
                "person could read; choose one of them, or leave review_made_data off"
            )
        if wrong := contradiction(self.way_until(self.last_stage)):
            raise ValueError(wrong)
        return self


def _spelled_alike(one: str, other: str) -> bool:
    return one.rstrip("/") == other.rstrip("/")


class CollectParams(Config):
    """What one run of `collect_preferences` is asked to do."""

    run_name: RunName = Field(default="athanor", title="Run name")
    """Whose candidate is rated when no model is named: `<run name>-aligned`, alias `candidate`."""
    model: ModelAddress = Field(default="", title="Model", examples=["models:/athanor-aligned@candidate"])
    """Model whose responses are rated: `models:/name@alias`, `models:/name/version` or the URI of an artifact. Empty:
    the candidate of the run name."""
    prompts: Lines = Field(default_factory=list, title="Prompts", examples=["What does sorted do?"])
    """One prompt per line. Empty: held-out prompts of the data that the model was trained with."""
    num_prompts: int = Field(default=20, title="Number of prompts", ge=1, le=1000)
    """Prompts to show to raters; with two responses each, also the largest possible number of pairs."""
    num_responses: int = Field(default=2, title="Responses per prompt", ge=2, le=4)
    """Two are compared; three or four are ranked from best to worst, and every ordered pair of a ranking counts."""
    temperature: float = Field(default=1.0, title="Temperature", gt=0)
    """Sampling temperature; low values give responses that hardly differ."""
    max_response_length: int = Field(default=48, title="Longest response", ge=1)
    """Maximum tokens per response."""
    answer_hours: float = Field(default=168.0, title="Hours to answer", gt=0, le=LONGEST_WAIT_HOURS)
    """Questions without an answer by then count as unanswered; the other answers are published."""
    seed: int = Field(default=0, title="Seed", ge=0, le=2**31 - 1)
    """Sampling and the order in which responses are shown follow from it."""
    recipe: str = Field(default="demo", title="Recipe")
    """Recipe whose resources the responses are sampled with: `execution.respond`."""
    overrides: dict[str, Any] = Field(default_factory=dict, title="Overrides")
    """Changes to the recipe by dotted path, as JSON: `{"execution.respond.gpus_per_worker": 1}`."""


class RetrainParams(Config):
    """What one run of `retrain` is asked to do; everything else comes from the run that made the champion."""

    run_name: RunName = Field(default="athanor", title="Run name")
    """Whose champion is retrained: `<name>-aligned@champion`. The candidate gets the same name."""
    documents: str = Field(default="", title="Documents")
    """Prefix of raw text, `file://` or `s3://`. Empty: the value of `ATHANOR_RETRAIN_WATCH`."""
    preferences: Lines = Field(default_factory=list, title="Preferences")
    """New preference data, in addition to what the asset `llm/preferences` announced."""
    max_epochs: float = Field(default=4.0, title="Epochs", gt=0)
    """Maximum number of times that continued pretraining sees each new token."""
    overrides: dict[str, Any] = Field(default_factory=dict, title="Overrides")
    """Changes to the settings of the champion's run, by dotted path."""
    take_back: bool = Field(default=False, title="Take back")
    """Check again the preference data that was set aside because it could not be used, and use what can be used now."""
    forget: Lines = Field(default_factory=list, title="Forget")
    """Preference data, pending or set aside, that no retraining shall use."""
    force: bool = Field(default=False, title="Force")
    """Retrain even if the documents are those of the last retraining."""


class RollbackParams(Config):
    """Whose champion goes, and why."""

    run_name: RunName = Field(default="athanor", title="Run name")
    """Whose champion is taken back: `<name>-aligned@previous` becomes `<name>-aligned@champion` again."""
    reason: str = Field(default="", title="Reason", max_length=2000, validate_default=True)
    """Why, for those who find the model later; it is kept with the model."""

    @field_validator("reason")
    @classmethod
    def _says_something(cls, reason: str) -> str:
        if not reason.strip():
            raise ValueError("it is empty; say why the champion is taken back, it is kept with the model")
        return reason.strip()


class EvaluationParams(Config):
    """What one run of `evaluate_model` measures, on which data, with which reward model."""

    model: ModelAddress = Field(
        default="models:/athanor-aligned@champion", title="Model", min_length=1, examples=["models:/athanor-sft/3"]
    )
    """Model to evaluate: `models:/name@alias`, an artifact URI, or a Hugging Face directory."""
    data: ModelAddress = Field(default="", title="Data")
    """Held-out data: a `tokens` artifact, or a model or anything else that was made from one. Empty: that of the
    model's own run."""
    reward: ModelAddress = Field(default="", title="Reward model", examples=["models:/athanor-reward@candidate"])
    """Reward model that scores the answers. Empty: the one that the model was trained with, if any."""
    gold_model: ModelAddress = Field(default="", title="Gold scorer", examples=["models:/athanor-gold@candidate"])
    """Scorer that the model was not trained with. Empty: none."""
    judge: ModelAddress = Field(
        default="", title="Judge", examples=["models:/big-aligned@champion", "https://judge.example/v1"]
    )
    """Model or endpoint that compares the model's responses with those of the model that it was aligned from. Empty:
    none."""
    benchmarks: Lines = Field(default_factory=list, title="Benchmarks", examples=["refusals", "/tasks/arc.yaml"])
    """What the model is measured by besides held-out data, one per line, as in `llm_pipeline`. Empty: those of the
    recipe."""
    recipe: str = Field(default="demo", title="Recipe")
    """Recipe whose evaluation settings and resources apply."""
    overrides: dict[str, Any] = Field(default_factory=dict, title="Overrides")
    """Changes to the recipe by dotted path, as JSON: `{"evaluate.max_prompts": 512}`."""
