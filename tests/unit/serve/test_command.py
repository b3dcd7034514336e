"""The programs as they are started: what is refused within a second, and a server and a chat from start to end."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from stages.config.errors import ConfigError
from stages.config.graph import Stage
from stages.serve import __main__ as command
from stages.serve import chat
from stages.serve.vllm import Listening
from tests.places import REPOSITORY
from tests.unit.serve.conftest import House


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no model was named\nName one, or a run: make serve MODEL=models:/athanor-aligned@champion"),
        (["x", "--host", "0.0.0.0"], "--host=0.0.0.0 opens the server to other machines, and there is no key"),
        (["x", "--port", "70000"], "--port=70000 is no port"),
        (["x", "--max-batch", "0"], "--max-batch=0; allowed: at least 1"),
        (["x", "--context", "-1"], "--context=-1; allowed: at least 1"),
        (["/a/x", "/b/x"], "two models would be called 'x'"),
        (["--run", "x"], "ARTIFACT_STORE='' is not a store"),
        (["x", "--backend", "tgi"], "--backend='tgi' is unknown; allowed: auto, own, vllm"),
        (["x", "--dtype", "int8"], "--dtype='int8' is no number format; allowed: auto, float32"),
        (["/nowhere/x"], "model='/nowhere/x' does not exist"),
    ],
)
def test_what_cannot_be_served_is_said_before_anything_is_loaded(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    for name in ("ATHANOR_API_KEY", "ARTIFACT_STORE", "ATHANOR_VLLM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ATHANOR_SCRATCH", str(tmp_path))
    assert command.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_port_that_is_taken_is_an_error_when_it_was_asked_for(
    house: House, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ATHANOR_SCRATCH", str(tmp_path))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert command.main([house.uri(Stage.SFT), "--port", str(port)]) == 2
    assert f"--port: 127.0.0.1 port {port} cannot be listened on: Address already in use" in capsys.readouterr().err


def test_a_port_is_taken_before_the_models_are_loaded() -> None:
    """Two servers that start at the same time: the second one is told at once, and not when its models are loaded."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        listening = Listening(port=free.getsockname()[1])
    with command._bound(listening), pytest.raises(ConfigError, match="cannot be listened on: Address already in use"):
        command._bound(listening)


def test_a_chat_without_a_model_says_what_to_give(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("ATHANOR_SCRATCH", str(tmp_path))
    assert chat.main(["/nowhere/x"]) == 2
    assert "model='/nowhere/x' does not exist\nGive models:/<name>@<alias>" in capsys.readouterr().err
    assert chat.main(["x", "--temperature", "9"]) == 2
    assert "temperature=9.0; allowed: 0 to 2" in capsys.readouterr().err


@contextmanager
def started(arguments: list[str], scratch: Path, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`python -m stages.serve` and the address that it prints."""
    process = subprocess.Popen(
        [sys.executable, "-m", "stages.serve", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "ATHANOR_SCRATCH": str(scratch), **environment},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        told = "".join(iter(process.stdout.readline, "stop with ctrl-c\n"))
        found = re.search(r"page  (http://\S+)/\n", told)
        assert found is not None, told
        yield process, found[1]
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_run_is_served_by_its_id_and_ends_on_a_signal(house: House, tmp_path: Path) -> None:
    folder = house.home / "store" / "runs" / "weekly-run"
    for stage in (Stage.PRETRAIN, Stage.SFT):
        (folder / stage).mkdir(parents=True, exist_ok=True)
        result = {"stage": stage.value, "hit": False, "artifact": house.made[stage].model_dump()}
        (folder / stage / "result.json").write_text(json.dumps(result))
    (folder / "pipeline.json").write_text(json.dumps({"run_name": "weekly", "base_model": ""}))
    with started(["--run", "weekly"], tmp_path, ARTIFACT_STORE=house.store.root_uri) as (process, url):
        found = httpx.get(f"{url}/v1/models").json()
        assert [model["id"] for model in found["data"]] == ["base", "sft"]
        body = {"model": "sft", "messages": [{"role": "user", "content": "sort?"}], "max_tokens": 4}
        assert httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def stand_in(folder: Path, text: str) -> Path:
    """A program in place of vLLM."""
    program = folder / "vllm"
    program.write_text(f"#!/bin/sh\n{text}")
    program.chmod(0o755)
    return program


def test_vllm_is_started_with_a_new_key_that_the_line_to_copy_has(
    house: House, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = stand_in(tmp_path, 'printf %s "$VLLM_API_KEY" >"$(dirname "$0")/key"\nexit 7\n')
    monkeypatch.delenv("ATHANOR_API_KEY", raising=False)
    monkeypatch.setenv("ATHANOR_SCRATCH", str(tmp_path))
    monkeypatch.setenv("ATHANOR_VLLM", str(program))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert command.main([f"sft={house.uri(Stage.SFT)}", "--port", "9000"]) == 7
    key = (tmp_path / "key").read_text()
    assert len(key) >= 32
    told = capsys.readouterr().out
    assert f'curl http://127.0.0.1:9000/v1/chat/completions -H "Authorization: Bearer {key}"' in told
    monkeypatch.setenv("ATHANOR_API_KEY", "sesame")
    assert command.main([f"sft={house.uri(Stage.SFT)}"]) == 7
    assert (tmp_path / "key").read_text() == "sesame"
    told = capsys.readouterr().out
    assert "Bearer $ATHANOR_API_KEY" in told
    assert "sesame" not in told


@pytest.mark.parametrize(
    ("number", "ended"), [(signal.SIGINT, ("interrupted\n", 3)), (signal.SIGTERM, ("terminated\n", 4))]
)
def test_a_signal_ends_vllm_first_and_gives_it_the_time_it_needs(
    tmp_path: Path, number: signal.Signals, ended: tuple[str, int]
) -> None:
    """Ctrl-c reaches all processes of the terminal, a supervisor's SIGTERM ours alone."""
    program = stand_in(
        tmp_path,
        "trap 'sleep 1; echo interrupted; exit 3' INT\ntrap 'sleep 1; echo terminated; exit 4' TERM\n"
        "echo ready\nwhile :; do sleep 0.1; done\n",
    )
    code = "import os, sys; from stages.serve.vllm import run_program; sys.exit(run_program(sys.argv[1:], os.environ))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(program)],
        cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        if number is signal.SIGINT:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        rest, _ = process.communicate(timeout=30)
        assert (rest, process.returncode) == ended
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_a_chat_reads_lines_from_a_pipe(house: House, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "stages.serve.chat", house.uri(Stage.SFT), "--temperature", "0", "--length", "5"],
        cwd=REPOSITORY,
        env={**os.environ, "ATHANOR_SCRATCH": str(tmp_path)},
        input="sort?\n/temperature\n/exit\n",
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "(cut at 5 tokens; /length allows more)\n" in done.stdout
    assert "(/temperature '' is no number Write /temperature NUMBER.)\n" in done.stdout
