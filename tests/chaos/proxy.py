"""A TCP proxy before a server. The line can be cut or slow; before the Ray head it loses the answers of POSTs or closes
the log's websocket; before an object store it holds one request, so that a fault can strike in the middle of it."""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
from dataclasses import dataclass, field
from types import TracebackType

_SUBMISSION = b"POST /api/jobs/ HTTP"
_LOG = b"/logs/tail"


@dataclass
class Held:
    """Until `go`, or until the line is cut, requests whose first line has `pattern` stop after `after_bytes`."""

    pattern: re.Pattern[bytes]
    after_bytes: int
    reached: threading.Event = field(default_factory=threading.Event)
    go: threading.Event = field(default_factory=threading.Event)
    breaks: bool = False
    "Then the connection is closed, and the request not served."

    def release(self, *, breaks: bool = False) -> None:
        self.breaks = breaks
        self.go.set()


class Proxy:
    """Runs in a thread of its own; the test sets the misbehaviour at any time."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self.down = False
        "Connections are closed at once, those that exist too."
        self.lose_answers = 0
        "So many submissions are carried out, and their connection is closed instead of an answer."
        self.may_lose = threading.Event()
        "The connection is held until then."
        self.may_lose.set()
        self.close_logs_after: float | None = None
        "Seconds after which each log connection is closed."
        self.closed_logs = 0
        self.delay_seconds = 0.0
        "Before each request and each answer passes."
        self.bytes_per_second = float("inf")
        "Of each connection, in each direction."
        self._held: list[Held] = []
        self._writers: set[asyncio.StreamWriter] = set()
        self._ready = threading.Event()

    def __enter__(self) -> Proxy:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        if not self._ready.wait(10):
            raise RuntimeError("the proxy did not start")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    def cut(self) -> None:
        self.down = True
        self._loop.call_soon_threadsafe(self._close_all)

    def mend(self) -> None:
        self.down = False

    def hold(self, pattern: str, *, after_bytes: int = 0) -> Held:
        """Lie in wait for requests such as `PUT /bucket/key`."""
        held = Held(re.compile(pattern.encode()), after_bytes)
        self._held.append(held)
        return held

    def _close_all(self) -> None:
        for writer in list(self._writers):
            writer.close()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._main())

    async def _main(self) -> None:
        self._stop = asyncio.Event()
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        self._close_all()
        await asyncio.sleep(0.1)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.down:
            writer.close()
            return
        upstream_reader, upstream_writer = await asyncio.open_connection(*self._target)
        self._writers |= {writer, upstream_writer}
        answers = asyncio.create_task(self._copy(upstream_reader, writer))
        held: Held | None = None
        passed = 0
        try:
            while data := await reader.read(65536):
                if held is None and (held := self._caught(data)):
                    passed = 0
                passed += len(data)
                if held and passed > held.after_bytes:
                    if await self._breaks(held):
                        break
                    held = None
                await self._take_time(data)
                upstream_writer.write(data)
                await upstream_writer.drain()
                if data.startswith(_SUBMISSION) and self.lose_answers:
                    self.lose_answers -= 1
                    answers.cancel()
                    await asyncio.sleep(0.5)
                    while not self.may_lose.is_set():
                        await asyncio.sleep(0.1)
                    break
                if _LOG in data[:300] and self.close_logs_after is not None:
                    await asyncio.sleep(self.close_logs_after)
                    self.closed_logs += 1
                    break
        except OSError:
            pass  # one side is gone, and so is the connection
        finally:
            answers.cancel()
            for end in (writer, upstream_writer):
                end.close()
                self._writers.discard(end)

    def _caught(self, data: bytes) -> Held | None:
        line = data[:2000].partition(b"\r\n")[0]
        return next((held for held in self._held if not held.go.is_set() and held.pattern.search(line)), None)

    async def _breaks(self, held: Held) -> bool:
        held.reached.set()
        while not held.go.is_set():
            if self.down:
                return True
            await asyncio.sleep(0.05)
        return held.breaks

    async def _take_time(self, data: bytes) -> None:
        begins = b"HTTP/1." in data[:2000].partition(b"\r\n")[0]
        if seconds := self.delay_seconds * begins + len(data) / self.bytes_per_second:
            await asyncio.sleep(seconds)

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                await self._take_time(data)
                writer.write(data)
                await writer.drain()
        writer.close()
