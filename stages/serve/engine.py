"""One thread that computes: it turns from model to model, a step of each, as long as any of them has answers to write.

Everything that touches a model happens in this thread. Threads of their own would compete for the same cores, and an
answer of one model would wait for all steps of another.
"""

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from stages.serve.answer import Answer
from stages.serve.batch import Group, NotFiniteError, can_join, read_prompt, step
from stages.serve.cache import is_plain, new_cache
from stages.serve.loading import ServedModel

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


class Worker:
    """The answers of one model: those that wait, the prompt that is being read, those that are being written."""

    def __init__(self, served: ServedModel, *, max_batch: int) -> None:
        self.served, self._max_batch = served, max_batch
        self._waiting: deque[list[Answer]] = deque()
        self._reading: tuple[list[Answer], Iterator[Group | None]] | None = None
        self._groups: list[Group] = []
        self._shares = is_plain(new_cache(served.model))

    def add(self, answers: Sequence[Answer]) -> None:
        """Take answers to one prompt."""
        together = list(answers) if self._shares else []
        self._waiting += [
            together[start : start + self._max_batch] for start in range(0, len(together), self._max_batch)
        ]
        if not self._shares:
            self._waiting += [[answer] for answer in answers]

    @property
    def _num_writing(self) -> int:
        return sum(len(group.answers) for group in self._groups)

    def turn(self) -> bool:
        """Read a part of a prompt, write a token of each answer; False when there was nothing to do.

        A model that fails ends the answers that it was computing with an error, and no others.
        """
        worked = self._read()
        for group in list(self._groups):
            if self._guarded(group.answers, lambda group=group: step(self.served.model, group)) is _END:
                group.answers, group.cache = [], None
            worked = True
        self._groups = [group for group in self._groups if group.answers]
        return worked

    def _read(self) -> bool:
        if self._reading is None:
            while self._waiting and all(answer.cancelled for answer in self._waiting[0]):
                self._waiting.popleft()
            if not self._waiting or self._num_writing + len(self._waiting[0]) > self._max_batch:
                return False
            answers = self._waiting.popleft()
            self._reading = answers, read_prompt(self.served.model, answers)
        answers, parts = self._reading
        if all(answer.cancelled for answer in answers):
            self._reading = None
            return True
        group = self._guarded(answers, lambda: next(parts, _END))
        if group is None:
            return True
        self._reading = None
        if isinstance(group, Group) and group.answers:
            self._enter(group)
        return True

    def _enter(self, group: Group) -> None:
        if not (self._groups and self._shares and can_join(self._groups[0], group)):
            self._groups.append(group)
            return
        first = self._groups[0]
        if self._guarded([*first.answers, *group.answers], lambda: first.join(group)) is _END:
            del self._groups[0]  # some of its layers have the new rows and others do not

    def _guarded(self, answers: list[Answer], work: Callable[[], Any]) -> Any:
        """Return what `work` returns; when it fails, the answers end with the reason and the result is no group."""
        concerned = list(answers)  # the group drops those that have ended
        try:
            return work()
        except Exception as error:  # any failure of a model must not end the server, and is told to whoever asked
            logger.exception("%s failed", self.served.name)
            reason = (
                str(error) if isinstance(error, NotFiniteError | MemoryError) else f"{type(error).__name__}: {error}"
            )
            for answer in concerned:
                answer.fail(f"the model {self.served.name} failed: {reason[:300]}")
            return _END

    def fail_all(self, reason: str) -> None:
        """End every answer with an error."""
        reading = self._reading[0] if self._reading else []
        writing = [answer for group in self._groups for answer in group.answers]
        for answer in [*writing, *reading, *(answer for answers in self._waiting for answer in answers)]:
            answer.fail(reason)
        self.drop_all()

    def drop_all(self) -> None:
        """Forget every answer, whatever state a step has left it in."""
        self._waiting.clear()
        self._groups, self._reading = [], None


_END = object()
"""What a failed or finished reading gives instead of a group."""


class Engine:
    """Runs the workers in a thread of its own, from `start` to `stop`."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        self.workers = {worker.served.name: worker for worker in workers}
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """Whether answers can be written at all."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """End all answers, and the thread after the step that it is in."""
        self._calls.put(None)
        self._thread.join()

    def call(self, work: Callable[[], Result]) -> Future[Result]:
        """Run something between two steps, where no model computes; its result or error is the future's."""
        future: Future[Result] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001 - it belongs to whoever waits for the future
                future.set_exception(error)

        self._calls.put(run)
        return future

    def _run(self) -> None:
        worked = False
        while True:
            try:
                # Without work there is nothing to do until somebody calls.
                call = self._calls.get_nowait() if worked else self._calls.get()
            except queue.Empty:
                worked = self._turn()
                continue
            if call is None:
                for worker in self.workers.values():
                    worker.fail_all("the server stops")
                return
            call()
            worked = True

    def _turn(self) -> bool:
        return any([_turned(worker) for worker in self.workers.values()])


def _turned(worker: Worker) -> bool:
    """A turn of one model. Without this thread every later request would wait for ever, so it survives any error."""
    try:
        return worker.turn()
    except Exception as error:  # told to whoever asked
        logger.exception("%s failed between two steps", worker.served.name)
        worker.fail_all(f"the model {worker.served.name} failed: {type(error).__name__}: {str(error)[:300]}")
        return False  # nothing is left to do
