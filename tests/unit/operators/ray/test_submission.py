"""Exactly one job per attempt, whatever dies in between; against a server with the behaviour of Ray's."""

import json

import pytest

from operators.ray.hook import RayJobHook
from operators.ray.jobs import RayUnreachableError
from operators.ray.submission import STATE_KEY, Attached, Submission, SubmissionLog, TaskKey, attach_or_submit
from tests.ray_stand_in import StandInRay
from tests.task_state import Memory

KEY = TaskKey("llm_pipeline", "manual__2026-01-01T00:00:00+00:00", "sft")


class Crash(BaseException):
    """The task's process dies."""


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture
def prepared() -> list[str]:
    """Submissions whose request was written, in order."""
    return []


@pytest.fixture
def attempt(ray: StandInRay, memory: Memory, prepared: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AIRFLOW_CONN_RAY_DEFAULT", json.dumps(ray.connection))

    def run(
        try_number: int, *, clear_number: int = 0, crash_before_post: bool = False, crash_after_post: bool = False
    ) -> Attached:
        with RayJobHook() as hook:

            def prepare(submission: Submission) -> None:
                prepared.append(submission.submission_id)

            def post(submission: Submission) -> None:
                if crash_before_post:
                    raise Crash
                hook.submit_job(submission_id=submission.submission_id, entrypoint="true")
                if crash_after_post:
                    raise Crash

            log = SubmissionLog(memory, KEY, retention=None)
            return attach_or_submit(
                log,
                hook,
                try_number=try_number,
                clear_number=clear_number,
                prepare=prepare,
                post=post,
                patience_seconds=3,
            )

    return run


def consume(memory: Memory, attached: Attached, *, taken_in: int | None = None) -> None:
    SubmissionLog(memory, KEY, retention=None).consume(attached.submission, taken_in=taken_in)


def test_ids_are_readable_stable_and_differ_by_task_instance_and_generation():
    assert KEY.submission_id(1).startswith("athanor-sft-")
    assert KEY.submission_id(1) == TaskKey(KEY.dag_id, KEY.run_id, "sft").submission_id(1)
    others = [
        KEY.submission_id(2),
        TaskKey(KEY.dag_id, KEY.run_id, "sft", 0).submission_id(1),
        TaskKey(KEY.dag_id, "other", "sft").submission_id(1),
        TaskKey("other", KEY.run_id, "sft").submission_id(1),
        TaskKey(KEY.dag_id, KEY.run_id, "group.sft/x").submission_id(1),
        TaskKey(KEY.dag_id, KEY.run_id, "sft", airflow="staging").submission_id(1),
    ]
    assert len({KEY.submission_id(1), *others}) == 7
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-_") for name in others)


def test_the_id_is_remembered_before_the_post(attempt, ray: StandInRay, memory: Memory):
    with pytest.raises(Crash):
        attempt(1, crash_before_post=True)
    assert memory.values[STATE_KEY]["submission_id"] == KEY.submission_id(1)
    assert ray.posts == []


def test_a_crash_before_the_post_leads_to_one_job(attempt, ray: StandInRay):
    with pytest.raises(Crash):
        attempt(1, crash_before_post=True)
    assert attempt(2).submission == Submission(KEY.submission_id(1), 1, 2)
    assert list(ray.jobs) == [KEY.submission_id(1)]


def test_a_crash_after_the_post_leads_to_one_job(attempt, ray: StandInRay):
    with pytest.raises(Crash):
        attempt(1, crash_after_post=True)
    attached = attempt(2)
    assert attached.reattached
    assert ray.posts == [KEY.submission_id(1)]


def test_a_lost_answer_leads_to_one_job_whose_files_are_left_alone(attempt, ray: StandInRay, prepared: list[str]):
    ray.lose_answers = 1
    attached = attempt(1)
    assert not attached.reattached
    assert ray.posts == [KEY.submission_id(1)] * 2
    assert prepared == [KEY.submission_id(1)]
    assert list(ray.jobs) == [KEY.submission_id(1)]


def test_a_job_that_ended_well_while_nobody_looked_is_taken(attempt, ray: StandInRay):
    first = attempt(1).submission.submission_id
    ray.jobs[first].status = "SUCCEEDED"
    attached = attempt(2)
    assert attached.job is not None
    assert (attached.job.status, len(ray.jobs)) == ("SUCCEEDED", 1)


@pytest.mark.parametrize("status", ["STOPPED", "FAILED"])
def test_a_job_found_stopped_or_failed_is_started_anew_in_the_same_attempt(attempt, ray: StandInRay, status: str):
    first = attempt(1).submission.submission_id
    ray.jobs[first].status = status
    assert attempt(2).submission == Submission(KEY.submission_id(2), 2, 2)


def test_a_job_that_the_cluster_forgot_is_started_anew(attempt, ray: StandInRay):
    attempt(1)
    ray.jobs.clear()
    assert attempt(2).submission.generation == 1
    assert list(ray.jobs) == [KEY.submission_id(1)]


def test_a_processed_failure_is_never_taken_again(attempt, ray: StandInRay, memory: Memory):
    attached = attempt(1)
    ray.jobs[attached.submission.submission_id].status = "FAILED"
    consume(memory, attached)
    assert attempt(2).submission.generation == 2
    assert len(ray.jobs) == 2


def test_a_success_that_airflow_did_not_note_is_taken_again(attempt, ray: StandInRay, memory: Memory):
    """The process died between taking the success and Airflow's recording it: nobody asked for another attempt."""
    attached = attempt(1, clear_number=3)
    ray.jobs[attached.submission.submission_id].status = "SUCCEEDED"
    consume(memory, attached, taken_in=3)
    again = attempt(2, clear_number=3)
    assert again.job is not None
    assert (again.submission.generation, again.job.status) == (1, "SUCCEEDED")
    assert len(ray.jobs) == 1


def test_a_success_is_not_taken_again_when_somebody_cleared_the_task(attempt, ray: StandInRay, memory: Memory):
    attached = attempt(1, clear_number=3)
    ray.jobs[attached.submission.submission_id].status = "SUCCEEDED"
    consume(memory, attached, taken_in=3)
    assert attempt(2, clear_number=4).submission.generation == 2
    assert len(ray.jobs) == 2


def test_an_ended_job_of_a_forgotten_past_is_not_taken(attempt, ray: StandInRay, memory: Memory):
    attached = attempt(1)
    ray.jobs[attached.submission.submission_id].status = "SUCCEEDED"
    memory.values.clear()
    assert attempt(1).submission.generation == 2


def test_a_running_job_of_a_forgotten_past_is_attached_to(attempt, ray: StandInRay, memory: Memory):
    attempt(1)
    memory.values.clear()
    assert attempt(1).job is not None
    assert len(ray.jobs) == 1


def test_an_absent_head_is_waited_for_and_then_named(attempt, ray: StandInRay, monkeypatch: pytest.MonkeyPatch):
    ray.down = True
    with pytest.raises(RayUnreachableError, match="HTTP 503: starting"):
        attempt(1)
    assert ray.jobs == {}
