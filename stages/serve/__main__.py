"""`python -m stages.serve`: models behind OpenAI's API, and a page that asks all of them the same question."""

import argparse
import asyncio
import contextlib
import json
import logging
import os
import shlex
import signal
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from stages.config.errors import ConfigError, StageError
from stages.config.text import compact, duration, printable
from stages.serve.address import Address, parse_addresses
from stages.serve.vllm import (
    LOOPBACK,
    Listening,
    choose_vllm,
    run_program,
    vllm_command,
    vllm_environment,
    vllm_program,
)

if TYPE_CHECKING:
    from stages.serve.app import Server
    from stages.serve.loading import ServedModel

logger = logging.getLogger("stages.serve")

API_KEY = "ATHANOR_API_KEY"
_PORT = 8000
_PORTS_TRIED = 20
_EXAMPLES = f"""examples:
  python -m stages.serve models:/athanor-aligned@champion
  python -m stages.serve --run manual__2026-01-31T12:00:00+00:00
  python -m stages.serve before=models:/athanor-sft/3 after=models:/athanor-aligned/5 --port 9000
  {API_KEY}=... python -m stages.serve ./my-model --host 0.0.0.0

environment:
  {API_KEY:<16} clients must send this key; needed with a --host that others can reach
  ARTIFACT_STORE   where --run looks; MLFLOW_TRACKING_URI: where models:/ looks
"""


def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    try:
        return serve(options)
    except StageError as error:
        sys.stderr.write(printable(f"error: {error.message}\n{error.advice}\n"))
        return 2
    except OSError as error:
        sys.stderr.write(printable(f"error: {error}\n"))
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m stages.serve",
        description="Serve models behind OpenAI's API, with a page to ask them.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "models",
        nargs="*",
        metavar="[NAME=]MODEL",
        help="models:/name@alias, models:/name/version, an artifact, a Hugging Face folder or hub id, a GGUF file; "
        "NAME is what clients call it",
    )
    parser.add_argument("--run", default="", metavar="RUN", help="all models of a run: its run id, or its run name")
    parser.add_argument("--host", default=LOOPBACK[0], help="address to listen on; other machines only with a key")
    parser.add_argument(
        "--port", type=int, default=0, help=f"default: {_PORT}, or the next free one; fails when a given one is taken"
    )
    parser.add_argument(
        "--backend", default="auto", help="auto, own or vllm; auto is vllm for one model on loopback, where it runs"
    )
    parser.add_argument("--dtype", default="auto", help="format of the weights: auto, float32, bfloat16, float16")
    parser.add_argument("--context", type=int, default=0, metavar="TOKENS", help="limit prompt and answer together")
    parser.add_argument("--threads", type=int, default=0, help="default: one a core; one in all for small models")
    parser.add_argument("--max-batch", type=int, default=16, help="answers that one model writes at the same time")
    return parser


def serve(options: argparse.Namespace) -> int:
    """Find and load the models, serve them until a signal comes."""
    listening = _listening(options)
    _check_numbers(options)
    addresses = _addresses(options)
    with _cache() as cache:
        import torch  # what can be refused without is refused within a second

        program = vllm_program() if options.backend in ("auto", "vllm") else ""
        has_gpu = torch.cuda.is_available()
        if choose_vllm(options.backend, addresses, has_gpu=has_gpu, program=program, host=listening.host):
            return _run_vllm(program, addresses[0], cache, listening, options)
        return _run_own(addresses, cache, listening, options)


def _listening(options: argparse.Namespace) -> Listening:
    key = os.environ.get(API_KEY, "")
    if options.host not in LOOPBACK and not key:
        raise ConfigError(
            f"--host={options.host} opens the server to other machines, and there is no key",
            advice=f"Set {API_KEY} to a secret that clients send as their API key, or leave --host out.",
        )
    if not 0 <= options.port <= 65535:
        raise ConfigError(f"--port={options.port} is no port; allowed: 1 to 65535", advice="Leave it out.")
    return Listening(options.host, options.port, key)


def _check_numbers(options: argparse.Namespace) -> None:
    if options.max_batch < 1:
        raise ConfigError(f"--max-batch={options.max_batch}; allowed: at least 1", advice="Leave it out for 16.")
    if options.threads < 0:
        raise ConfigError(
            f"--threads={options.threads}; allowed: at least 1", advice="Leave it out for as many as fit."
        )
    if options.context < 0:
        raise ConfigError(f"--context={options.context}; allowed: at least 1", advice="Leave it out for all there is.")


def _addresses(options: argparse.Namespace) -> list[Address]:
    addresses = parse_addresses(options.models)
    if options.run:
        from stages.artifacts.addresses import open_default_store
        from stages.serve.run_models import models_of_run

        of_run = models_of_run(open_default_store(), options.run.strip())
        taken = {address.name for address in addresses}
        if both := [address.name for address in of_run if address.name in taken]:
            raise ConfigError(
                f"{both[0]!r} is a model of the run and of those given", advice=f"Call the other one x{both[0]}=..."
            )
        addresses = [*of_run, *addresses]
    if not addresses:
        raise ConfigError(
            "no model was named",
            advice="Name one, or a run: make serve MODEL=models:/athanor-aligned@champion, make serve RUN=<run id>.",
        )
    return addresses


