"""Recipe `demo` reaches what docs/RECIPES.md promises of each stage; `make test-alignment`."""

import re
from pathlib import Path

import pytest

from tests.alignment.milestones import MILESTONES, played
from tests.playing import alone

ROOT = Path(__file__).parents[2]


@pytest.mark.alignment
@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_stage_of_the_demo_reaches_its_milestones(tmp_path: Path) -> None:
    with alone(tmp_path):
        metrics = played(tmp_path, seed=0)
    missed = [
        f"{milestone.stage}: {milestone.means} is {milestone.value(metrics):.3g}, must be {milestone.bound}"
        for milestone in MILESTONES
        if not milestone.reached_by(milestone.value(metrics))
    ]
    assert not missed, "\n".join(missed)


def test_the_documentation_states_the_milestones_and_numbers_that_reached_them() -> None:
    text = (ROOT / "docs" / "RECIPES.md").read_text(encoding="utf-8")
    for milestone in MILESTONES:
        row = re.escape(f"| `{milestone.stage}` | {milestone.means} | {milestone.bound} | ")
        found = re.search(rf"^{row}([0-9., ]+) \|$", text, re.MULTILINE)
        assert found, f"docs/RECIPES.md lacks the row of {milestone.stage}: {milestone.means}"
        assert all(milestone.reached_by(float(value)) for value in found[1].split(", "))
