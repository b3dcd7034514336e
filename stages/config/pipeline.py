"""The complete, frozen configuration of one run, and the request that each stage gets out of it."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field, ValidationError, model_validator

from stages.config.base import Config
from stages.config.closing import EvaluateConfig, PromoteConfig, ReportConfig
from stages.config.collect import RateConfig, RespondConfig
from stages.config.compare import CompareConfig
from stages.config.constitution import ConstitutionConfig
from stages.config.convert import ConvertConfig
from stages.config.curate import CurateConfig
from stages.config.errors import ConfigError
from stages.config.execution import ExecutionConfig
from stages.config.forms import RunOutline
from stages.config.gates import GatesConfig
from stages.config.graph import BASE_MODEL, BENCHMARKS, GRAPH, REWARD_MODEL, Stage, stage_providing
from stages.config.names import ExperimentName
from stages.config.preferences import DPOConfig, GoldConfig, RewardConfig
from stages.config.principles import PRINCIPLES
from stages.config.records import first_error
from stages.config.request import PREVIOUS, ArtifactRef, Source, SourceKind
from stages.config.review import ReviewConfig
from stages.config.rollouts import PPOConfig
from stages.config.scorers import reads_reward_model
from stages.config.selection import learns_from_scores
from stages.config.synthesis import SynthesizeConfig
from stages.config.tokens import TokenizeConfig
from stages.config.train import PretrainConfig, SFTConfig

CONSTITUTION_PROMPTS, SYNTHESIS_SOURCES = "constitution_prompts", "synthesis_sources"
"""Roles of the sources of prompts that a constitution is applied to, and of what synthesis starts from; fields of the
form, too."""
ONE_VERSION = "Trigger the run again, with one version of Athanor in Airflow and on the cluster."
"""The advice where what Airflow wrote for a stage is not what the stage reads."""

CONFIG_CLASSES: dict[Stage, type[Config]] = {
    Stage.CONVERT: ConvertConfig,
    Stage.CONSTITUTION: ConstitutionConfig,
    Stage.SYNTHESIZE: SynthesizeConfig,
    Stage.CURATE: CurateConfig,
    Stage.TOKENIZE: TokenizeConfig,
    Stage.PRETRAIN: PretrainConfig,
    Stage.SFT: SFTConfig,
    Stage.REWARD: RewardConfig,
    Stage.GOLD: GoldConfig,
    Stage.PPO: PPOConfig,
    Stage.DPO: DPOConfig,
    Stage.EVALUATE: EvaluateConfig,
    Stage.PROMOTE: PromoteConfig,
    Stage.REPORT: ReportConfig,
    Stage.RESPOND: RespondConfig,
    Stage.RATE: RateConfig,
    Stage.COMPARE: CompareConfig,
}


class Executions(Config):
    """How each stage runs."""

    convert: ExecutionConfig = ExecutionConfig()
    constitution: ExecutionConfig = ExecutionConfig()
    synthesize: ExecutionConfig = ExecutionConfig()
    curate: ExecutionConfig = ExecutionConfig()
    tokenize: ExecutionConfig = ExecutionConfig()
    pretrain: ExecutionConfig = ExecutionConfig()
    sft: ExecutionConfig = ExecutionConfig()
    reward: ExecutionConfig = ExecutionConfig()
    gold: ExecutionConfig = ExecutionConfig()
    ppo: ExecutionConfig = ExecutionConfig()
    dpo: ExecutionConfig = ExecutionConfig()
    evaluate: ExecutionConfig = ExecutionConfig()
    promote: ExecutionConfig = ExecutionConfig()
    report: ExecutionConfig = ExecutionConfig()
    respond: ExecutionConfig = ExecutionConfig()
    """Outside the pipeline: `collect_preferences` samples responses with it."""
    compare: ExecutionConfig = ExecutionConfig()
    """Outside the pipeline: the page of `compare_alignment`, which loads no model."""

    @model_validator(mode="after")
    def _pipelines_predict_tokens(self) -> "Executions":
        """Rollouts and pairs need whole models on every rank."""
        for name in type(self).model_fields:
            stages = getattr(self, name).pipeline_parallel
            able = [stage.value for stage, spec in GRAPH.items() if spec.pipeline_parallel]
            if stages > 1 and name not in able:
                raise ValueError(
                    f"{name}.pipeline_parallel={stages}: only {' and '.join(able)} run through a pipeline; "
                    "use tensor_parallel, engine=fsdp or engine=deepspeed"
                )
        return self


class PipelineConfig(RunOutline):
    """Everything that decides a run."""

    recipe: str
    """Recipe that it started from."""
    min_new_bytes: int = Field(default=20_000, ge=0)
    """With previous data: least new training text (UTF-8 bytes) that is worth pretraining on; less waits for more."""
    given: dict[str, ArtifactRef] = Field(default_factory=dict)
    """The artifacts behind given models and `previous_data`, by role, fixed when the run starts; filled by Athanor."""
    only: Stage | None = None
    """Run this stage alone, on given artifacts (re-evaluation); filled by Athanor."""
    experiment: ExperimentName = "athanor"
    """MLflow experiment."""
    convert: ConvertConfig = ConvertConfig()
    constitution: ConstitutionConfig = ConstitutionConfig()
    synthesize: SynthesizeConfig = SynthesizeConfig()
    curate: CurateConfig
    tokenize: TokenizeConfig
    pretrain: PretrainConfig
    sft: SFTConfig
    reward: RewardConfig
    gold: GoldConfig = GoldConfig()
    ppo: PPOConfig
    dpo: DPOConfig
    evaluate: EvaluateConfig = EvaluateConfig()
    promote: PromoteConfig = PromoteConfig()
    report: ReportConfig = ReportConfig()
    gates: GatesConfig = GatesConfig()
    """What the run must show to go on after each stage; never part of a fingerprint."""
    review: ReviewConfig = ReviewConfig()
    """What a person is shown of made data; never part of a fingerprint."""
    execution: Executions = Executions()
    """Resources and layout by stage; never part of a fingerprint."""

    @property
    def scored_by_model(self) -> bool:
        return reads_reward_model(self.ppo.scorer)

    def stage_config(self, stage: Stage) -> Config:
        """Return the part that belongs to `stage`."""
        return getattr(self, stage.value)

    def stage_execution(self, stage: Stage) -> ExecutionConfig:
        return getattr(self.execution, stage.value)

    def stage_sources(self, stage: Stage) -> tuple[Source, ...]:
        """Return what a stage reads from outside the pipeline."""
        if stage is Stage.CURATE:
            roles = self.curate.outside_sources
            return tuple(Source(role=role, kind=SourceKind.DATA, uri=uri) for uri, role in roles.items())
        if stage is Stage.CONSTITUTION:
            asked = tuple(
                Source(role=CONSTITUTION_PROMPTS, kind=SourceKind.DATA, uri=source.uri)
                for source in self.constitution.prompt_sources
            )
            principles = Source(role=PRINCIPLES, kind=SourceKind.PRINCIPLES, uri=self.constitution.principles)
            return (*asked, principles, *self._outside_models(stage))
        if stage is Stage.SYNTHESIZE:
            rows = tuple(
                Source(role=SYNTHESIS_SOURCES, kind=SourceKind.DATA, uri=source.uri)
                for source in self.synthesize.parsed_sources
            )
            return (*rows, *self._outside_models(stage))
        models = self._outside_models(stage)
        if stage is not Stage.EVALUATE:
            return models
        uris = self.evaluate.outside_benchmarks
        return models + tuple(Source(role=BENCHMARKS, kind=SourceKind.BENCHMARK, uri=uri) for uri in uris)

    def _outside_models(self, stage: Stage) -> tuple[Source, ...]:
        outside = [role for role in self.given_roles(stage) if role not in self.given]
        return tuple(
            Source(role=role, kind=SourceKind.MODEL, uri=self.given_models[role])
            for role in outside
            if self._provider(role) in (None, stage)
        )

    def stage_given(self, stage: Stage) -> dict[str, ArtifactRef]:
        """Return the given artifacts that a stage reads besides those of this run, by role."""
        if self.only is stage:
            return dict(self.given)
        roles = (PREVIOUS,) if stage is Stage.CURATE else self.given_roles(stage)
        return {role: self.given[role] for role in roles if role in self.given}

    def stage_inputs(self, stage: Stage) -> dict[str, Stage]:
        """Return the inputs of a stage that this run makes, by role; a given model replaces the input that it stands
        for."""
        inputs = {role: source for role, source in GRAPH[stage].inputs if source in self.selected}
        if self._does_without_reward_model(stage):
            inputs = {role: source for role, source in inputs.items() if not GRAPH[source].learnt_from}
        places = dict(GRAPH[stage].given)
        for role in self.given_roles(stage):
            inputs.pop(places[role], None)
            if (provider := self._provider(role)) not in (None, stage):
                inputs[role] = provider
        return inputs

    def given_instead(self, stage: Stage) -> ArtifactRef | None:
        """Return the given reward model that the run's training learns from in the place of that of `stage`; its gate
        accepts it or not, as it would one of this run. None for a given model that is no artifact, which no gate reads.
        """
        spec = GRAPH[stage]
        learners = (
            other
            for other in self.selected
            if GRAPH[other].trains
            and stage in dict(GRAPH[other].inputs).values()
            and not self._does_without_reward_model(other)
        )
        if stage in self.selected or not spec.learnt_from or not any(learners):
            return None
        return self.given.get(spec.replaced_by)

    def given_roles(self, stage: Stage) -> tuple[str, ...]:
        """Return the roles of the given models that a stage reads.

        What the run makes from its base model comes before the base model; the other given models come before what the
        run makes.
        """
        if stage not in self.selected:
            return ()
        made = {role for role, source in GRAPH[stage].inputs if source in self.selected}
        roles: dict[str, str] = {}
        for role, place in GRAPH[stage].given:
            taken = place and (place in roles.values() or (role == BASE_MODEL and place in made))
            unread = (role == REWARD_MODEL and self._does_without_reward_model(stage)) or (
                stage is Stage.SYNTHESIZE and not self.synthesize.reads(role, self.given_models)
            )
            if role in self.given_models and not taken and not unread:
                roles[role] = place
        return tuple(roles)

    def _does_without_reward_model(self, stage: Stage) -> bool:
        return learns_from_scores(GRAPH[stage]) and not self.scored_by_model

    def _provider(self, role: str) -> Stage | None:
        """The stage of this run whose artifact stands for a given model."""
        provider = stage_providing(role)
        return provider if provider in self.selected else None

    @property
    def selected(self) -> frozenset[Stage]:
        """The stages that the run executes: one alone in a re-evaluation."""
        if self.only is not None:
            return frozenset({self.only})
        return self.selected_until(self.last_stage)

    def with_given(self, given: dict[str, ArtifactRef]) -> "PipelineConfig":
        """Return a copy with the artifacts behind its addresses.

        A base model that is an artifact is an input of tokenize, so its address leaves that stage's settings: the
        location of an artifact must not change the fingerprint of what is made from it. The same holds for a model that
        a stage of the run converts.
        """
        is_input = BASE_MODEL in given or self.converts
        tokenize = self.tokenize.model_copy(update={"base_model": ""}) if is_input else self.tokenize
        return self.model_copy(update={"given": given, "tokenize": tokenize})


def stage_config_from_json(stage: Stage, data: dict[str, Any]) -> Config:
    """Validate a stage's config again where its JSON arrives; ConfigError for what this version does not allow."""
    try:
        return CONFIG_CLASSES[stage].model_validate(data)
    except ValidationError as error:
        raise ConfigError(
            f"the stored configuration of {stage.value} is not valid: {first_error(error)}",
            advice=ONE_VERSION,
        ) from None


def stored_identity(stage: Stage, data: Mapping[str, Any]) -> dict[str, Any]:
    """Spell the config of a manifest or request as fingerprints do; as it stands, if it is from before this version."""
    try:
        return CONFIG_CLASSES[stage].model_validate(data).identity(only_given=True)
    except ValidationError:
        return dict(data)
