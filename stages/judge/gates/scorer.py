"""What the job of a gate measures of a reward model: its probes, its acceptance, and what choosing by it gains."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from stages.artifacts.manifests import fetch
from stages.config.errors import ConfigError, DamagedArtifactError
from stages.config.gate_records import NO_PAIRS, Check, Findings, GateRequest, Outcome, skipped
from stages.config.graph import GOLD_MODEL, REWARD_MODEL
from stages.config.request import Manifest
from stages.data.tokens.views import Split, TokensArtifact, evenly
from stages.judge.gates import heldout, reload
from stages.judge.gates.acceptance import JudgedPairs, acceptance
from stages.judge.gates.again import pair_lengths, pairs_of
from stages.judge.gates.best_of import METRICS, best_of
from stages.judge.gates.computing import Computing
from stages.judge.gates.earlier import compared_with_earlier, without_earlier
from stages.judge.gates.pairs import judged_pairs
from stages.judge.gates.probes import PROBED, probe
from stages.judge.gates.templates import blames_the_model
from stages.models.build import load_causal_lm, load_scorer
from stages.models.folder import told
from stages.models.generation import Sampling
from stages.models.same_tokenizer import check_given_scorer

MARGIN = "eval/reward_margin"


@dataclass(frozen=True)
class Scorer:
    """A reward model in both forms, ours on the device of the gate."""

    model: nn.Module
    plain: Any
    """As transformers loads it; None where that fails."""
    tokens: TokensArtifact
    computing: Computing


def examined_scorer(
    scorer: Scorer, manifest: Manifest, request: GateRequest, inputs: Mapping[str, Path], scratch: Path
) -> Findings:
    """Return the checks and numbers of a reward model, and of those that are missing the reason."""
    pairs, computing = scorer.tokens.pairs(Split.HELDOUT), scorer.computing
    known = pairs_of(manifest, scorer.tokens)
    if request.is_given and not _knows_these_pairs(manifest, request):
        checks = [skipped(heldout.CHECK, "whether these pairs were held out from its training is not known")]
    else:
        checks = [_margin_again(scorer, manifest)]
    asked = len(evenly(len(known), at_most=request.max_pairs))
    affordable = computing.affordable([scorer.model], pair_lengths(pairs)[known], asked=asked)
    chosen = known[evenly(len(known), at_most=affordable.items)]
    why = NO_PAIRS if len(known) == len(pairs) else _none_named(manifest, len(pairs))
    if affordable.why:
        why = f"pairs: {affordable.why}; give the stage a GPU"
        checks.append(skipped("all_pairs", f"{len(chosen)} of {asked} pairs are measured: {affordable.why}"))
    if len(chosen) and scorer.plain is not None:
        checks += probe(scorer.model, scorer.plain.to(computing.device), pairs, chosen[:PROBED], computing)
        scorer.plain.to("cpu")
    scored = heldout.pair_scores(scorer.model, pairs, chosen, computing)
    judged = judged_pairs(scorer.tokens, pairs, chosen, scored)
    found = acceptance(judged, why_none=why)
    against = _against_earlier(scorer, request, judged, chosen, scratch)
    gained = _best_of(scorer, request, inputs, scratch)
    return Findings(
        checks=(*checks, *found.checks, *gained.checks),
        metrics={**found.metrics, **against.metrics, **gained.metrics},
        unmeasured={**found.unmeasured, **against.unmeasured, **gained.unmeasured},
        tables={**found.tables, **gained.tables},
    )


def _against_earlier(
    scorer: Scorer, request: GateRequest, judged: JudgedPairs, chosen: np.ndarray, scratch: Path
) -> Findings:
    """The earlier reward model on the same pairs; whatever is wrong with that one is told, and no reason to stop."""
    if request.earlier is None:
        return without_earlier("what the run starts from was trained with no reward model that is an artifact")
    tokens, computing = scorer.tokens, scorer.computing
    try:
        folder = fetch(request.earlier, scratch)
        check_given_scorer(folder, tokens.tokenizer(), role=REWARD_MODEL)
        earlier: Any = load_scorer(folder, tokens).eval()
        earlier = earlier.to(computing.device)
    except ConfigError as error:
        return without_earlier(f"the earlier reward model does not read the run's tokens: {error.message}")
    except Exception as error:
        if not (blames_the_model(error) or isinstance(error, DamagedArtifactError | FileNotFoundError)):
            raise
        return without_earlier(f"the earlier reward model cannot be loaded: {told(error)}")
    scores_P2 = heldout.pair_scores(earlier, tokens.pairs(Split.HELDOUT), chosen, computing)
    return compared_with_earlier(judged, scores_P2)


def _none_named(manifest: Manifest, num_pairs: int) -> str:
    named = " or ".join(manifest.config["reasons"])
    return f"none of the {num_pairs} held-out pairs has the reason {named}, which the model learnt from"


def _knows_these_pairs(manifest: Manifest, request: GateRequest) -> bool:
    """Whether it was trained on the run's own tokens, so that these pairs were held out from it, too."""
    return any(entry.role == "tokens" and entry.digest == request.inputs["tokens"].digest for entry in manifest.inputs)


