"""`python -m tests.bench.hundred_jobs [count]`: jobs through the operator in one mapped DAG, with a pool of 4 and
scheduler and triggerer killed twice; prints the overhead per task."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.chaos.mapped import run_mapped
from tests.chaos.stack import chaos_stack
from tests.places import REPOSITORY

DAGS = [REPOSITORY / "tests" / "chaos" / "chaos_dags.py"]


def main(count: int = 100) -> None:
    with tempfile.TemporaryDirectory(prefix="athanor-hundred-") as root:
        with chaos_stack(Path(root), DAGS) as stack:
            stack.airflow.wait_for_dag("mapped", seconds=120)
            print(run_mapped(stack, count, seconds=3000))


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