@contextlib.contextmanager
def _cache() -> Iterator[Path]:
    """A place for downloads; they stay for the next server."""
    from stages.job.scratch import scratch_folder

    with scratch_folder() as folder:
        yield folder.parent / "cache"


def _run_vllm(program: str, address: Address, cache: Path, listening: Listening, options: argparse.Namespace) -> int:
    from stages.serve.loading import model_files

    given_key = listening.api_key
    listening = replace(listening, port=listening.port or _PORT).with_key()
    folder = model_files(address, cache).folder
    command = vllm_command(
        program, address, folder, listening=listening, dtype=options.dtype, context_length=options.context
    )
    logger.info("vLLM serves %s: %s", printable(address.name), printable(" ".join(command)))
    key = f"${API_KEY}" if given_key else listening.api_key
    _say(
        _curl(_url(listening.host, listening.port), address.name, key)
        + f"vLLM says below when it answers; the key is {f'that of {API_KEY}' if given_key else 'new each time'}\n"
    )
    # Not exec: files in the scratch folder are locked as long as this process lives.
    return run_program(command, vllm_environment(listening))


def _run_own(addresses: list[Address], cache: Path, listening: Listening, options: argparse.Namespace) -> int:
    from stages.serve.app import Access, Server
    from stages.serve.devices import serving_device, serving_dtype, use_threads
    from stages.serve.engine import Engine, Worker
    from stages.serve.loading import load_model, model_files

    port = _bound(listening)
    device = serving_device()
    dtype = serving_dtype(options.dtype, device)
    workers = []
    for address in addresses:
        begin = time.monotonic()
        files = model_files(address, cache)
        served = load_model(address, files, device=device, dtype=dtype, context_length=options.context)
        size = compact(_size(served))
        logger.info(
            "%s: %s parameters, %s on %s, context %d, loaded in %s",
            printable(served.name), size, str(dtype).removeprefix("torch."), device, served.context_length,
            duration(time.monotonic() - begin),
        )  # fmt: skip
        if not served.has_own_template:
            logger.info("%s has no chat template; chats are plain text with `User:` and `Assistant:`", served.name)
        workers.append(Worker(served, max_batch=options.max_batch))
    largest = max(_size(worker.served) for worker in workers)
    if (threads := use_threads(largest, options.threads)) > 1 and device.type == "cpu":
        logger.info("%d threads", threads)
    access = Access(listening.api_key, loopback_only=listening.is_loopback)
    server = Server(Engine(workers), access=access, title=options.run)
    return asyncio.run(_until_stopped(server, port, addresses[0].name, listening))


def _size(served: "ServedModel") -> int:
    return sum(weight.numel() for weight in served.model.parameters())


def _bound(listening: Listening) -> socket.socket:
    """A socket that listens, made before models are loaded: a taken port is an error at once."""
    family = socket.AF_INET6 if ":" in listening.host else socket.AF_INET
    ports = [listening.port] if listening.port else range(_PORT, _PORT + _PORTS_TRIED)
    for port in ports:
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind((listening.host, port))
            # At once: SO_REUSEADDR lets a second server bind the port of one that does not listen yet.
            bound.listen(128)
            return bound
        except OSError as error:
            bound.close()
            reason = error
    raise ConfigError(
        f"--port: {listening.host} port {ports[0]} cannot be listened on: {reason.strerror}",
        advice="Give another --port, or stop what listens there.",
    )


async def _until_stopped(server: "Server", bound: socket.socket, model: str, listening: Listening) -> int:
    from aiohttp import web

    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    # A client that goes away cancels the handler, and so the answer that it no longer waits for.
    runner = web.AppRunner(server.app(), handler_cancellation=True, access_log=None, shutdown_timeout=1.0)
    server.engine.start()
    try:
        await runner.setup()
        await web.SockSite(runner, bound).start()
        _say_where(bound, model, listening)
        await stopped.wait()
    finally:
        # First the answers, which end their handlers, and then the server.
        await asyncio.to_thread(server.engine.stop)
        await runner.cleanup()
    return 0


def _say_where(bound: socket.socket, model: str, listening: Listening) -> None:
    url = _url(*bound.getsockname()[:2])
    key = f"${API_KEY}" if listening.api_key else ""
    _say(f"\npage  {url}/\n{_curl(url, model, key)}stop with ctrl-c\n")


def _url(host: str, port: int) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _curl(url: str, model: str, key: str) -> str:
    """Where the API is, and a line to copy."""
    sent = f' -H "Authorization: Bearer {key}"' if key else ""
    asked = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello"}]})
    return (
        f"API   {url}/v1   (OpenAI's; model {model!r})\n"
        f"      curl {url}/v1/chat/completions{sent} -H 'Content-Type: application/json' \\\n"
        f"        -d {shlex.quote(asked)}\n"
    )


def _say(text: str) -> None:
    sys.stdout.write(printable(text))
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
