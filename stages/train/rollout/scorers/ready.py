"""The scorers that the settings name, ready to be used."""

import numpy as np

from stages.config.rollouts import PPOConfig
from stages.config.scorers import MixtureScorer, RewardModelScorer, SingleScorer
from stages.data.tokens.views import TokensArtifact
from stages.rules.ready import ready_rule
from stages.train.rollout.scorers.texts import Part, Parts, TextScorer

FIELD = "ppo.scorer"


def ready_parts(config: PPOConfig, tokens: TokensArtifact) -> Parts | None:
    """Return what makes up the scores; None where the reward model alone gives them. Raises ConfigError for a scorer
    that cannot be used here."""
    scorer = config.scorer
    if isinstance(scorer, RewardModelScorer):
        return None
    tokenizer = tokens.tokenizer()

    def text_of(response: np.ndarray) -> str:
        return tokenizer.decode(response.tolist(), skip_special_tokens=True)

    if not isinstance(scorer, MixtureScorer):
        return Parts((Part(scorer.kind, 1.0, _ready(scorer, FIELD)),), text_of)
    parts = [
        Part(part.title, part.weight, _ready(part.scorer, f"{FIELD}.parts[{number}].scorer"))
        for number, part in enumerate(scorer.parts)
    ]
    return Parts(tuple(parts), text_of)


def _ready(scorer: SingleScorer, field: str) -> TextScorer | None:
    return None if isinstance(scorer, RewardModelScorer) else ready_rule(scorer, field=field)
