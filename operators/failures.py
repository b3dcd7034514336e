"""What a stage's failure means to Airflow: category -> exception -> retry or not.

A retry resumes from the stage's last checkpoint, so the categories that a retry can help are retried with a growing
delay; a wrong configuration or unusable data fails at once. The number of retries is a setting of the run
(`execution.<stage>.max_retries`), known only when the task runs, while Airflow's `retries` is fixed when the DAG is
read: tasks therefore carry the ceiling MAX_RETRIES, and StageRetryPolicy stops earlier.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, ClassVar

from airflow.sdk import RetryPolicy
from airflow.sdk.definitions.retry_policy import RetryDecision

from operators.ray.jobs import JobInfo, RayRefusedError, RayUnreachableError
from stages.config.errors import EXIT_CODES, Category, ExitCode, StageError
from stages.config.graph import Stage
from stages.config.request import Failure

MAX_RETRIES = 10
"""Ceiling of Airflow's own `retries`; reached only by attempts whose process died without raising anything."""
UNKNOWN_RETRIES = 2
"""Retries of a failure that has no category, which is a bug or a broken Airflow."""


class StageFailed(Exception):
    """A stage failed; the text says what happened and what to do."""

    category: ClassVar[Category] = Category.INFRASTRUCTURE
    retryable: ClassVar[bool] = True

    def __init__(self, message: str, *, advice: str = "", max_retries: int | None = None) -> None:
        super().__init__(f"{message} {advice}".strip())
        self.message = message
        self.advice = advice
        self.max_retries = max_retries


class StageConfigFailed(StageFailed):
    category = Category.CONFIG
    retryable = False


class StageDataFailed(StageFailed):
    category = Category.DATA
    retryable = False


class StageNonFinite(StageFailed):
    category = Category.NON_FINITE


class StageOutOfMemory(StageFailed):
    category = Category.OUT_OF_MEMORY


class StagePreempted(StageFailed):
    category = Category.PREEMPTED


class StageLost(StageFailed):
    """The cluster no longer knows the job: its head was restarted."""

    category = Category.LOST


class StageStalled(StageFailed):
    """The job made no progress and was ended."""

    category = Category.STALLED


class StageOutOfMemoryForGood(StageOutOfMemory):
    """Out of memory with the smallest micro-batch there is."""

    retryable = False


class StageInfrastructureFailed(StageFailed):
    pass


class StageTimedOut(StageFailed):
    """The job ran longer than the task's `timeout` and was stopped; the retry resumes from its checkpoint."""


class StageStopped(StageFailed):
    """A user stopped the job on the Ray side. That was on purpose, so it is not retried."""

    category = Category.PREEMPTED
    retryable = False


class GateFailed(StageFailed):
    """What a stage published must not be gone on with; no retry makes it another artifact."""

    category = Category.DATA
    retryable = False


class MadeDataRejected(StageFailed):
    """A person read what models of the run had made and rejected it, or none answered in time."""

    category = Category.DATA
    retryable = False


class RunIncomplete(StageFailed):
    """The run is over, and not all stages that it was asked for succeeded."""

    retryable = False


EXCEPTIONS: dict[Category, type[StageFailed]] = {
    Category.CONFIG: StageConfigFailed,
    Category.DATA: StageDataFailed,
    Category.NON_FINITE: StageNonFinite,
    Category.OUT_OF_MEMORY: StageOutOfMemory,
    Category.PREEMPTED: StagePreempted,
    Category.LOST: StageLost,
    Category.STALLED: StageStalled,
    Category.INFRASTRUCTURE: StageInfrastructureFailed,
}

_BY_EXIT_CODE = {code: category for category, code in EXIT_CODES.items() if category is not Category.LOST}

# Ray's own reasons (`error_type` of a job) that no retry can help.
_RAY_CONFIG_ERRORS = ("RUNTIME_ENV_SETUP_FAILURE", "JOB_ENTRYPOINT_COMMAND_START_ERROR")
# How a stage's job logs its errors.
_STAGE_ERROR = re.compile(r"^\S+ \S+ ERROR +athanor: (.+)$", re.MULTILINE)


def stage_failure(failure: Failure, *, max_retries: int | None = None) -> StageFailed | None:
    """Turn the job's own report (`failure.json`) into the exception of its category; None for an unknown category."""
    if failure.category not in set(Category):
        return None
    exception = EXCEPTIONS[Category(failure.category)]
    return exception(failure.message, advice=failure.advice, max_retries=max_retries)


