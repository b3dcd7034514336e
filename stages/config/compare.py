"""The comparison of alignment methods: its form, and what the stage `compare` is told.

A method is the training stage of that name with the recipe's settings, or a stage with a few settings changed, which
the form's `variants` names. So a loss or an estimator that the configuration knows needs no code to be compared.
"""

import math
import re
from typing import Any

from pydantic import Field, field_validator, model_validator

from stages.config.base import Config
from stages.config.graph import Stage, aligned_models
from stages.config.names import Lines, ModelAddress, RunName
from stages.config.nested import dotted

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,39}")
FEWEST_SEEDS = 3
"""Below so many seeds a spread over them says little; the page says so."""


class CompareParams(Config):
    """What one run of `compare_alignment` is asked to do."""

    run_name: RunName = Field(default="comparison", title="Run name")
    """Name of the comparison in MLflow. Nothing is registered and no champion changes."""
    recipe: str = Field(default="demo", title="Recipe")
    """Complete configuration to start from, as in `llm_pipeline`. What all methods share is built once, or found."""
    methods: Lines = Field(default_factory=lambda: ["dpo", "ppo"], title="Methods", examples=["dpo", "ppo", "ipo"])
    """What is compared, one per line: a stage that aligns (`dpo`, `ppo`), or a name in `variants`."""
    variants: dict[str, Any] = Field(default_factory=dict, title="Variants")
    """Methods that are a stage with changed settings, as JSON: `{"ipo": {"dpo.loss.kind": "ipo"}}`. The settings say
    which stage it is."""
    betas: list[float] = Field(default_factory=lambda: [0.1], title="Betas")
    """How strongly each model is kept to its start: `dpo.loss.beta` of a preference loss, `ppo.kl_coefficient` of
    reinforcement learning. Every method is trained with each."""
    seeds: list[int] = Field(default_factory=lambda: [0], title="Seeds")
    """Every method is trained with each, at each beta; three or more say how stable a method is. What is shared has the
    seed below."""
    max_combinations: int = Field(default=16, title="Most combinations", ge=1, le=1000)
    """More than so many trainings are refused, because lists multiply quickly."""
    seed: int = Field(default=0, title="Seed of what is shared", ge=0, le=2**31 - 1)
    """Data, base model, SFT model, reward model and gold scorer follow from it."""
    gold_model: ModelAddress = Field(default="", title="Gold model", examples=["models:/athanor-gold@candidate"])
    """Scorer that no method is trained with and that decides the comparison. Empty: one is trained on half of the
    preference pairs, which the methods then do without."""
    judge: ModelAddress = Field(
        default="", title="Judge", examples=["models:/big-aligned@champion", "https://judge.example/v1"]
    )
    """Model or endpoint that compares the answers of each model with those of their start. Empty: none."""
    overrides: dict[str, Any] = Field(default_factory=dict, title="Overrides")
    """Changes to the recipe by dotted path, as JSON, for what is shared and for all methods:
    `{"ppo.num_rollouts": 8}`."""

    @field_validator("methods", "betas", "seeds")
    @classmethod
    def _each_once(cls, values: list[Any]) -> list[Any]:
        if not values:
            raise ValueError("it is empty; give at least one")
        if twice := sorted({str(value) for value in values if values.count(value) > 1}):
            raise ValueError(f"{', '.join(twice)} stands there twice; give each once")
        return values

    @field_validator("methods")
    @classmethod
    def _readable(cls, methods: list[str]) -> list[str]:
        for method in methods:
            if not _NAME.fullmatch(method):
                raise ValueError(
                    f"{method[:60]!r} is no name: up to 40 letters, digits, spaces, '.', '_' and '-', a letter or "
                    "digit first"
                )
        return methods

    @field_validator("betas")
    @classmethod
    def _positive(cls, betas: list[float]) -> list[float]:
        for beta in betas:
            if beta <= 0:
                raise ValueError(f"{beta} is no strength; give numbers above 0, such as 0.1")
        return betas

    @field_validator("seeds")
    @classmethod
    def _in_range(cls, seeds: list[int]) -> list[int]:
        for seed in seeds:
            if not 0 <= seed < 2**31:
                raise ValueError(f"{seed} is no seed; give numbers from 0 to {2**31 - 1}")
        return seeds

    @model_validator(mode="after")
    def _methods_exist(self) -> "CompareParams":
        stages = {spec.stage.value for spec in aligned_models()}
        for name, settings in self.variants.items():
            if name in stages:
                raise ValueError(f"variants: {name!r} is a stage, whose name no variant may have; choose another name")
            if name not in self.methods:
                raise ValueError(f"variants: {name!r} is not among methods={self.methods}; add it there, or leave it")
            _stage_of_variant(name, settings)
        for method in self.methods:
            if method not in {*stages, *self.variants}:
                raise ValueError(
                    f"methods: {method!r} does not exist; allowed: {', '.join(sorted({*stages, *self.variants}))}, or "
                    "a name in variants"
                )
        return self

    @model_validator(mode="after")
    def _not_too_many(self) -> "CompareParams":
        lists = {"methods": self.methods, "betas": self.betas, "seeds": self.seeds}
        count = math.prod(map(len, lists.values()))
        if count > self.max_combinations:
            product = " x ".join(f"{len(values)} {name}" for name, values in lists.items())
            raise ValueError(
                f"{product} make {count} trainings, more than max_combinations={self.max_combinations}; shorten a "
                "list, or raise max_combinations"
            )
        return self

    def stage_of(self, method: str) -> Stage:
        """The stage that trains a method."""
        return Stage(method) if method not in self.variants else _stage_of_variant(method, self.variants[method])

    def settings_of(self, method: str) -> dict[str, Any]:
        """The settings by dotted path that make it another method than its stage with the recipe's."""
        return dotted(self.variants.get(method, {}))


