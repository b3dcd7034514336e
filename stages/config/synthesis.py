"""What `synthesize` asks, and what it accepts; every field but those of speed changes the result."""

from collections.abc import Collection
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from stages.config.base import Choice, Config
from stages.config.endpoints import EndpointConfig
from stages.config.graph import BASE_MODEL, GENERATOR, REWARD_MODEL
from stages.config.scorers import RewardModelScorer, Rule
from stages.config.sources import InstructionFormat, Source, parse_sources


class Synthesis(Choice):
    """How a run makes instruction data of its own."""

    OFF = "off", "None"
    SELF_INSTRUCT = "self_instruct", "Self-instruct: new tasks like the seed tasks, with responses"
    DISTILLATION = "distillation", "Distillation: responses to given prompts"
    GROUNDED = "grounded", "Grounded: questions about given texts, with answers"


class FirstScorer(Config):
    """The first response that passes the filters is as good as any."""

    kind: Literal["first"] = "first"
    """Which scorer."""

    needs: ClassVar[tuple[str, ...]] = ()


SynthesisScorer = Annotated[FirstScorer | RewardModelScorer | Rule, Field(discriminator="kind")]


_ONLY_FOR: dict[tuple[Synthesis, ...], tuple[str, ...]] = {
    (Synthesis.SELF_INSTRUCT,): (
        "prompts_per_round",
        "max_rounds",
        "tasks_per_prompt",
        "shown_seeds",
        "shown_made",
        "ask_for_inputs",
        "temperature",
        "max_task_length",
    ),
    (Synthesis.GROUNDED,): ("questions_per_text", "max_text_words", "min_support", "with_text", "text_field"),
    (Synthesis.SELF_INSTRUCT, Synthesis.GROUNDED): (
        "max_similarity",
        "min_instruction_words",
        "max_instruction_words",
        "excluded_words",
    ),
    (Synthesis.SELF_INSTRUCT, Synthesis.DISTILLATION): ("num_responses", "scorer", "min_score"),
}
"""Fields that only some methods read."""


