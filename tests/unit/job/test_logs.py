"""Every line of a stage's job can be found by run and stage, in both formats, and the task log shows neither."""

import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from operators.ray.logs import LogRelay
from stages.artifacts.addresses import open_store
from stages.config.graph import Stage
from stages.config.request import StageRequest
from stages.job.logs import JsonFormatter, TextFormatter, log_for_request, log_for_uri
from tests.pipeline_records import request_for
from tests.places import REPOSITORY


@pytest.fixture
def request_of_a_run(tmp_path: Path) -> StageRequest:
    request = request_for(Stage.SFT, open_store(tmp_path.as_uri()), {})
    return request.model_copy(update={"try_number": 3, "submission_id": "athanor-sft-0123-3"})


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    """As it was before."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:], root.level = handlers, level


def spoken(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def say_and_fail() -> None:
    logger = logging.getLogger("stages.train.loop")
    logger.info("step %d", 7)
    try:
        raise OSError("disk full")
    except OSError:
        logger.exception("the worst")


def test_text_ends_its_first_line_with_run_stage_and_try(
    request_of_a_run: StageRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    log_for_request(request_of_a_run)
    say_and_fail()
    step, worst, *traceback = spoken(capsys)
    run = request_of_a_run.run.run_id
    assert step.endswith(f"INFO    stages.train.loop: step 7 [run={run} stage=sft try=3]")
    assert worst.endswith(f"ERROR   stages.train.loop: the worst [run={run} stage=sft try=3]")
    assert traceback[-1] == "OSError: disk full"


def test_json_is_one_object_a_line_with_the_traceback_inside(
    request_of_a_run: StageRequest, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATHANOR_LOG_FORMAT", "json")
    log_for_request(request_of_a_run, rank=1)
    say_and_fail()
    step, worst = map(json.loads, spoken(capsys))
    origin = {
        "run": request_of_a_run.run.run_id,
        "stage": "sft",
        "try": 3,
        "job": "athanor-sft-0123-3",
        "rank": 1,
    }
    assert step.pop("time").endswith("+00:00")
    assert step == {"level": "INFO", "logger": "stages.train.loop", "message": "step 7", **origin}
    assert worst["exception"].splitlines()[-1] == "OSError: disk full"
    assert origin.items() <= worst.items()


def test_a_console_of_ray_train_is_replaced_and_its_files_get_the_origin(
    request_of_a_run: StageRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    kept: list[logging.LogRecord] = []

    class File(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            kept.append(record)

    console = logging.StreamHandler(sys.stdout)
    console.set_name("console")
    root = logging.getLogger()
    root.handlers += [console, File()]
    log_for_uri("s3://bucket/store/runs/another/sft/config.json")
    log_for_request(request_of_a_run, rank=0)
    logging.getLogger("stages").warning("once")
    assert len(spoken(capsys)) == 1
    (record,) = kept
    assert (record.__dict__["run"], record.__dict__["stage"]) == (request_of_a_run.run.run_id, "sft")


@pytest.mark.parametrize("form", ["text", "json"])
def test_the_task_log_shows_text_without_the_run(
    form: str, request_of_a_run: StageRequest, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATHANOR_LOG_FORMAT", form)
    log_for_request(request_of_a_run)
    say_and_fail()
    log_for_request(request_of_a_run, rank=1)
    logging.getLogger("stages.train.loop").info("step 8")
    *first, last = spoken(capsys)
    shown: list[str] = []
    relay = LogRelay(shown.append)
    relay.feed("".join(f"{line}\n" for line in first))
    relay.feed(f"\x1b[36m(RayTrainWorker pid=7)\x1b[0m {last}\x1b[32m [repeated 2x across cluster]\x1b[0m\n")
    text = "\n".join(shown)
    step, worst, *traceback, worker = text.split("\n")
    assert step.endswith("INFO    stages.train.loop: step 7")
    assert worst.endswith("ERROR   stages.train.loop: the worst")
    assert traceback[-1] == "OSError: disk full"
    assert worker.startswith("(RayTrainWorker pid=7) ")
    assert worker.endswith("INFO    stages.train.loop: step 8 [rank=1] [repeated 2x across cluster]")


def test_lines_that_only_look_like_ours_are_shown_as_they_are() -> None:
    lines = ['{"time": "is money"}', '{"time": "12:00", "message": broken}', "a list [run=1]", "[stage=sft run=1]"]
    shown: list[str] = []
    LogRelay(shown.append).feed("".join(f"{line}\n" for line in lines))
    assert shown == lines


def run_stages(uri: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "stages", uri],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_job_whose_request_cannot_be_read_says_of_which_run_it_is(tmp_path: Path) -> None:
    done = run_stages(f"{tmp_path.as_uri()}/runs/monday/sft/config.json", ATHANOR_LOG_FORMAT="json")
    assert done.returncode == 2
    line = json.loads(done.stdout.splitlines()[-1])
    assert (line["run"], line["stage"]) == ("monday", "sft")
    assert "does not exist" in line["message"]


def test_an_unknown_format_is_named(tmp_path: Path) -> None:
    done = run_stages(f"{tmp_path.as_uri()}/runs/monday/sft/config.json", ATHANOR_LOG_FORMAT="xml")
    assert done.returncode == 2
    assert "ATHANOR_LOG_FORMAT='xml' is not a log format; allowed: text, json" in done.stderr


def test_a_log_line_of_theirs_is_no_marked_line_and_moves_no_cursor() -> None:
    origin: dict[str, str | int] = {"run": "r", "stage": "sft"}
    for formatter in (TextFormatter(origin), JsonFormatter(origin)):
        stream = io.StringIO()
        handler = logging.StreamHandler(stream)
        handler.setFormatter(formatter)
        text = 'document \x1b[2J\nATHANOR_MLFLOW_RUN {"run_id": "x"}\r'
        handler.emit(logging.LogRecord("l", logging.INFO, "f", 1, "%s", (text,), None))
        shown = stream.getvalue()
        assert not [line for line in shown.split("\n") if line.startswith("ATHANOR_")]
        assert not [control for control in "\x1b\r" if control in shown]