def _margin_again(scorer: Scorer, manifest: Manifest) -> Check:
    """The held-out margin as training measured it last."""
    pairs, computing = scorer.tokens.pairs(Split.HELDOUT), scorer.computing
    known = pairs_of(manifest, scorer.tokens)
    watched = known[evenly(len(known), at_most=int(manifest.config.get("eval_items", 0)))]
    affordable = computing.affordable([scorer.model], pair_lengths(pairs)[watched], asked=len(watched))
    if affordable.why:  # another number of pairs would have another margin
        return skipped(heldout.CHECK, f"held-out pairs are not measured again: {affordable.why}")
    if not len(watched):
        return heldout.compare_again(manifest, MARGIN, None, NO_PAIRS)
    with computing.as_trained(manifest):
        scores_P2 = heldout.pair_scores(scorer.model, pairs, watched, computing)
    return heldout.compare_again(
        manifest,
        MARGIN,
        float((scores_P2[:, 0] - scores_P2[:, 1]).mean()),
        alike=computing.computes_as(manifest),
        size=float(abs(scores_P2).mean()),
    )


def _best_of(scorer: Scorer, request: GateRequest, inputs: Mapping[str, Path], scratch: Path) -> Findings:
    """What the best of n by this reward model gains by the gold scorer; whatever is wrong with that one is told, and
    no reason to stop."""
    if request.gold is None:
        return _unmeasured("the run has no gold scorer that is an artifact")
    if "model" not in inputs:
        return _unmeasured("the model that it would choose answers of is no artifact")
    tokens, computing = scorer.tokens, scorer.computing
    try:
        folder = fetch(request.gold, scratch)
        check_given_scorer(folder, tokens.tokenizer(), role=GOLD_MODEL)
        mine, theirs = reload.published_tokenizer(tokens.tokenizer_dir), reload.plain_tokenizer(folder)
        asked = reload.same_text_same_ids(GOLD_MODEL, mine, theirs, of_mine="the run", of_theirs="the gold scorer")
        if asked.outcome is Outcome.FAILED:
            return _unmeasured(f"the gold scorer has a chat template of its own: {asked.found}; {asked.allowed}")
        gold = load_scorer(folder, tokens).eval()
        policy = load_causal_lm(inputs["model"], tokens).eval()
    except ConfigError as error:
        return _unmeasured(f"the gold scorer does not read the run's tokens: {error.message}")
    except Exception as error:
        if not (blames_the_model(error) or isinstance(error, DamagedArtifactError)):
            raise
        return _unmeasured(f"the gold scorer cannot be loaded: {told(error)}")
    sampling = Sampling(request.max_response_length, eos_id=tokens.eos_id, pad_id=tokens.pad_id)
    return best_of(policy, scorer.model, gold, tokens.prompts(Split.HELDOUT), sampling=sampling, computing=computing)


def _unmeasured(why: str) -> Findings:
    return Findings(unmeasured=dict.fromkeys(METRICS, why))
