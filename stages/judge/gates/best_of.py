"""Does a reward model find better answers, when it is asked to choose: the best of n answers, judged by a gold scorer.

Gao et al. 2022 ("Scaling Laws for Reward Model Overoptimization"): as the choice gets harder the proxy's own score only
rises, while the gold score rises, flattens and falls. A reward model whose best of n is no better than any answer by
the gold scorer teaches PPO nothing.
"""

from typing import Any

import numpy as np
import torch
from torch import nn

from stages.config.gate_records import Findings
from stages.data.tokens.packing import RowBudget, lay_out, prompt_and_response
from stages.data.tokens.ragged import Ragged
from stages.data.tokens.views import evenly
from stages.judge.gates.acceptance import PREFIX, best_of_gain, best_of_n
from stages.judge.gates.computing import Computing
from stages.models.answers import Answerer, InProcess
from stages.models.forward import segment_scores
from stages.models.generation import Sampling

ANSWERS = 16
_SIZES = (1, 2, 4, 8, 16)
_MOST_PROMPTS = 32
METRICS = (f"{PREFIX}best_of_n_gold", f"{PREFIX}best_of_n_gold_low")


def best_of(
    policy: nn.Module,
    proxy: nn.Module,
    gold: nn.Module,
    prompts: Ragged,
    *,
    sampling: Sampling,
    computing: Computing,
) -> Findings:
    """Sample answers to held-out prompts, score them twice, and say what choosing by the proxy gains."""
    wanted = min(len(prompts), _MOST_PROMPTS)
    if wanted < 2:
        return Findings(unmeasured=dict.fromkeys(METRICS, "there are fewer than 2 held-out prompts"))
    # Each answer passes once through three models; generation keeps what it has computed.
    lengths = prompts.lengths + sampling.max_response_length
    affordable = computing.affordable([policy, proxy, gold], lengths, asked=wanted * ANSWERS)
    if affordable.items < 2 * ANSWERS:
        return Findings(unmeasured=dict.fromkeys(METRICS, f"answers: {affordable.why}; give the stage a GPU"))
    chosen = [prompts[int(index)] for index in evenly(len(prompts), at_most=affordable.items // ANSWERS)]
    asked = [prompt for prompt in chosen for _ in range(ANSWERS)]
    answers = []
    for part in Answerer(InProcess(policy.to(computing.device), computing.device), sampling, seed=0).in_batches(asked):
        answers += part
        computing.beat("the best of n")
    policy.to("cpu")  # next to the proxy the device has room for one of the two others
    gold.to(computing.device)
    scores = {
        name: _scores(model, asked, answers, computing).reshape(len(chosen), ANSWERS)
        for name, model in (("proxy", proxy), ("gold", gold))
    }
    gain = best_of_gain(scores["proxy"], scores["gold"])
    assert gain is not None
    rows = best_of_n(scores["proxy"], scores["gold"], _SIZES)
    return Findings(
        metrics=dict(zip(METRICS, (gain.value, gain.low), strict=True)),
        tables={"best_of_n": [{name: round(value, 6) for name, value in row.items()} for row in rows]},
    )


@torch.no_grad()
def _scores(model: nn.Module, prompts: list[np.ndarray], answers: list[np.ndarray], computing: Computing) -> np.ndarray:
    sequences = [prompt_and_response(*both) for both in zip(prompts, answers, strict=True)]
    # Prompt and answer may be longer than a row of training.
    longest = max(len(sequence.ids) for sequence in sequences)
    budget = RowBudget(row_length=max(computing.row_length, longest), max_rows=computing.max_rows)
    parts: list[Any] = []
    for part in budget.cut(sequences):
        scores_S = segment_scores(model, lay_out(part).to(computing.device), pad_id=computing.pad_id)
        parts.append(scores_S.cpu().numpy())
        computing.beat("the best of n")
    return np.concatenate(parts).astype(np.float64)