def job_failure(job: JobInfo, stage: Stage, *, max_retries: int | None = None) -> StageFailed:
    """Explain a job that failed without leaving a `failure.json`: by its exit code, else by Ray's reason."""
    last_words = _last_words(job.message)
    if job.error_type in _RAY_CONFIG_ERRORS:
        return StageConfigFailed(
            f"Ray could not start the job ({job.error_type}): {last_words}",
            advice="The cluster's image must hold this project and its dependencies.",
        )
    if job.exit_code in (-9, 137):
        return StageInfrastructureFailed(
            "The stage's process was killed (signal 9): the machine ran out of memory, or a user killed it.",
            advice="The retry resumes from the checkpoint. If it recurs: lower "
            f"execution.{stage.value}.micro_batch_size.",
            max_retries=max_retries,
        )
    if job.exit_code in (-15, 143):
        return StagePreempted("The stage's process was terminated (signal 15).", max_retries=max_retries)
    category = Category.INFRASTRUCTURE
    if job.exit_code in set(ExitCode):
        category = _BY_EXIT_CODE.get(ExitCode(job.exit_code), category)
    reason = f"exit code {job.exit_code}" if job.exit_code is not None else job.error_type or "no reason given"
    return EXCEPTIONS[category](f"Ray job {job.submission_id} failed ({reason}): {last_words}", max_retries=max_retries)


def out_of_memory_for_good(error: StageFailed, stage: str) -> StageOutOfMemoryForGood:
    """Say what else saves memory when the micro-batch cannot be halved any more."""
    return StageOutOfMemoryForGood(
        error.message,
        advice=f"execution.{stage}.micro_batch_size is 1 already. Set gradient_checkpointing, use engine=fsdp with "
        "more workers, GPUs with more memory, or a shorter tokenize.sequence_length.",
    )


def ended_while_waiting(max_retries: int | None = None) -> StagePreempted:
    return StagePreempted(
        "Airflow ended this process while it waited for the job.",
        advice="The next attempt attaches to the job, or starts it anew from its checkpoint if it was stopped.",
        max_retries=max_retries,
    )


def _last_words(text: str, count: int = 5) -> str:
    """What the stage itself logged as its error; else the last lines of the log, whatever wrote them."""
    if said := _STAGE_ERROR.findall(text):
        return said[-1]
    lines = [line for line in text.splitlines() if line.strip()]
    return "\n".join(lines[-count:]) or "the job left no message"


@contextmanager
def as_stage_failures(max_retries: int | None = None) -> Iterator[None]:
    """Let only StageFailed out of a task, so that each failure has a category and reads well."""
    try:
        yield
    except StageError as error:
        raise EXCEPTIONS[error.category](error.message, advice=error.advice, max_retries=max_retries) from None
    except RayRefusedError as error:
        raise StageConfigFailed(str(error), advice=error.advice) from None
    except RayUnreachableError as error:
        raise StageInfrastructureFailed(
            str(error), advice="A running job is left alone; the retry attaches to it.", max_retries=max_retries
        ) from None


class StageRetryPolicy(RetryPolicy):
    """The category decides whether to retry, `execution.<stage>.max_retries` how often; the delay doubles each time."""

    def __init__(
        self,
        retries: int = MAX_RETRIES,
        *,
        first_delay: timedelta = timedelta(seconds=5),
        longest_delay: timedelta = timedelta(minutes=5),
    ) -> None:
        self.retries = retries
        self.first_delay = first_delay
        self.longest_delay = longest_delay

    def evaluate(self, exception: BaseException, try_number: int, max_tries: int, context: Any = None) -> RetryDecision:
        # Clearing a task raises max_tries by the tries it already used, so count from there.
        used = max(0, try_number - 1 - max(0, max_tries - self.retries))
        if not isinstance(exception, StageFailed):
            limit, name = UNKNOWN_RETRIES, type(exception).__name__
        elif not exception.retryable:
            return RetryDecision.fail(f"{exception.category}: a retry cannot help")
        else:
            limit = self.retries if exception.max_retries is None else exception.max_retries
            name = exception.category.value
        if used >= limit:
            return RetryDecision.fail(f"{name}: failed {used + 1} times, {limit} retries are allowed")
        delay = min(self.first_delay * 2**used, self.longest_delay)
        return RetryDecision.retry(delay, f"{name}: retry {used + 1} of {limit}")

    def serialize(self) -> dict[str, Any]:
        return {"__type": "operators.failures.StageRetryPolicy", "retries": self.retries}
