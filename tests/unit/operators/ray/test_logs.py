"""A job's log on its way into the task log."""

import json

from hypothesis import given
from hypothesis import strategies as st

from operators.ray.logs import MAX_LINE, LogRelay, readable_progress

PROGRESS = {"stage": "sft", "done": 30, "total": 120, "unit": "step", "rate": 7800.0, "rate_unit": "tokens/s"}


@given(st.lists(st.text(alphabet="abc %{}\n", max_size=12), max_size=20), st.data())
def test_lines_are_shown_once_and_in_order_however_the_log_is_cut_and_restarted(parts: list[str], data: st.DataObject):
    whole = "".join(parts)
    shown: list[str] = []
    relay = LogRelay(shown.append)
    for _ in range(3):
        relay.restart()
        text = whole[: data.draw(st.integers(0, len(whole)))]
        while text:
            cut = data.draw(st.integers(1, len(text)))
            relay.feed(text[:cut])
            text = text[cut:]
    relay.finish(whole)
    assert shown == (whole if whole.endswith("\n") or not whole else whole + "\n").split("\n")[:-1]


def test_a_second_relay_goes_on_where_the_first_one_stopped():
    first: list[str] = []
    relay = LogRelay(first.append)
    relay.feed("one\ntwo\nhalf of thr")
    second: list[str] = []
    LogRelay(second.append, skip=relay.seen).finish("one\ntwo\nhalf of three\nfour")
    assert first + second == ["one", "two", "half of three", "four"]


def test_colours_cursor_moves_and_overwritten_progress_bars_disappear():
    shown: list[str] = []
    LogRelay(shown.append).feed("\x1b[36m(worker pid=7)\x1b[0m ready\x1b[K\n10%\r50%\r100%\n\x1b]0;title\x07plain\r\n")
    assert shown == ["(worker pid=7) ready", "100%", "plain"]


def test_a_long_line_is_cut_and_says_how_much_is_missing():
    shown: list[str] = []
    LogRelay(shown.append).feed("x" * (MAX_LINE + 25) + "\n")
    assert shown == ["x" * MAX_LINE + " … (25 more characters)"]


def test_progress_is_shown_at_an_interval_but_the_end_always():
    now, shown = [0.0], []
    relay = LogRelay(shown.append, progress_seconds=10, clock=lambda: now[0])
    for second, done in ((0, 10), (4, 20), (9, 30), (11, 40), (12, 120)):
        now[0] = second
        relay.feed(f"\x1b[2m(RayTrainWorker pid=12)\x1b[0m ATHANOR_PROGRESS {json.dumps({**PROGRESS, 'done': done})}\n")
    assert [line.split(" steps")[0] for line in shown] == ["sft 10/120", "sft 40/120", "sft 120/120"]


def test_progress_reads_like_a_sentence():
    line = readable_progress({**PROGRESS, "eta_seconds": 63, "loss": 4.21234})
    assert line == "sft 30/120 steps (25 %), 7800 tokens/s, 1 min 03 s left, loss 4.212"


def test_a_report_that_is_read_late_says_so_and_promises_nothing():
    """Such as those written while no triggerer ran, which all arrive at once."""
    line, shown = {**PROGRESS, "eta_seconds": 63, "at": 1000.0}, []
    assert readable_progress(line, now=1010.0) == "sft 30/120 steps (25 %), 7800 tokens/s, 1 min 03 s left"
    assert readable_progress(line, now=1040.0) == "sft 30/120 steps (25 %), 7800 tokens/s, 23 s left, reported 40 s ago"
    relay = LogRelay(shown.append, wall_clock=lambda: 1300.0)
    relay.feed(f"ATHANOR_PROGRESS {json.dumps(line)}\n")
    assert shown == ["sft 30/120 steps (25 %), 7800 tokens/s, reported 5 min 00 s ago"]


def test_progress_without_a_total_does_not_divide_by_zero():
    assert readable_progress({"done": 5, "total": 0, "unit": "document"}) == "progress 5/0 documents"


def test_a_broken_progress_line_is_shown_as_it_is():
    shown: list[str] = []
    LogRelay(shown.append).feed("ATHANOR_PROGRESS {broken\nATHANOR_PROGRESS [1]\n")
    assert shown == ["ATHANOR_PROGRESS {broken", "ATHANOR_PROGRESS [1]"]


def test_the_mlflow_run_is_told_once_and_not_shown():
    shown: list[str] = []
    runs: list[dict[str, str]] = []
    relay = LogRelay(shown.append, on_mlflow_run=runs.append)
    text = 'before\nATHANOR_MLFLOW_RUN {"run_id": "r1", "experiment_id": "4"}\nafter\n'
    relay.feed(text)
    relay.finish(text)
    assert runs == [{"run_id": "r1", "experiment_id": "4"}]
    assert relay.mlflow_run == runs[0]
    assert shown == ["before", "after"]


def test_a_flood_is_cut_counted_and_said_and_the_last_lines_of_a_job_are_shown():
    now, shown = [0.0], []
    relay = LogRelay(shown.append, lines_per_second=10, lines_at_once=20, clock=lambda: now[0])
    relay.feed("".join(f"{number}\n" for number in range(100)))
    assert shown == [str(number) for number in range(20)]
    assert (relay.seen, relay.settled) == (100, 20)
    now[0] = 1.0
    relay.feed("100\n")
    assert shown[20:] == [
        "… 80 lines are left out here: more than 10 a second. Ray's log of the job has them all.",
        "100",
    ]
    assert relay.settled == 101
    whole = "".join(f"{number}\n" for number in range(300))
    relay.finish(whole)
    assert shown[-40:] == [str(number) for number in range(260, 300)]
    left_out = sum(int(line.split()[1]) for line in shown if line.startswith("…"))
    assert left_out + sum(line.isdigit() for line in shown) == 300


def test_progress_is_shown_in_a_flood_too():
    shown: list[str] = []
    relay = LogRelay(shown.append, lines_per_second=1, lines_at_once=1, clock=lambda: 0.0)
    relay.feed(f"a\nb\nc\nATHANOR_PROGRESS {json.dumps(PROGRESS)}\n")
    assert [line.split(" steps")[0] for line in shown] == ["a", "sft 30/120"]


def test_a_relay_that_takes_over_in_a_flood_tells_of_the_lines_that_were_left_out_before():
    first: list[str] = []
    relay = LogRelay(first.append, lines_per_second=1, lines_at_once=2, clock=lambda: 0.0)
    relay.feed("".join(f"{number}\n" for number in range(50)))
    second: list[str] = []
    LogRelay(second.append, skip=relay.settled).finish("".join(f"{number}\n" for number in range(50)))
    assert first + second == [str(number) for number in range(50)]


def test_a_burst_is_what_was_shown_lately_beyond_the_steady_rate():
    now = 0.0
    relay = LogRelay(lambda line: None, lines_per_second=100, lines_at_once=2000, clock=lambda: now)
    assert relay.burst == 0
    relay.feed("line\n" * 500)
    assert relay.burst == 500
    now = 3.0
    assert relay.burst == 200
    now = 6.0
    assert relay.burst == 0