def _stage_of_variant(name: str, settings: Any) -> Stage:
    """The one aligning stage whose settings a variant changes; raises ValueError when there is none, or two."""
    stages = {spec.stage.value: spec.stage for spec in aligned_models()}
    example = '{"ipo": {"dpo.loss.kind": "ipo"}}'
    if not isinstance(settings, dict) or not settings:
        raise ValueError(f"variants: {name!r} must be settings by dotted path, got {settings!r}; as in {example}")
    roots = {path.partition(".")[0] for path in dotted(settings)}
    if len(roots) != 1 or not (found := roots & stages.keys()):
        raise ValueError(
            f"variants: {name!r} changes settings of {', '.join(sorted(roots))}; it may change those of one stage of "
            f"{', '.join(stages)}, as in {example}; what all methods share stands in overrides"
        )
    return stages[found.pop()]


class Combination(Config):
    """One model of a comparison: a method with one beta and one seed."""

    method: str
    stage: Stage
    beta: float
    seed: int
    settings: int = Field(default=0, ge=0)
    """Settings that its stage has and that decide its result."""
    changed: tuple[str, ...] = ()
    """Of them, those that are not as the recipe and the overrides have them, `path=value`; the seed aside."""

    @property
    def name(self) -> str:
        return f"{self.method}, beta {self.beta:g}, seed {self.seed}"

    @property
    def short_name(self) -> str:
        """Where there is little room: method, beta, seed."""
        return f"{self.method} {self.beta:g} #{self.seed}"


class CompareConfig(Config):
    """The page that compares alignment methods."""

    title: str = "comparison"
    """Heading of the page."""
    combinations: tuple[Combination, ...] = ()
    """What was trained, in the order of the inputs `model.<number>` and `evaluation.<number>`; filled by Athanor."""
    failures: dict[int, str] = Field(default_factory=dict)
    """Why a combination has no result, by its number; filled by Athanor."""
