"""Foreign texts in Markdown: a reader that obeys everything finds nothing to obey, and shows all characters."""

import re
from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt

from stages.config.markdown import block, code, link, plain, table


class _Shown(HTMLParser):
    def __init__(self, markdown: str) -> None:
        super().__init__()
        self.text, self.tags = "", set[str]()
        self.feed(MarkdownIt("gfm-like", {"html": True}).render(markdown))
        self.close()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize(
    "text",
    [
        "<img src=x onerror=alert(1)>",
        "<img src=x",
        "![x](http://evil.example/leak)",
        "[x](javascript:alert(1))",
        "[x]: http://evil.example/",
        "&lt;b&gt; &#60;b&#62;",
        "\\<b\\> \\\\![x](y)",
        "`a` ``b`` ``` c",
        "| a | b |",
        "# a",
        "- a",
        "1. a",
        "> a",
        "***a*** __b__ ~~c~~",
        "<!-- a -->",
        "<javascript:alert(1)>",
        "{{ 7*7 }} ${7*7}",
    ],
)
def test_plain_text_is_shown_as_it_is_wherever_it_stands(text: str) -> None:
    alone, cell = _Shown(plain(text)), _Shown(table(("a", "b"), [(plain(text), "end")]))
    assert (alone.text.strip(), alone.tags) == (text, {"p"})
    assert cell.tags == {"table", "thead", "tbody", "tr", "th", "td"}
    assert [part for part in cell.text.split("\n") if part] == ["a", "b", text, "end"]


def test_every_escape_means_the_same_to_showdown() -> None:
    """MLflow's reader; a backslash before any other character it shows, and then obeys the character."""
    known = set("\\`*_{}[]()>#+.!~=|:-")
    everything = "".join(map(chr, range(0x20, 0x7F)))
    assert {found[1] for found in re.finditer(r"\\(.)", plain(everything))} <= known
    assert not re.search(r"[<>]|&(?!\w+;)", plain("<a href=x> & &amp; </a>"))


def test_addresses_are_parted_so_that_no_reader_links_them() -> None:
    """Airflow's reader looks for them after it has undone all escapes."""
    parted = plain("see http://a.example, HTTPS://b.example, www.c.example and d@e.example, not models:/m@champion")
    assert not re.search(r"https?\\?:|www\\?\.|\w@e", parted, re.IGNORECASE)
    assert "models\\:/m@champion" in parted
    assert _Shown(parted).tags == {"p"}


def test_what_cannot_be_seen_or_stored_is_spelled_out() -> None:
    for shown in (_Shown(plain("a\x00\ud800")), _Shown(block("a\x00\ud800"))):
        assert shown.text.strip() == "a\\u0000\\ud800"


def test_a_block_is_shown_with_its_lines_and_cannot_be_closed() -> None:
    text = "a\n```\n~~~~\n````text\n</code><b>![x](y)"
    shown = _Shown(block(text))
    assert (shown.text.rstrip("\n"), shown.tags) == (text, {"pre", "code"})


def test_an_address_is_code_only_where_nothing_in_it_could_end_the_code() -> None:
    assert code("s3://bucket/a-b_c/1.jsonl#format=alpaca") == "`s3://bucket/a-b_c/1.jsonl#format=alpaca`"
    for address in ("s3://b/`x`<b>", "s3://b/a|b", "s3://b/\\", "file:///a b", ""):
        shown = _Shown(table(("a", "b"), [(code(address), "end")]))
        assert [part for part in shown.text.split("\n") if part] == [
            part for part in ("a", "b", address, "end") if part
        ]


def test_a_link_leads_to_its_address_and_to_no_other() -> None:
    assert link("a [b]", "http://h/#/runs/1?x=1") == "[a \\[b\\]](http://h/#/runs/1?x=1)"
    assert link("a", "http://h/) ![x](http://evil/)") == "[a](http://h/%29%20![x]%28http://evil/%29)"
