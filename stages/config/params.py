"""The dozen fields a person fills in; the Airflow trigger form is generated from this class and typed nowhere else."""

import re
from typing import Annotated, Any

from pydantic import Field, GetPydanticSchema, field_validator, model_validator

from stages.config.base import Choice, Config
from stages.config.graph import Alignment, Stage, pipeline_stages
from stages.config.selection import selected_stages

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


class Promotion(Choice):
    """What happens after the evaluation."""

    AUTO = "auto", "Automatic, when it wins"
    APPROVAL = "approval", "By approval: a person decides"
    NEVER = "never", "Never, candidates only"


class PipelineParams(Config):
    """What one run of `llm_pipeline` is asked to do."""

    recipe: str = Field(default="demo", title="Recipe")
    """Complete configuration to start from. `demo`: a small model on two CPU cores. `tiny`: seconds per
    stage, for tests. `llama_1b`: a billion parameters on GPUs."""
    run_name: str = Field(default="athanor", title="Run name", min_length=1, max_length=64)
    """Prefix of the models (`<name>-base`, `-sft`, `-reward`, `-aligned`): letters, digits, `.`, `_`, `-`."""
    documents: list[str] = Field(
        default_factory=list, title="Documents", examples=["installed-docs", "s3://bucket/prefix"]
    )
    """Raw text, one source a line: `installed-docs`, a folder, an `s3://` prefix (text, JSONL, Parquet) or
    `hf://dataset?split=train`. Empty: the recipe's."""
    instructions: list[str] = Field(
        default_factory=list,
        title="Instructions",
        examples=["derived", "s3://bucket/sft.jsonl", "s3://bucket/math.jsonl#weight=0.3"],
    )
    """Conversations, one source a line; `derived` makes pairs from the documents. Behind a source, `#weight=0.3` gives
    it 30 % of the training and `#format=sharegpt` says what its fields do not. Empty: the recipe's."""
    preferences: list[str] = Field(
        default_factory=list, title="Preferences", examples=["derived", "s3://bucket/pairs.jsonl"]
    )
    """Preference pairs, one source a line, with `#weight=` and `#format=` as above; `derived` makes pairs from the
    documents. Empty: the recipe's."""
    base_model: str = Field(default="", title="Base model", examples=["models:/athanor-base@champion", "/models/llama"])
    """Model to start from instead of pretraining: an artifact URI, `models:/name@alias` or a Hugging Face directory.
    Empty: pretrain from scratch."""
    continue_pretraining: bool = Field(default=False, title="Continue pretraining")
    """With a base model: pretrain it further on the documents before SFT."""
    previous_data: str = Field(default="", title="Previous data", examples=["models:/athanor-aligned@champion"])
    """Curate only what this data has not seen: the URI of a `curated` artifact, or `models:/name@alias` for the data
    that a model was made from. Its held-out text and its pairs are taken over. Empty: curate everything."""
    alignment: Alignment = Field(default=Alignment.BOTH, title="Alignment")
    """Reinforcement learning (`ppo`), direct preference optimisation (`dpo`), `both`, or `none`."""
    last_stage: PipelineStage = Field(default=Stage.REPORT, title="Last stage")
    """Stop after this stage; later ones are skipped."""
    seed: int = Field(default=0, title="Seed", ge=0, le=2**31 - 1)
    """Every random choice of the run follows from it."""
    promotion: Promotion = Field(default=Promotion.AUTO, title="Promotion")
    """`auto` moves the alias `champion` when the aligned model wins, `approval`: a person decides in Airflow, `never`
    registers candidates only."""
    dry_run: bool = Field(default=False, title="Plan only")
    """Stop after the plan: what would run or is there already, how long it takes, what it costs. Nothing is spent."""
    overrides: dict[str, Any] = Field(default_factory=dict, title="Overrides")
    """Changes to the recipe by dotted path, as JSON: `{"sft.optimizer.learning_rate": 0.0002}`. Unknown paths are
    refused."""

    @property
    def selected(self) -> frozenset[Stage]:
        """The stages that the run executes."""
        return self.selected_until(self.last_stage)

    def selected_until(self, last_stage: Stage) -> frozenset[Stage]:
        """The stages that the run would execute with another end."""
        return selected_stages(
            alignment=self.alignment,
            last_stage=last_stage,
            has_base_model=bool(self.base_model),
            continue_pretraining=self.continue_pretraining,
        )

    @model_validator(mode="after")
    def _pretraining_goes_on_from_something(self) -> "PipelineParams":
        if self.continue_pretraining and not self.base_model:
            raise ValueError(
                "continue_pretraining=True needs base_model, which is empty; give the model to pretrain further, or "
                "leave continue_pretraining off to pretrain from scratch"
            )
        return self

    @field_validator("run_name")
    @classmethod
    def _run_name_is_safe(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value):
            raise ValueError(
                f"run_name={value!r} may hold letters, digits, '.', '_' and '-' only and starts with a letter or digit"
            )
        return value
