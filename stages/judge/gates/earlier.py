"""A new reward model against the one before it, on the same held-out pairs: a refresh must not lose what was known.

Shape legend: P pairs.
"""

import numpy as np

from stages.config.gate_records import Findings
from stages.config.gates import EARLIER, GAIN, GAIN_HIGH, GAIN_LOW
from stages.judge.gates.acceptance import JudgedPairs, of_differences, wins

NAMES = (EARLIER, GAIN, GAIN_LOW, GAIN_HIGH)


def compared_with_earlier(pairs: JudgedPairs, earlier_P2: np.ndarray) -> Findings:
    """Return the accuracy of the earlier model, whose scores of the same pairs are `earlier_P2`, and by how much the
    new one's is higher, with its 95 % interval, clustered by prompt."""
    if not len(pairs.margins_P):
        return without_earlier("there are no held-out preference pairs")
    right_P, before_P = wins(pairs.margins_P), wins(earlier_P2[:, 0] - earlier_P2[:, 1])
    found = of_differences(right_P - before_P, pairs.prompts_P)
    values = (float(before_P.mean()), found.value, found.low, found.high)
    return Findings(metrics=dict(zip(NAMES, values, strict=True)))


def without_earlier(why: str) -> Findings:
    """No comparison, for a reason."""
    return Findings(unmeasured=dict.fromkeys(NAMES, why))
