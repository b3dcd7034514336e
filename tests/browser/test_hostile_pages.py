"""Pages that are full of hostile texts, in a real browser: nothing runs, nothing is fetched, and all of it can be read.

The pages are opened twice: with a policy that forbids everything, where an attempt counts as a fault, and without, so
that the policy does not cover up for the escaping. Markdown is rendered by a reader that obeys all it finds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from markdown_it import MarkdownIt

from stages.config.text import one_line, printable
from stages.lineage.views import to_markdown, to_svg
from stages.reporting.page import render_page
from tests.browser.hostile import HTML, MARKDOWN, OUTSIDE, PLAIN, POLICY, TEXTS, Served, Watch, serve, watch
from tests.browser.hostile_records import approval_bodies, hostile_graph, hostile_story, plan_page, rating_bodies
from tests.browser.pages import open_browser

if TYPE_CHECKING:
    from playwright.sync_api import Browser  # pyright: ignore[reportMissingImports]

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(900)]

WAIT_FOR_A_PERSON = {
    "form that asks for a password",
    "link that runs",
    "link that runs, written in entities",
    "link to a data address",
    "style with an expression",  # ran in browsers of twenty years ago
    "Markdown link that runs",
    "Markdown link in brackets",
    "Markdown link in entities",
    "Markdown link by reference",
    "Markdown autolink",
}
"""Texts that do nothing until somebody presses them; what they leave on the page is a fault all the same."""


@pytest.fixture(scope="module")
def chromium(_browser_is_there: None) -> Iterator[Browser]:
    """One browser for all pages of this file."""
    with open_browser() as page:
        assert page.context.browser is not None
        yield page.context.browser


@pytest.fixture
def seen(chromium: Browser) -> Iterator[Watch]:
    """A page that nobody has used, watched from the start."""
    context = chromium.new_context()
    try:
        yield watch(context.new_page())
    finally:
        context.close()


def obeyed(markdown: str) -> str:
    """Markdown as the most obedient reader shows it: HTML and every kind of link included."""
    reader = MarkdownIt("gfm-like", {"html": True})
    reader.validateLink = lambda url: True  # pyright: ignore[reportAttributeAccessIssue]
    return document(reader.render(markdown))


def document(body: str) -> str:
    return f"<!doctype html><html><head><meta charset=utf-8><title>x</title></head><body>{body}</body></html>"


def assert_quiet(seen: Watch, page: str, *, kind: str = "text/html") -> None:
    """Open a page with and without a policy; nothing of what a text may want happens."""
    for policy in (POLICY, ""):
        with serve({"page": Served(page, kind, policy)}) as url:
            seen.open(f"{url}/page", wait_ms=600)
            assert seen.faults() == [], f"under policy {policy!r}"
            assert seen.page.url == f"{url}/page"


def shown(text: str) -> str:
    """A text as a browser gives it back."""
    return re.sub(r"\r\n?", "\n", printable(text))


@pytest.mark.parametrize("name", [*HTML, *MARKDOWN])
def test_the_watch_notices_each_text_where_nothing_is_escaped(seen: Watch, name: str) -> None:
    """Otherwise the tests below could not fail."""
    page = document(HTML[name]) if name in HTML else obeyed(MARKDOWN[name])
    with serve({"page": Served(page)}) as url:
        seen.open(f"{url}/page")
        assert seen.faults(), page
        assert name in WAIT_FOR_A_PERSON or seen.ran or seen.outside, page


@pytest.mark.parametrize("name", ["script", "broken image", "image of a foreign host", "style from elsewhere"])
def test_an_attempt_that_a_policy_stops_is_noticed(seen: Watch, name: str) -> None:
    with serve({"page": Served(document(HTML[name]), policy=POLICY)}) as url:
        seen.open(f"{url}/page")
        assert (seen.ran, seen.violations != []) == ([], True)


def test_a_link_that_runs_is_noticed_when_it_is_pressed(seen: Watch) -> None:
    with serve({"page": Served(document(HTML["link that runs"]))}) as url:
        seen.open(f"{url}/page")
        seen.page.get_by_role("link").click()
        seen.page.wait_for_timeout(150)
        assert seen.ran == ["a script ran"]


def test_a_page_without_hostile_texts_is_quiet(seen: Watch) -> None:
    assert_quiet(seen, document("<p title='x'>a<b>b</b><a href='#x'>c</a></p>"))


def test_the_report_shows_hostile_texts_and_obeys_none(seen: Watch, tmp_path: Path) -> None:
    page = render_page(hostile_story(tmp_path))
    own_policy = re.search(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', page)
    assert own_policy is not None
    assert_quiet(seen, page)
    assert_quiet(seen, page.replace(own_policy[0], ""))
    prompts = [element.text_content() or "" for element in seen.page.locator(".sample h3").all()]
    expected = [shown(text) for text in TEXTS.values()]
    assert sorted(prompts) == sorted(expected)
    answers = seen.page.locator(".sample").nth(prompts.index(expected[0])).locator("p").all_text_contents()
    assert answers == expected[1:5]


def test_the_policy_of_the_report_leaves_no_way_out(seen: Watch, tmp_path: Path) -> None:
    """What does not fall back to `default-src`: the base of addresses and where forms go."""
    page = render_page(hostile_story(tmp_path))
    injected = HTML["base of all addresses"] + f'<form id=f action="http://{OUTSIDE}/"><button>go</button></form>'
    with serve({"page": Served(page.replace("</main>", injected + "</main>"))}) as url:
        seen.open(f"{url}/page")
        assert seen.page.evaluate("document.baseURI") == f"{url}/page"
        seen.page.evaluate("document.getElementById('f').submit()")
        seen.page.wait_for_timeout(300)
        assert (seen.ran, seen.outside) == ([], [])
        assert seen.violations


def test_the_drawing_of_lineage_stands_alone_and_obeys_nothing(seen: Watch) -> None:
    drawing = to_svg(hostile_graph(list(TEXTS.values())))
    assert_quiet(seen, drawing, kind="image/svg+xml")
    tips = seen.page.locator("g > title").all_text_contents()
    digests = [" ".join(tip.split("\n", 1)[1].split()) for tip in tips]
    told = [one_line(f"digest {text}", at_most=1_000) for text in TEXTS.values()]
    assert digests == told, "a drawing that is no XML shows its first boxes only"


def test_a_rater_sees_hostile_texts_and_the_page_obeys_none(seen: Watch) -> None:
    pages = rating_bodies()
    assert_quiet(seen, obeyed("\n\n".join(pages)))
    fences = [text.removesuffix("\n") for text in seen.page.locator("pre code").all_text_contents()]
    assert fences[::3] == [shown(text) for text in TEXTS.values()]


def test_who_approves_sees_hostile_texts_and_the_page_obeys_none(
    seen: Watch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_quiet(seen, obeyed("\n\n".join(approval_bodies(tmp_path, monkeypatch))))
    cells = set(seen.page.locator("td").all_text_contents())
    for name in ("script", "Markdown image", "cell that closes", "template of Jinja", "emoji", "code that closes"):
        assert " ⏎ ".join(filter(None, map(str.strip, shown(TEXTS[name]).splitlines()))) in cells, name


def test_the_plan_shows_hostile_settings_and_obeys_none(seen: Watch) -> None:
    assert_quiet(seen, obeyed(plan_page()))
    notes = seen.page.locator("li").all_text_contents()
    assert len(notes) == len([text for text in TEXTS.values() if text != PLAIN["half a character"]])


def test_the_table_of_lineage_shows_hostile_addresses_and_obeys_none(seen: Watch) -> None:
    graph = hostile_graph(list(TEXTS.values()))
    assert_quiet(seen, obeyed(to_markdown(graph)))
    assert seen.page.locator("tbody tr").count() == len(graph.nodes)
    cells = seen.page.locator("tbody tr td:nth-child(2)").all_text_contents()
    assert cells[0] == HTML["script"]