class SynthesizeConfig(Config):
    """Settings of the `synthesize` stage: instruction data that a model writes."""

    method: Synthesis = Synthesis.OFF
    """How data is made; filled from the field `synthesis` of the form."""
    sources: tuple[str, ...] = ()
    """Files, folders, s3:// or hf:// of rows: seed tasks (self-instruct), prompts (distillation) or texts (grounded);
    filled from the field `synthesis_sources` of the form."""
    text_field: str = "text"
    """Name of the text column, for texts."""
    generator: EndpointConfig = EndpointConfig()
    """An OpenAI-compatible endpoint that writes, instead of a model in this process. Its address is the field
    `generator` of the form."""
    num_rows: int = Field(default=1000, ge=1)
    """Self-instruct: instructions to accept. Distillation: prompts to answer, drawn by the seed. Grounded: questions to
    ask."""
    prompts_per_round: int = Field(default=8, ge=1, le=1024)
    """Self-instruct: prompts for new tasks that are asked together, before what they give joins the pool."""
    max_rounds: int = Field(default=100, ge=1)
    """Self-instruct: rounds at most, if `num_rows` is not reached before."""
    tasks_per_prompt: int = Field(default=8, ge=1, le=32)
    """Self-instruct: new tasks that one prompt asks for."""
    shown_seeds: int = Field(default=6, ge=1, le=32)
    """Self-instruct: seed tasks that a prompt shows as examples."""
    shown_made: int = Field(default=2, ge=0, le=32)
    """Self-instruct: accepted new tasks that a prompt shows as well, as far as there are any."""
    ask_for_inputs: bool = True
    """Self-instruct: ask for an input to each new task that needs one."""
    max_similarity: float = Field(default=0.7, gt=0, le=1)
    """A new instruction must have a ROUGE-L below this with every seed task and every accepted one; grounded: with
    every accepted question about the same text."""
    min_instruction_words: int = Field(default=3, ge=1)
    """Words that a new instruction or question must have."""
    max_instruction_words: int = Field(default=150, ge=1)
    """Words that it may have."""
    excluded_words: tuple[str, ...] = (
        "image",
        "images",
        "picture",
        "pictures",
        "graph",
        "graphs",
        "photo",
        "photos",
        "video",
        "audio",
        "draw",
        "plot",
    )
    """Words whose instructions are dropped, because a language model cannot do what they ask for."""
    questions_per_text: int = Field(default=2, ge=1, le=32)
    """Grounded: questions that are asked about each text."""
    max_text_words: int = Field(default=200, ge=20)
    """Grounded: words of the passage that is shown, from a paragraph of the text that the seed draws."""
    min_support: float = Field(default=0.5, ge=0, le=1)
    """Grounded: share (0..1) of the answer's words of four letters or more that the passage must have."""
    with_text: bool = True
    """Grounded: put the passage into the prompt of the row. Off, the row asks for the answer from memory."""
    num_responses: int = Field(default=1, ge=1, le=64)
    """Responses that are sampled to each prompt, of which the best is kept."""
    scorer: SynthesisScorer = FirstScorer()
    """Which response that passes the filters is best: the first, or the one with the highest value of a rule or of the
    run's given reward model."""
    min_score: float | None = None
    """Least value of the best response, where there is a score; a row below it is dropped."""
    temperature: float = Field(default=0.7, ge=0, le=2)
    """Sampling temperature of new tasks and inputs."""
    response_temperature: float = Field(default=0.7, ge=0, le=2)
    """Sampling temperature of responses and of grounded questions; 0 takes the likeliest token, which gives one
    response however many are asked for."""
    max_task_length: int = Field(default=512, ge=8)
    """Tokens of an answer to a prompt for new tasks, or of an input."""
    max_response_length: int = Field(default=512, ge=8)
    """Tokens of a response. One that is cut off there is dropped."""
    min_response_words: int = Field(default=1, ge=1)
    """Words that a response must have."""
    max_copied: float = Field(default=0.9, gt=0, le=1)
    """Largest ROUGE-L of a response and its prompt: a response that repeats it is dropped."""
    max_repetition: float = Field(default=0.3, ge=0, le=1)
    """Largest share (0..1) of a response's groups of three words that repeat an earlier one of it."""
    keep_refusals: bool = False
    """Keep responses that decline."""
    language: str = Field(default="en", pattern=r"^[a-z]{2,3}$")
    """Language of new instructions and of responses, as ISO 639 code; of texts with fewer than ten words it is not
    told."""
    min_language_score: float = Field(default=0.5, ge=0, le=1)
    """Least confidence (0..1) of the language classifier; 0 = any language."""
    seed: int = Field(default=0, ge=0)
    """Which seed tasks, prompts, texts and random tokens are drawn."""

    @property
    def parsed_sources(self) -> tuple[Source, ...]:
        """The sources, parsed."""
        return parse_sources("synthesis_sources", self.sources, InstructionFormat)

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> "SynthesizeConfig":
        for method, names in _ONLY_FOR.items():
            if self.method in (Synthesis.OFF, *method):
                continue
            if idle := [name for name in names if getattr(self, name) != type(self).model_fields[name].default]:
                raise ValueError(
                    f"{idle[0]}={getattr(self, idle[0])!r} has no effect with method={self.method.value!r}, only with "
                    f"{' and '.join(one.value for one in method)}; leave it out"
                )
        return self

    def reads(self, role: str, given: Collection[str]) -> bool:
        """Whether the stage reads the given model in a role; `given` are the roles of those that the run has."""
        if role == REWARD_MODEL:
            return self.scorer.kind == "reward_model"
        if role == BASE_MODEL:
            return not self.generator.endpoint and GENERATOR not in given
        return True

    @model_validator(mode="after")
    def _consistent(self) -> "SynthesizeConfig":
        if self.scorer.needs:
            raise ValueError(
                f"scorer.kind={self.scorer.kind!r} compares with the {self.scorer.needs[0]} of a row, which rows of "
                "synthesis do not have; use one that needs the response alone"
            )
        if isinstance(self.scorer, FirstScorer) and self.min_score is not None:
            raise ValueError(f"min_score={self.min_score:g} has no effect with scorer.kind='first'; leave it empty")
        if self.num_responses > 1 and self.response_temperature == 0:
            raise ValueError(
                f"num_responses={self.num_responses} with response_temperature=0 asks for one response many times; "
                "raise response_temperature, or use num_responses=1"
            )
        if self.min_instruction_words > self.max_instruction_words:
            raise ValueError(
                f"min_instruction_words={self.min_instruction_words} is more than "
                f"max_instruction_words={self.max_instruction_words}"
            )
        for source in self.parsed_sources:
            if source.weight is not None:
                raise ValueError(f"synthesis_sources: {source.uri!r} has a weight, which they do not have; drop it")
        return self
