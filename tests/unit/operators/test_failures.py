"""Category -> exception -> retry."""

from datetime import timedelta
from pathlib import Path

import pytest
from airflow.sdk.definitions.retry_policy import RetryAction

from operators.failures import (
    EXCEPTIONS,
    MAX_RETRIES,
    StageConfigFailed,
    StageDataFailed,
    StageFailed,
    StageInfrastructureFailed,
    StageNonFinite,
    StageOutOfMemory,
    StagePreempted,
    StageRetryPolicy,
    StageStopped,
    as_stage_failures,
    job_failure,
    stage_failure,
)
from operators.ray.jobs import JobInfo, JobStatus, RayRefusedError, RayUnreachableError
from operators.ray.watch import Outcome
from operators.results import explain_failure, read_result
from stages.artifacts.addresses import open_store, run_key
from stages.config.errors import Category, ConfigError, DataError
from stages.config.graph import Stage
from stages.config.request import Failure, RunInfo

RUN = RunInfo(run_id="r", name="n")
POLICY = StageRetryPolicy()


def failed(**fields: object) -> JobInfo:
    return JobInfo("athanor-sft-1", JobStatus.FAILED, **fields)  # pyright: ignore[reportArgumentType]


def test_every_category_has_an_exception_of_its_own_category():
    assert {category: exception.category for category, exception in EXCEPTIONS.items()} == {c: c for c in Category}


def test_config_and_data_are_never_retried_and_all_others_are():
    never = {c for c, e in EXCEPTIONS.items() if POLICY.evaluate(e("x"), 1, MAX_RETRIES).action is RetryAction.FAIL}
    assert never == {Category.CONFIG, Category.DATA}


def test_a_job_that_somebody_stopped_is_not_started_again():
    assert POLICY.evaluate(StageStopped("x"), 1, MAX_RETRIES).action is RetryAction.FAIL


def test_the_runs_own_max_retries_ends_earlier_than_airflows_ceiling():
    def actions(max_retries: int) -> list[RetryAction]:
        error = StageInfrastructureFailed("x", max_retries=max_retries)
        return [POLICY.evaluate(error, attempt, MAX_RETRIES).action for attempt in (1, 2, 3)]

    assert actions(0) == [RetryAction.FAIL] * 3
    assert actions(2) == [RetryAction.RETRY, RetryAction.RETRY, RetryAction.FAIL]


def test_a_cleared_task_has_its_retries_back():
    # Attempts 1-3 were used up, then somebody cleared the task: Airflow raises max_tries to 3 + retries.
    error = StageInfrastructureFailed("x", max_retries=2)
    assert POLICY.evaluate(error, 4, 3 + MAX_RETRIES).action is RetryAction.RETRY
    assert POLICY.evaluate(error, 6, 3 + MAX_RETRIES).action is RetryAction.FAIL


def test_the_delay_doubles_up_to_a_limit():
    policy = StageRetryPolicy(first_delay=timedelta(seconds=5), longest_delay=timedelta(seconds=30))
    error = StageInfrastructureFailed("x", max_retries=9)
    delays = [policy.evaluate(error, attempt, MAX_RETRIES).retry_delay for attempt in range(1, 6)]
    assert [delay.total_seconds() for delay in delays if delay] == [5, 10, 20, 30, 30]


def test_an_exception_without_category_is_retried_twice():
    decisions = [POLICY.evaluate(ValueError("bug"), attempt, MAX_RETRIES).action for attempt in (1, 2, 3)]
    assert decisions == [RetryAction.RETRY, RetryAction.RETRY, RetryAction.FAIL]


FAILURES = [
    b"",
    b"{",
    b"[]",
    b"\xff",
    b"[" * 100_000,
    b'{"category": "gremlins", "message": "no"}',
    b'{"category": 3, "message": "no"}',
    b'{"category": "lost"}',
]


