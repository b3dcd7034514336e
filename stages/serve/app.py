"""The HTTP side: OpenAI's routes, the page, and who may use them."""

import asyncio
import hmac
import json
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web

from stages.serve.answer import Answer, Choice, Piece
from stages.serve.asking import Prompt, chat_choice, chat_prompt, completion_choice, completion_prompts
from stages.serve.engine import Engine, Worker
from stages.serve.protocol import ChatAsked, CompletionAsked, Kind, RequestError, parse_request
from stages.serve.replies import Reply, usage_of

logger = logging.getLogger(__name__)

_LARGEST_BODY = 8 << 20
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")
_PAGE = {
    "/": ("page.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
_HEADERS = {
    # Nothing from elsewhere, no frames, and no scripts but the page's own file.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class Access:
    """Who may use the server."""

    api_key: str = ""
    """Empty = everybody who reaches it."""
    loopback_only: bool = True
    """Whether requests must name this machine: otherwise a page elsewhere could reach a server on loopback through a
    name of its own (DNS rebinding)."""


class Server:
    """Routes over an engine."""

    def __init__(self, engine: Engine, *, access: Access, title: str = "", most_waiting: int = 256) -> None:
        self.engine, self._access, self._title, self._most_waiting = engine, access, title, most_waiting
        self._open: Counter[str] = Counter()
        """Answers that clients wait for, by model."""

    def app(self) -> web.Application:
        app = web.Application(client_max_size=_LARGEST_BODY, middlewares=[self._guarded])
        for route in _PAGE:
            app.router.add_get(route, self._page)
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/models/{name:.+}", self._model)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._completion)
        return app

    @web.middleware
    async def _guarded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Check who asks, and put every failure into OpenAI's form."""
        try:
            self._admit(request)
            return await handler(request)
        except RequestError as error:
            return _refused(error)
        except web.HTTPException as error:
            if error.status == 413:
                message = f"the body is larger than {_LARGEST_BODY} bytes"
            else:
                message = f"{request.method} {request.path}: {error.reason}"
            return _refused(RequestError(message, status=error.status))
        except (ConnectionError, asyncio.CancelledError):
            raise  # the client has gone
        except Exception:
            logger.exception("%s %s failed", request.method, request.path)
            message = "the server failed; its log says why"
            return _refused(RequestError(message, status=500, kind="server_error"))

    def _admit(self, request: web.Request) -> None:
        host = request.host.rpartition(":")[0] if request.host.rpartition(":")[2].isdigit() else request.host
        if self._access.loopback_only and host not in _LOOPBACK:
            raise RequestError(
                f"this server answers as 127.0.0.1 and localhost, not as {host!r}; --host opens it to others",
                status=403,
                kind="permission_error",
            )
        if not self._access.api_key or request.path in _PAGE or request.path == "/health":
            return
        given = request.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        # Headers may hold any bytes, which aiohttp keeps as surrogates.
        if not hmac.compare_digest(given.encode(errors="surrogateescape"), self._access.api_key.encode()):
            raise RequestError(
                "incorrect API key; send it as Authorization: Bearer <key>",
                status=401,
                kind="authentication_error",
                code="invalid_api_key",
            )

    async def _page(self, request: web.Request) -> web.StreamResponse:
        name, kind = _PAGE[request.path]
        text = (Path(__file__).parent / name).read_text(encoding="utf-8")
        return web.Response(text=text, content_type=kind, charset="utf-8", headers=_HEADERS)

    async def _health(self, _: web.Request) -> web.StreamResponse:
        # Without a key, so it tells neither names nor load.
        if not self.engine.is_running:
            message = "the thread that computes has ended; start the server again"
            raise RequestError(message, status=503, kind="server_error")
        return web.json_response({"status": "ok"})

    async def _models(self, _: web.Request) -> web.StreamResponse:
        data = [self._described(worker) for worker in self.engine.workers.values()]
        return web.json_response({"object": "list", "data": data, "title": self._title})

    async def _model(self, request: web.Request) -> web.StreamResponse:
        return web.json_response(self._described(self._worker(request.match_info["name"])))

    def _described(self, worker: Worker) -> dict[str, Any]:
        served = worker.served
        return {
            "id": served.name,
            "object": "model",
            "created": 0,
            "owned_by": "athanor",
            "max_model_len": served.context_length,
            "kind": served.kind or None,
            "digest": served.digest or None,
            "has_chat_template": served.has_own_template,
            "open_answers": self._open[served.name],
        }

    def _worker(self, name: str) -> Worker:
        workers = self.engine.workers
        found = workers.get(name) or next((one for one in workers.values() if one.served.address == name), None)
        if found is None:
            raise RequestError(
                f"there is no model {name[:200]!r}; this server has {', '.join(workers)}",
                status=404,
                param="model",
                code="model_not_found",
            )
        return found

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        asked = await _read(request, ChatAsked)
        worker = self._worker(asked.model)
        prompt = await self._on_engine(lambda: chat_prompt(worker.served, asked.messages))
        choice = chat_choice(worker.served, prompt, asked)
        return await self._respond(request, asked, worker, [(prompt, choice)], is_chat=True)

    async def _completion(self, request: web.Request) -> web.StreamResponse:
        asked = await _read(request, CompletionAsked)
        worker = self._worker(asked.model)
        prompts = await self._on_engine(lambda: completion_prompts(worker.served, asked))
        pairs = [(prompt, completion_choice(worker.served, prompt, asked)) for prompt in prompts]
        return await self._respond(request, asked, worker, pairs, is_chat=False)

    async def _on_engine(self, work: Callable[[], Any]) -> Any:
        """Where no model computes meanwhile: a template is rendered under a limit on the process's memory."""
        return await asyncio.wrap_future(self.engine.call(work))

    async def _respond(
        self,
        request: web.Request,
        asked: ChatAsked | CompletionAsked,
        worker: Worker,
        pairs: list[tuple[Prompt, Choice]],
        *,
        is_chat: bool,
    ) -> web.StreamResponse:
        name, wanted = worker.served.name, len(pairs) * asked.n
        waiting = self._open[name]
        if waiting and waiting + wanted > self._most_waiting:
            raise RequestError(
                f"{waiting} answers of {name} are being written or wait, of at most {self._most_waiting}; "
                "ask again later",
                status=429,
                kind="rate_limit_error",
                code="too_many_requests",
            )
        asking = _Asking(self.engine, worker, pairs, asked.n, Reply(worker.served, is_chat))
        self._open[name] += wanted
        try:
            asking.start()
            if asked.stream:
                return await _streamed(request, asking, with_usage=asked.stream_options.include_usage)
            return web.json_response(await asking.whole())
        finally:
            asking.cancel()
            self._open[name] -= wanted


class _Asking:
    """The answers of one request, and the queue through which the engine's thread sends their pieces."""

    def __init__(
        self, engine: Engine, worker: Worker, pairs: list[tuple[Prompt, Choice]], count: int, reply: Reply
    ) -> None:
        self._engine, self._worker, self._count, self.reply = engine, worker, count, reply
        self._pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        self.prompts = [prompt for prompt, _ in pairs for _ in range(count)]
        self.answers = [
            Answer(
                prompt.ids,
                choice,
                emit=self._sender(loop, place * count + number),
                tokenizer=worker.served.tokenizer.backend,
                number=place * count + number,
            )
            for place, (prompt, choice) in enumerate(pairs)
            for number in range(count)
        ]

    def _sender(self, loop: asyncio.AbstractEventLoop, index: int) -> Callable[[Piece], None]:
        def send(piece: Piece) -> None:
            try:
                loop.call_soon_threadsafe(self._pieces.put_nowait, (index, piece))
            except RuntimeError:  # the server has stopped, and nobody waits for the piece
                self.cancel()

        return send

    def start(self) -> None:
        for start in range(0, len(self.answers), self._count):
            together = self.answers[start : start + self._count]
            self._engine.call(lambda together=together: self._worker.add(together))

    def cancel(self) -> None:
        """Let the engine drop what nobody waits for."""
        for answer in self.answers:
            answer.cancelled = True

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Yield the pieces of all answers as they come; raises RequestError when the model fails."""
        left = len(self.answers)
        while left:
            index, piece = await self._pieces.get()
            if piece.error:
                raise RequestError(piece.error, status=500, kind="server_error")
            left -= piece.is_last
            yield index, piece

    async def whole(self) -> dict[str, Any]:
        pieces: list[list[Piece]] = [[] for _ in self.answers]
        async for index, piece in self.pieces():
            pieces[index].append(piece)
        choices = [
            self.reply.choice(index, pieces[index], prompt=self.echoed(index), answer=answer)
            for index, answer in enumerate(self.answers)
        ]
        return self.reply.whole(choices, self.usage())

    def echoed(self, index: int) -> str:
        return self.prompts[index].text if self.answers[index].choice.echo else ""

    def usage(self) -> dict[str, int]:
        prompt_tokens = sum(len(prompt.ids) for prompt in self.prompts[:: self._count])
        return usage_of(prompt_tokens, self.answers)


async def _streamed(request: web.Request, asking: _Asking, *, with_usage: bool) -> web.StreamResponse:
    """Send server-sent events, one for each piece; an error after the first one becomes an event too."""
    response = web.StreamResponse(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
    response.content_type, response.charset = "text/event-stream", "utf-8"
    await response.prepare(request)
    reply = asking.reply
    offsets: dict[int, int] = {}
    try:
        async for index, piece in asking.pieces():
            if index not in offsets:
                prompt = asking.echoed(index)
                offsets[index] = len(prompt)
                if first := reply.first_choice(index, prompt, asking.answers[index]):
                    await _send(response, reply.chunk([first]))
            await _send(response, reply.chunk([reply.piece_choice(index, piece, offset=offsets[index])]))
            offsets[index] += len(piece.text)
        if with_usage:
            await _send(response, reply.chunk([], asking.usage()))
    except RequestError as error:
        await _send(response, error.body())
    await response.write(b"data: [DONE]\n\n")
    await response.write_eof()
    return response


async def _send(response: web.StreamResponse, data: dict[str, Any]) -> None:
    await response.write(f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode())


async def _read(request: web.Request, kind: Kind) -> Any:
    # A page elsewhere can send other types without asking the browser first, but not this one.
    if request.content_type != "application/json":
        raise RequestError(
            f"Content-Type is {request.content_type!r}; send application/json",
            status=415,
            code="unsupported_media_type",
        )
    return parse_request(kind, await request.read())


def _refused(error: RequestError) -> web.Response:
    headers = {"Retry-After": "1"} if error.status == 429 else {}
    return web.json_response(error.body(), status=error.status, headers=headers)
