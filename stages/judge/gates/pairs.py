"""Held-out pairs of a run with what their acceptance groups them by: prompt, source, kind, reason, lengths of the
answers."""

import hashlib

import numpy as np

from stages.data.tokens.packing import TokenSequence
from stages.data.tokens.views import PairView, Split, TokensArtifact
from stages.judge.gates.acceptance import JudgedPairs


def judged_pairs(tokens: TokensArtifact, pairs: PairView, indices: np.ndarray, scores_P2: np.ndarray) -> JudgedPairs:
    """Put scores together with what is known of the pairs."""
    chosen = [pairs[int(index)] for index in indices]
    sources = tokens.pair_sources(Split.HELDOUT)
    names = np.asarray(sources.names, dtype=object)
    kinds = np.asarray(tokens.pair_kinds(Split.HELDOUT), dtype=object)
    return JudgedPairs(
        chosen_P=scores_P2[:, 0],
        rejected_P=scores_P2[:, 1],
        chosen_tokens_P=np.array([int(pair.chosen.loss_mask.sum()) for pair in chosen], dtype=np.int64),
        rejected_tokens_P=np.array([int(pair.rejected.loss_mask.sum()) for pair in chosen], dtype=np.int64),
        prompts_P=np.array([_prompt(pair.chosen) for pair in chosen], dtype=object),
        sources_P=names[sources.indices[indices]] if len(indices) else np.empty(0, dtype=object),
        kinds_P=kinds[indices] if len(indices) else np.empty(0, dtype=object),
        reasons_P=tokens.pair_reasons(Split.HELDOUT)[indices],
    )


def _prompt(sequence: TokenSequence) -> str:
    """What identifies a prompt: the tokens before the first that is judged."""
    targets = np.flatnonzero(sequence.loss_mask == 1)
    head = sequence.ids[: int(targets[0])] if len(targets) else sequence.ids
    return hashlib.sha256(head.astype(np.int64).tobytes()).hexdigest()[:16]