@pytest.mark.parametrize("written", FAILURES)
@pytest.mark.parametrize(("code", "category"), [(2, Category.CONFIG), (3, Category.DATA), (1, Category.INFRASTRUCTURE)])
def test_where_failure_json_cannot_be_read_the_exit_code_decides(
    tmp_path: Path, written: bytes, code: int, category: Category
):
    store = open_store(tmp_path.as_uri())
    store.write_bytes(run_key(RUN.run_id, Stage.SFT, "failure.json"), written)
    outcome = Outcome("athanor-1", "FAILED", "the job's last words", None, code)
    error = explain_failure(Stage.SFT, run=RUN, store=store, outcome=outcome, max_retries=3)
    assert error.category is category


@pytest.mark.parametrize("written", [b"", b"{", b"{}", b"\xff", b"[" * 100_000, b'{"hit": ' + b"1" * 5000 + b"}"])
def test_a_result_that_cannot_be_read_is_named_and_not_retried(tmp_path: Path, written: bytes):
    store = open_store(tmp_path.as_uri())
    store.write_bytes(run_key(RUN.run_id, Stage.SFT, "result.json"), written)
    outcome = Outcome("athanor-1", "SUCCEEDED", "", None, 0)
    with (
        pytest.raises(StageDataFailed, match=r"runs/r/sft/result\.json is not a valid StageResult"),
        as_stage_failures(),
    ):
        read_result(Stage.SFT, run=RUN, store=store, outcome=outcome, max_retries=3)


def test_the_last_words_are_message_and_advice():
    error = stage_failure(Failure(category="data", message="corpus is empty.", advice="Name a folder with text."))
    assert isinstance(error, StageDataFailed)
    assert str(error) == "corpus is empty. Name a folder with text."


@pytest.mark.parametrize(
    ("job", "exception"),
    [
        (failed(exit_code=2), StageConfigFailed),
        (failed(exit_code=3), StageDataFailed),
        (failed(exit_code=4), StageNonFinite),
        (failed(exit_code=5), StageOutOfMemory),
        (failed(exit_code=6), StagePreempted),
        (failed(exit_code=1), StageInfrastructureFailed),
        (failed(exit_code=77), StageInfrastructureFailed),
        (failed(exit_code=-9), StageInfrastructureFailed),
        (failed(exit_code=137), StageInfrastructureFailed),
        (failed(exit_code=143), StagePreempted),
        (failed(error_type="RUNTIME_ENV_SETUP_FAILURE"), StageConfigFailed),
        (failed(error_type="JOB_SUPERVISOR_ACTOR_DIED"), StageInfrastructureFailed),
        (failed(), StageInfrastructureFailed),
    ],
)
def test_a_job_without_last_words_is_sorted_by_exit_code_and_rays_reason(job: JobInfo, exception: type[StageFailed]):
    assert type(job_failure(job, Stage.SFT)) is exception


def test_what_the_stage_said_is_told_without_the_lines_around_it():
    message = "Runtime env is setting up.\n2026-11-28 04:12:03,387 ERROR   athanor: the key is wrong. Check it.\nbye"
    assert str(job_failure(failed(exit_code=2, message=message), Stage.SFT)).endswith(
        "(exit code 2): the key is wrong. Check it."
    )


def test_the_end_of_the_jobs_message_is_told():
    text = str(job_failure(failed(exit_code=1, message="\n".join(f"line {number}" for number in range(30))), Stage.SFT))
    assert "exit code 1" in text
    assert text.endswith("line 28\nline 29")
    assert "line 20" not in text


@pytest.mark.parametrize(
    ("raised", "exception", "says"),
    [
        (ConfigError("recipe='x' does not exist", advice="Choose one."), StageConfigFailed, "Choose one."),
        (DataError("empty"), StageDataFailed, "empty"),
        (RayRefusedError("HTTP 401", advice="Put the token in."), StageConfigFailed, "Put the token in."),
        (RayUnreachableError("refused"), StageInfrastructureFailed, "the retry attaches to it"),
    ],
)
def test_only_categorised_failures_leave_a_task(raised: Exception, exception: type[StageFailed], says: str):
    with pytest.raises(exception, match=says) as caught, as_stage_failures(max_retries=4):
        raise raised
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_the_policy_can_be_serialised():
    assert POLICY.serialize() == {"__type": "operators.failures.StageRetryPolicy", "retries": MAX_RETRIES}
