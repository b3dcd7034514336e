"""Accuracy on held-out pairs by what raters found the chosen reply better in: helpfulness and harmlessness apart.

No suite of its own: the scores of the suites that ask about pairs, grouped. A pair that names two areas is in both.
"""

from dataclasses import asdict
from typing import Any

import numpy as np

from stages.config.evaluation import GOLD_AGREEMENT, REWARD_PAIRS, ByReason
from stages.data.tokens.reasons import by_area
from stages.judge.bench import Bench, Measured
from stages.judge.builtin.replies import win
from stages.judge.statistics import interval

_ACCURACIES = ("pairs", "preferences", GOLD_AGREEMENT)
"""Suites whose value of a pair is 1, 0, or one half for a tie."""
_MARGINS = "reward_margins"
"""The suite of the reward model, whose value is a difference of scores."""
_LEVEL = 0.95


def by_reason(bench: Bench, measured: Measured) -> list[dict[str, Any]]:
    """Return the accuracy of every model on the pairs of every reason, with interval and number of pairs; nothing
    where no pair has a reason."""
    bits = {pair.id: pair.reasons for pair in bench.heldout.pairs}
    if not any(bits.values()):
        return []
    found = []
    for unit in bench.units:
        if unit.suite.name not in (*_ACCURACIES, _MARGINS) or unit.key not in measured:
            continue
        scores, is_margin = measured[unit.key].scores, unit.suite.name == _MARGINS
        values = np.array([win(score.value) if is_margin else score.value for score in scores], dtype=np.float64)
        clusters = np.array([score.cluster or score.item for score in scores], dtype=object)
        named = by_area(np.array([bits[score.item] for score in scores], dtype=np.uint8))
        suite = REWARD_PAIRS if is_margin else unit.suite.name
        for reason, is_named in named.items():
            known = interval(values[is_named], clusters[is_named], level=_LEVEL)
            if known is not None:
                found.append(ByReason(role=unit.role, suite=suite, reason=reason, **asdict(known)))
    return [asdict(one) for one in found]


def flat_by_reason(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return them as metrics: `reward/accuracy_harmless` of the reward model, and
    `dpo/suite/preferences/accuracy_harmless` of others, each with `pairs_...` in the place of `accuracy_...`."""
    found: dict[str, float] = {}
    for row in rows:
        place = row["role"] if row["suite"] == REWARD_PAIRS else f"{row['role']}/suite/{row['suite']}"
        found[f"{place}/accuracy_{row['reason']}"] = row["value"]
        found[f"{place}/pairs_{row['reason']}"] = float(row["items"])
    return found
