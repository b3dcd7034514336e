"""vLLM instead of our own server, where it can run: one model, a GPU, and the program on this machine.

It reads the same folders and has the same API, with paged attention and its own kernels. It wants other versions of
libraries than ours, so it lives in an environment of its own and is started as a program.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stages.config.errors import ConfigError
from stages.serve.address import Address

PROGRAM = "ATHANOR_VLLM"
"""Environment variable: where the program `vllm` is; empty = the one on PATH."""


@dataclass(frozen=True)
class Listening:
    """Where a server listens, and for whom."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str = ""


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
    ]
    return [*command, "--max-model-len", str(context_length)] if context_length else command


def vllm_environment(listening: Listening, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Offline, because the folder is complete; with the key where there is one."""
    ours = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    # our Python's settings must not reach into vLLM's own environment
    kept = {name: value for name, value in environment.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return {**kept, **ours, **({"VLLM_API_KEY": listening.api_key} if listening.api_key else {})}


def choose_vllm(backend: str, addresses: Sequence[Address], *, has_gpu: bool, program: str) -> bool:
    """Whether vLLM serves; raises ConfigError when it was asked for and cannot."""
    if backend == "own" or (backend == "auto" and (len(addresses) > 1 or not has_gpu or not program)):
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
