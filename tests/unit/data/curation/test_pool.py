"""How many processes curation uses, and that their results come back in order."""

import pytest

from stages.config.execution import ExecutionConfig
from stages.data.curation.pool import num_processes, process_pool


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 1),
        ({"cpus_per_worker": 2}, 2),
        ({"cpus_per_worker": 0.5}, 1),
        ({"num_workers": 3}, 3),
        ({"num_workers": 3, "cpus_per_worker": 2}, 6),
    ],
)
def test_there_is_a_process_for_every_core_of_every_worker(settings: dict[str, float], expected: int) -> None:
    assert num_processes(ExecutionConfig.model_validate(settings)) == expected


def _double(number: int) -> int:
    return 2 * number


@pytest.mark.parametrize("workers", [1, 2])
def test_results_are_in_the_order_of_the_tasks_and_failures_are_raised(workers: int) -> None:
    with process_pool(workers) as pool:
        assert pool.run(_double, [(3,), (1,), (2,)]) == [6, 2, 4]
        with pytest.raises(ZeroDivisionError):
            pool.run(divmod, [(1, 1), (1, 0)])
