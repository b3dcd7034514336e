"""Every method improves what the gold reward says, and the reward model is nearly as good as labels allow.

Trains 7 methods on 3 seeds: hours on two cores, so `make test-alignment` and not `make test`. `python -m
tests.alignment` prints the numbers.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.alignment.task import KL_BUDGET, LEAST_OF_BAYES, LEAST_WINS, METHODS, Task

pytestmark = [pytest.mark.alignment, pytest.mark.slow, pytest.mark.timeout(7200)]


@pytest.fixture(scope="module", params=[0, 1, 2], ids="seed-{}".format)
def task(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Task]:
    with pytest.MonkeyPatch.context() as patch:
        home: Path = tmp_path_factory.mktemp("controlled")
        patch.setenv("ATHANOR_SCRATCH", str(home / "scratch"))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield Task(home, request.param)


def test_the_reward_model_comes_near_to_what_noisy_labels_allow(task: Task) -> None:
    scored = task.score()
    assert scored.of_bayes >= LEAST_OF_BAYES, scored


@pytest.mark.parametrize("method", METHODS)
def test_a_method_beats_sft_by_gold_within_the_budget(task: Task, method: str) -> None:
    measured = task.measure(method)
    print(measured)
    assert measured.wins >= LEAST_WINS, measured
    assert measured.kl <= KL_BUDGET, measured
