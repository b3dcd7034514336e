"""Run a function over tasks in a few processes: results in the order of the tasks, the first failure raised at once."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from typing import Any, TypeVar

from stages.config.execution import ExecutionConfig

Result = TypeVar("Result")


class Pool:
    """Processes that live as long as the stage; with one worker the work stays in this process."""

    def __init__(self, executor: ProcessPoolExecutor | None) -> None:
        self._executor = executor

    def submit(self, function: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Start one task; its failure is raised by `result()`."""
        if self._executor is not None:
            return self._executor.submit(function, *arguments)
        future: Future[Result] = Future()
        future.set_result(function(*arguments))  # a failure is raised here and not by `result()`
        return future

    def run(
        self,
        function: Callable[..., Result],
        tasks: Sequence[tuple[Any, ...]],
        done: Callable[[int, Result], None] = lambda number, result: None,
    ) -> list[Result]:
        """All results in the order of `tasks`; `done(how many, result)` is called as each one comes in."""
        results: dict[int, Result] = {}
        for place, result in self._completed(function, tasks):
            results[place] = result
            done(len(results), result)
        return [results[place] for place in range(len(tasks))]

    def _completed(
        self, function: Callable[..., Result], tasks: Sequence[tuple[Any, ...]]
    ) -> Iterator[tuple[int, Result]]:
        if self._executor is None:
            for place, arguments in enumerate(tasks):
                yield place, function(*arguments)
            return
        futures = {self._executor.submit(function, *arguments): place for place, arguments in enumerate(tasks)}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            for future in futures:
                future.cancel()
            raise


def num_processes(execution: ExecutionConfig) -> int:
    """One process a core: the cores of all workers, or of the job's own process with `num_workers=0`."""
    return max(1, execution.num_workers) * max(1, int(execution.cpus_per_worker))


@contextmanager
def process_pool(workers: int) -> Iterator[Pool]:
    """A pool of `workers` processes, started fresh: a fork of a process with Ray's threads may hang."""
    if workers <= 1:
        yield Pool(None)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as executor:
        yield Pool(executor)
