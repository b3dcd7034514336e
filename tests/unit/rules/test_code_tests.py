"""Code of responses and its tests: what passes, and what hostile code comes to."""

import gzip
import json
import os
import time
from pathlib import Path

import pytest

from stages.rules.code_tests import CodeLimits, can_confine, code_in, run_tests
from stages.rules.failed import RuleFailedError
from tests.places import REPOSITORY

HUMAN_EVAL = REPOSITORY.parent / "shared" / "data" / "eval" / "HumanEval.jsonl.gz"
SMALL = CodeLimits(cpu_seconds=1, memory_bytes=128 << 20)

pytestmark = pytest.mark.skipif(not can_confine(), reason="this machine cannot filter system calls")


def reasons(code: str, *tests: str) -> tuple[str, ...]:
    return run_tests(code, tests or ("assert True",), SMALL).reasons


def test_each_test_passes_or_fails_on_its_own() -> None:
    verdict = run_tests(
        "Here it is:\n```python\ndef add(a, b):\n    return a + b\n```\nDone.",
        ["assert add(1, 2) == 3", "assert add(1, 2) == 4", "add = None", "assert add(2, 2) == 4"],
        SMALL,
    )
    assert verdict.reasons == ("", "AssertionError", "", "")
    assert verdict.share == 0.75


def test_the_last_block_of_python_is_the_code() -> None:
    assert code_in("x = 1") == "x = 1"
    assert code_in("```py\na\n```\n```bash\nls\n```\n```\nb\n```") == "b"
    assert code_in("```bash\nls\n```") == ""
    assert code_in("```python\ncut off") == "cut off"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("def f(:", "SyntaxError"),
        ("raise KeyError", "KeyError"),
        ("import sys\nsys.exit(0)", "SystemExit"),
        ("import os\nos._exit(0)", "ended_early"),
        ("import ctypes\nctypes.string_at(0)", "ended_early"),
        ("def f(): f()\nf()", "RecursionError"),
        ("memory = bytearray(10**9)", "MemoryError"),
        ("import os\nwhile True:\n    os.fork()", "PermissionError"),
        ("import subprocess\nsubprocess.run(['true'])", "PermissionError"),
        ("import threading\nthreading.Thread(target=print).start()", "RuntimeError"),
        ("import socket\nsocket.socket()", "PermissionError"),
        ("open('here', 'w')", "PermissionError"),
        ("import os\nos.kill(os.getppid(), 9)", "PermissionError"),
        ("import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))", "ValueError"),
        ("import os\nassert not os.environ.keys() - {'OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'LC_CTYPE', "
         "'PYTHONHASHSEED'}", ""),
    ],
)  # fmt: skip
def test_hostile_code_fails_its_tests_and_does_nothing_else(code: str, reason: str) -> None:
    assert reasons(code) == (reason,)


def test_no_file_is_removed_or_changed(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("as it was")
    for call in (
        "os.remove(path)",
        "os.rename(path, path + 'x')",
        "os.truncate(path, 0)",
        "os.chmod(path, 0)",
        "open(path, 'r+')",
        "os.symlink(path, path + 'x')",
        "os.mkdir(path + 'x')",
    ):
        assert reasons(f"import os\npath = {str(kept)!r}\n{call}") == ("PermissionError",), call
    assert kept.read_text() == "as it was"
    assert kept.stat().st_mode & 0o777
    assert os.listdir(tmp_path) == ["kept"]


def test_code_that_never_ends_is_ended_and_what_passed_before_counts() -> None:
    started = time.monotonic()
    assert reasons("def f(x):\n    return x", "assert f(1) == 1", "while True: pass", "assert f(2) == 2") == (
        "",
        "took_too_long",
        "took_too_long",
    )
    assert time.monotonic() - started < 60


def test_code_that_waits_or_ignores_its_limit_is_ended() -> None:
    assert reasons("import time\ntime.sleep(600)") == ("took_too_long",)
    assert reasons("import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass") == (
        "took_too_long",
    )


def test_output_and_forged_verdicts_do_not_count() -> None:
    flood = "import os\nprint('x' * 10**7)\nfor number in range(3, 64):\n    try:\n        os.write(number, {!r})\n"
    flood += "    except OSError:\n        pass"
    forged = flood.format(b'["", 0, ""]\n' * 1000)
    assert reasons(forged, "assert False") == ("AssertionError",)
    assert reasons(f"{forged}\nos._exit(0)", "assert False") == ("ended_early",)


def test_without_tests_there_is_no_value() -> None:
    with pytest.raises(RuleFailedError, match="no_tests"):
        run_tests("x = 1", [], SMALL)


@pytest.mark.skipif(not HUMAN_EVAL.is_file(), reason="the shared data is not here")
def test_solutions_of_human_eval_pass_their_tests_and_empty_ones_do_not() -> None:
    rows = [json.loads(line) for line in gzip.decompress(HUMAN_EVAL.read_bytes()).splitlines()]
    for row in rows[::41]:
        tests = [row["test"] + f"\ncheck({row['entry_point']})"]
        assert run_tests(row["prompt"] + row["canonical_solution"], tests, SMALL).share == 1, row["task_id"]
        assert run_tests(row["prompt"] + "    pass", tests, SMALL).share == 0, row["task_id"]
