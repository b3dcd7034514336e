"""Reports of progress that are old are shown as old."""

import pytest

from stages.config.heard import quiet_seconds, seconds_left, standing

REPORT = {"done": 120, "total": 500, "unit": "step", "eta_seconds": 200.0, "at": 1000.0}


@pytest.mark.parametrize(
    ("now", "quiet", "left", "said"),
    [
        (1000.0, 0.0, 200.0, "120/500 steps (24 %), 3 min 20 s left"),
        (1030.0, 0.0, 200.0, "120/500 steps (24 %), 3 min 20 s left"),  # two clocks differ by as much
        (1140.0, 140.0, 60.0, "120/500 steps (24 %), 1 min 00 s left, nothing heard for 2 min 20 s"),
        (1200.0, 200.0, None, "120/500 steps (24 %), nothing heard for 3 min 20 s"),
        (900.0, 0.0, 200.0, "120/500 steps (24 %), 3 min 20 s left"),  # the clock there is ahead
    ],
)
def test_an_estimate_runs_down_and_ends(now: float, quiet: float, left: float | None, said: str) -> None:
    assert quiet_seconds(REPORT, now=now) == quiet
    assert seconds_left(REPORT, now=now) == left
    assert standing(REPORT, now=now) == said


def test_reports_without_a_time_or_without_anything_say_what_they_can() -> None:
    earlier_release = {name: value for name, value in REPORT.items() if name != "at"}
    assert standing(earlier_release, now=1e9) == "120/500 steps (24 %), 3 min 20 s left"
    assert standing({}, now=1e9) == "no progress reported yet"
    assert standing({"done": 5, "total": 0, "unit": "document"}, now=0.0) == "5/0 documents"
    assert seconds_left({**REPORT, "done": 500}, now=1000.0) is None
