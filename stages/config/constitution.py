"""What `constitution` asks, of which prompts, and what it accepts; every field changes the result."""

from pydantic import Field, model_validator

from stages.config.base import Choice, Config
from stages.config.endpoints import EndpointConfig
from stages.config.graph import INSTRUCTIONS, PREFERENCES
from stages.config.principles import SHIPPED, Area
from stages.config.sources import Source, check_areas, parse_sources


class Feedback(Choice):
    """What a run makes by a constitution."""

    OFF = "off", "Nothing"
    REVISIONS = "revisions", "Revised conversations, for SFT"
    PAIRS = "pairs", "Preference pairs, for reward model and DPO"
    BOTH = "both", "Revised conversations and preference pairs"

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of the form whose kind of data it makes."""
        made = {
            Feedback.REVISIONS: (INSTRUCTIONS,),
            Feedback.PAIRS: (PREFERENCES,),
            Feedback.BOTH: (INSTRUCTIONS, PREFERENCES),
        }
        return made.get(self, ())


class ConstitutionConfig(Config):
    """Settings of the `constitution` stage: critique, revision and comparison by principles (arXiv:2212.08073)."""

    makes: Feedback = Feedback.OFF
    """What it makes; filled from the field `ai_feedback` of the form."""
    prompts: tuple[str, ...] = ()
    """Where the prompts come from: files, folders, s3:// or hf:// of conversations, pairs or bare prompts, of which the
    responses are not used. `#area=harmless` (or `helpful+honest`) after a source says by which principles its prompts
    are treated; without, by all."""
    principles: str = SHIPPED
    """The file of principles: `default`, or the address of a YAML file."""
    critic: EndpointConfig = EndpointConfig()
    """An OpenAI-compatible endpoint that criticises, revises and compares, instead of a model in this process. Its
    address is the field `critic` of the form."""
    num_prompts: int = Field(default=1000, ge=1)
    """Prompts that are used at most, drawn by the seed and shared equally among the sources."""
    rounds: int = Field(default=1, ge=1, le=8)
    """How often a response is criticised and revised, each time by another principle."""
    comparisons: bool = True
    """With pairs: also compare two sampled responses to each prompt by a principle, asked in both orders. Where the
    orders disagree, there is no pair."""
    temperature: float = Field(default=1.0, ge=0, le=2)
    """Sampling temperature of the responses; 0 takes the likeliest token."""
    critic_temperature: float = Field(default=0.0, ge=0, le=2)
    """The same for critiques and revisions. Comparisons are always greedy."""
    max_response_length: int = Field(default=256, ge=8)
    """Tokens of a response or a revision at most. One that is cut off there is not used."""
    max_critique_length: int = Field(default=128, ge=8)
    """Tokens of a critique at most. One that is cut off there is used as far as its last whole sentence."""
    min_words: int = Field(default=5, ge=1)
    """Words that a revision, and a response that is compared, must have."""
    max_similarity: float = Field(default=0.95, gt=0, le=1)
    """From this share of common words in the same order on, a revision counts as the response that it should
    improve."""
    max_copied: float = Field(default=0.8, gt=0, le=1)
    """Largest share of its words that a revision may have in the same order as its prompt, its critique or the
    request; the same for a critique and the response that it is about."""
    seed: int = Field(default=0, ge=0)
    """Which prompts, principles and random tokens are drawn."""

    @property
    def prompt_sources(self) -> tuple[Source, ...]:
        """The sources of prompts, parsed."""
        return parse_sources("constitution.prompts", self.prompts, None)

    @property
    def makes_revisions(self) -> bool:
        return INSTRUCTIONS in self.makes.fields

    @property
    def makes_pairs(self) -> bool:
        return PREFERENCES in self.makes.fields

    def areas_of(self, source: Source) -> frozenset[Area]:
        """The areas whose principles apply to a source's prompts."""
        return frozenset(Area(name) for name in source.area.split("+")) if source.area else frozenset(Area)

    @model_validator(mode="after")
    def _sources_are_clear(self) -> "ConstitutionConfig":
        for source in self.prompt_sources:
            check_areas("constitution.prompts", source, [area.value for area in Area])
        return self
