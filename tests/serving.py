"""A real server over models of this process, on a free port of loopback."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from aiohttp import web

from stages.serve.app import Access, Server
from stages.serve.engine import Engine, Worker
from stages.serve.loading import ServedModel


@contextmanager
def serving(
    models: Sequence[ServedModel], *, access: Access | None = None, most_waiting: int = 256, max_batch: int = 8
) -> Iterator[str]:
    """URL of a server that ends with the context."""
    engine = Engine([Worker(served, max_batch=max_batch) for served in models])
    server = Server(engine, access=access or Access(), title="a run", most_waiting=most_waiting)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    runner = web.AppRunner(server.app(), handler_cancellation=True, access_log=None, shutdown_timeout=1.0)
    engine.start()

    async def start() -> int:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return runner.addresses[0][1]

    try:
        port = asyncio.run_coroutine_threadsafe(start(), loop).result(30)
        yield f"http://127.0.0.1:{port}"
    finally:
        engine.stop()
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
