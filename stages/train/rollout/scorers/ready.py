"""The scorers that the settings name, ready to be used."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from stages.artifacts.store import Store
from stages.config.rollouts import PPOConfig
from stages.config.scorers import JudgeScorer, MixtureScorer, RewardModelScorer, SingleScorer
from stages.data.tokens.views import TokensArtifact
from stages.rules.ready import ready_rule
from stages.train.rollout.scorers.judge import Judge
from stages.train.rollout.scorers.texts import Part, Parts, TextScorer

FIELD = "ppo.scorer"


@dataclass(frozen=True)
class Keeping:
    """Where answers of endpoints are kept, under which artifact, and what is told that the work goes on."""

    store: Store | None = None
    artifact: str = ""
    beat: Callable[[], None] = lambda: None


def ready_parts(config: PPOConfig, tokens: TokensArtifact, keeping: Keeping = Keeping()) -> Parts | None:
    """Return what makes up the scores; None where the reward model alone gives them. Raises ConfigError for a scorer
    that cannot be used here."""
    scorer = config.scorer
    if isinstance(scorer, RewardModelScorer):
        return None
    tokenizer = tokens.tokenizer()

    def text_of(response: np.ndarray) -> str:
        return tokenizer.decode(response.tolist(), skip_special_tokens=True)

    if not isinstance(scorer, MixtureScorer):
        return Parts((Part(scorer.kind, 1.0, _ready(scorer, FIELD, keeping)),), text_of)
    parts = [
        Part(part.title, part.weight, _ready(part.scorer, f"{FIELD}.parts[{number}].scorer", keeping))
        for number, part in enumerate(scorer.parts)
    ]
    return Parts(tuple(parts), text_of)


def _ready(scorer: SingleScorer, field: str, keeping: Keeping) -> TextScorer | None:
    match scorer:
        case RewardModelScorer():
            return None
        case JudgeScorer():
            return Judge(scorer, field=field, store=keeping.store, artifact=keeping.artifact, beat=keeping.beat)
        case _:
            return ready_rule(scorer, field=field)
