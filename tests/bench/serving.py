"""`python -m tests.bench.serving MODEL...`: time to the first token, and tokens a second, of `make serve` here.

A server of its own is started for each model, and asked over HTTP as clients do: alone, then by several at once.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import httpx

_PROMPT = "What does the function sorted do, and when is it better?"
_WAIT_SECONDS = 600


@dataclass(frozen=True)
class Timed:
    """One answer: seconds until its first text, and tokens a second after that."""

    first_seconds: float
    tokens: int
    seconds: float

    @property
    def rate(self) -> float:
        return (self.tokens - 1) / (self.seconds - self.first_seconds)


@contextmanager
def server(model: str) -> Iterator[str]:
    command = [sys.executable, "-m", "stages.serve", f"model={model}", "--backend", "own"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        told = "".join(iter(process.stdout.readline, "stop with ctrl-c\n"))
        found = re.search(r"page  (http://\S+)/\n", told)
        assert found is not None, told
        yield found[1]
    finally:
        process.terminate()
        process.wait(30)


def ask(url: str, *, tokens: int, seed: int) -> Timed:
    """Stream a completion that is as long as allowed, unless the model ends it."""
    body = {"model": "model", "prompt": _PROMPT, "max_tokens": tokens, "seed": seed, "stream": True}
    begin, first, usage = time.perf_counter(), 0.0, {}
    request = {**body, "stream_options": {"include_usage": True}}
    with httpx.stream("POST", f"{url}/v1/completions", json=request, timeout=_WAIT_SECONDS) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            usage = event.get("usage", usage)
            first = first or time.perf_counter() - begin
    return Timed(first, usage["completion_tokens"], time.perf_counter() - begin)


def measure(url: str, *, tokens: int, clients: int, rounds: int) -> str:
    ask(url, tokens=2, seed=0)  # memory is allocated, kernels are chosen
    alone = [one for seed in range(rounds) if (one := ask(url, tokens=tokens, seed=seed)).tokens > tokens // 2]
    begin = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        together = list(pool.map(lambda seed: ask(url, tokens=tokens, seed=seed), range(clients)))
    seconds = time.perf_counter() - begin
    first = statistics.median(one.first_seconds for one in alone)
    rate = statistics.median(one.rate for one in alone)
    last = max(one.first_seconds for one in together)
    total = sum(one.tokens for one in together) / seconds
    return (
        f"first token {first * 1000:.0f} ms, {rate:.0f} tokens/s; {clients} clients at once: all have begun after "
        f"{last * 1000:.0f} ms, {total:.0f} tokens/s together"
    )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.serving", description=__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer; also limits the context that is needed")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    for model in options.models:
        with server(model) as url:
            found = measure(url, tokens=options.tokens, clients=options.clients, rounds=options.rounds)
        print(f"{model}: {found} (load {os.getloadavg()[0]:.1f}, nice {os.nice(0)})", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
