"""Which principle is drawn for which prompt: by seed and prompt alone, so batches and resumes change nothing."""

from stages.config.principles import Constitution, Principle
from stages.data.constitution.prompts import Prompt
from stages.data.sources.records import stable_hash


def drawn_principles(constitution: Constitution, prompt: Prompt, *, seed: int, number: int) -> list[Principle]:
    """Draw `number` principles for a prompt's rounds, each equally likely; none twice before all have been drawn."""
    eligible = constitution.of(prompt.areas)
    drawn: list[Principle] = []
    while eligible and len(drawn) < number:
        turn = len(drawn) // len(eligible)
        order = sorted(eligible, key=lambda one: stable_hash(seed, "principle", prompt.id, turn, one.id))
        drawn += order[: number - len(drawn)]
    return drawn


def compared_by(constitution: Constitution, prompt: Prompt, *, seed: int) -> Principle | None:
    """Draw the principle by which two responses to a prompt are compared, apart from those of its rounds."""
    eligible = constitution.of(prompt.areas)
    return min(eligible, key=lambda one: stable_hash(seed, "comparison", prompt.id, one.id), default=None)
