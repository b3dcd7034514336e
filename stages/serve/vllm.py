"""vLLM instead of our own server, where it can run: one model, a GPU, and the program on this machine.

It reads the same folders and has the same API, with paged attention and its own kernels. It wants other versions of
libraries than ours, so it lives in an environment of its own and is started as a program.
"""

import os
import secrets
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stages.config.errors import ConfigError
from stages.serve.address import Address

PROGRAM = "ATHANOR_VLLM"
"""Environment variable: where the program `vllm` is; empty = the one on PATH."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Listening:
    """Where a server listens, and for whom."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str = ""

    @property
    def is_loopback(self) -> bool:
        return self.host in LOOPBACK

    def with_key(self) -> "Listening":
        """The same with a random key where there is none."""
        return self if self.api_key else replace(self, api_key=secrets.token_urlsafe(24))


def vllm_program(environment: Mapping[str, str] = os.environ) -> str:
    """The program, or empty when there is none."""
    named = environment.get(PROGRAM, "")
    if named and not (Path(named).is_file() and os.access(named, os.X_OK)):
        raise ConfigError(
            f"{PROGRAM}={named!r} is no program", advice="Set it to vLLM's program, such as /opt/vllm/bin/vllm."
        )
    return named or shutil.which("vllm", path=environment.get("PATH")) or ""


def vllm_command(
    program: str, address: Address, folder: Path, *, listening: Listening, dtype: str, context_length: int = 0
) -> list[str]:
    """The command that serves a model's folder under its name. The API key travels in the environment, because every
    user of the machine can see a command."""
    command = [
        program,
        "serve",
        str(folder),
        "--served-model-name",
        address.name,
        "--host",
        listening.host,
        "--port",
        str(listening.port),
        "--dtype",
        dtype,
        "--generation-config",
        "vllm",  # temperature 1 unless the client says otherwise, as in our own server
        "--allowed-origins",
        "[]",  # its default lets every web page that a browser on this machine has open read the answers
    ]
    return [*command, "--max-model-len", str(context_length)] if context_length else command


def vllm_environment(listening: Listening, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Offline, because the folder is complete; with the key that clients must send."""
    ours = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    # our Python's settings must not reach into vLLM's own environment
    kept = {name: value for name, value in environment.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return {**kept, **ours, **({"VLLM_API_KEY": listening.api_key} if listening.api_key else {})}


def run_program(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a server until it ends, and return its exit status; it gets every signal that asks it to end, and the time
    that it needs for that."""
    earlier = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # The terminal sends ctrl-c to the program, too. A handler and not SIG_IGN, which the program would inherit.
    signal.signal(signal.SIGINT, lambda *_: None)
    started: list[subprocess.Popen[bytes]] = []
    asked_to_end: list[int] = []

    def end(number: int, _frame: Any) -> None:
        asked_to_end.append(number)
        for process in started:
            process.terminate()

    signal.signal(signal.SIGTERM, end)
    try:
        started.append(subprocess.Popen(command, env=environment))
        if asked_to_end:  # before there was anything to end
            started[0].terminate()
        status = started[0].wait()
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
    return status if status >= 0 else 128 - status  # as a shell spells the signal that ended it


def choose_vllm(
    backend: str, addresses: Sequence[Address], *, has_gpu: bool, program: str, host: str = LOOPBACK[0]
) -> bool:
    """Whether vLLM serves; raises ConfigError when it was asked for and cannot."""
    can = len(addresses) == 1 and has_gpu and program and host in LOOPBACK
    if backend == "own" or (backend == "auto" and not can):
        return False
    if backend not in ("auto", "vllm"):
        raise ConfigError(
            f"--backend={backend!r} is unknown; allowed: auto, own, vllm", advice="Leave it out for auto."
        )
    if len(addresses) > 1:
        raise ConfigError(
            f"--backend=vllm serves one model, and {len(addresses)} were given",
            advice="Start one server for each model on its own --port, or leave --backend out.",
        )
    if host not in LOOPBACK:
        raise ConfigError(
            f"--backend=vllm with --host={host}: vLLM's key guards /v1 alone, and not /invocations, /tokenize and "
            "others, which answer everyone who reaches the port; allowed: loopback",
            advice="Leave --host out and put a proxy in front that lets /v1 alone through, or use --backend own.",
        )
    if not program:
        raise ConfigError(
            "--backend=vllm: there is no program `vllm` on PATH",
            advice=f"Install vLLM in an environment of its own and set {PROGRAM}=<that environment>/bin/vllm.",
        )
    if not has_gpu:
        raise ConfigError(
            "--backend=vllm: torch sees no GPU on this machine",
            advice="Leave --backend out; our own server uses the CPU.",
        )
    return True
