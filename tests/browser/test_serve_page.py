"""The page of `make serve` in a real browser: one question to all models, side by side, and text that stays text."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import torch

from stages.config.graph import Stage
from stages.config.places import local_path
from stages.data.tokens.views import TokensArtifact
from stages.models.build import new_causal_lm, save_model
from stages.serve.address import Address
from stages.serve.app import Access
from stages.serve.loading import ModelFiles, ServedModel, load_model
from tests.browser.hostile import HTML, MARKDOWN, PLAIN, Watch, watch
from tests.browser.pages import open_browser
from tests.serving import serving
from tests.small_world import MODEL, make_tokens

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page  # pyright: ignore[reportMissingImports]

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(900)]

HOSTILE = {**HTML, **MARKDOWN, "long word": PLAIN["long word"][:400], "emoji": PLAIN["emoji"]}


class Scripted(torch.nn.Module):
    """Says given texts, one for each prompt, as a language model says its own: token by token, by logits."""

    def __init__(self, texts: list[list[int]], config: Any, *, vocab_size: int, end_id: int) -> None:
        super().__init__()
        self.config, self._vocab_size, self._end_id = config, vocab_size, end_id
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self._texts = iter(texts)
        self._text, self._place = [end_id], 0

    def forward(self, input_ids: Any, position_ids: Any, past_key_values: Any, **_: Any) -> Any:
        if position_ids[0, 0] == 0:
            self._text = [*next(self._texts), self._end_id]
        self._place = self._place + 1 if input_ids.shape[1] == 1 else 0  # a prompt may come in parts
        logits = torch.zeros(1, 1, self._vocab_size)
        logits[0, 0, self._text[self._place]] = 50.0
        return SimpleNamespace(logits=logits, past_key_values=past_key_values)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[ServedModel]:
    """Two small models with random weights."""
    home = tmp_path_factory.mktemp("page")
    tokens = TokensArtifact(local_path(make_tokens(home).uri))
    made = []
    for seed, role in enumerate((Stage.PRETRAIN, Stage.SFT)):
        model = new_causal_lm(MODEL.model_copy(update={"initializer_range": 0.3}), tokens, seed=seed)
        folder = home / role
        folder.mkdir()
        save_model(model, model.state_dict(), folder, tokens)
        made.append(loaded(role.value, folder))
    return made


def loaded(name: str, folder: Path) -> ServedModel:
    device = torch.device("cpu")
    return load_model(Address(name, str(folder)), ModelFiles(folder), device=device, dtype=torch.float32)


@pytest.fixture(scope="module")
def chromium(_browser_is_there: None) -> Iterator[Browser]:
    with open_browser() as page:
        assert page.context.browser is not None
        yield page.context.browser


@pytest.fixture
def seen(chromium: Browser) -> Iterator[Watch]:
    context = chromium.new_context()
    try:
        yield watch(context.new_page())
    finally:
        context.close()


def ask(page: Page, question: str) -> None:
    page.get_by_label("Question").fill(question)
    page.get_by_role("button", name="Ask", exact=True).click()
    page.locator("#send:enabled").wait_for()


def answers(page: Page) -> list[list[str]]:
    """What each model has said, by model."""
    return [model.locator(".assistant").all_text_contents() for model in page.locator(".model").all()]


def said(url: str, model: str, *turns: str) -> str:
    """The same by the API."""
    messages = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(turns)]
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 6}
    response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    return response.json()["choices"][0]["message"]["content"]


def settled(page: Page, *, length: int = 6) -> None:
    page.get_by_text("Settings").click()
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Answer, tokens at most").fill(str(length))


def test_all_models_answer_the_same_question_and_know_their_own_earlier_answers(
    seen: Watch, models: list[ServedModel]
) -> None:
    with serving(models) as url:
        seen.open(url)
        page = seen.page
        assert page.locator("h1").text_content() == "Ask the models of a run"
        names = [(heading or "").split(" ")[0] for heading in page.locator("h2").all_text_contents()]
        assert names == ["pretrain", "sft"]
        settled(page)
        ask(page, "sort?")
        first = [said(url, name, "sort?") for name in names]
        assert answers(page) == [[text] for text in first]
        assert first[0] != first[1]
        ask(page, "merge?")
        second = [said(url, name, "sort?", text, "merge?") for name, text in zip(names, first, strict=True)]
        assert answers(page) == [list(both) for both in zip(first, second, strict=True)]
        assert "6 tokens" in (page.locator(".measured").first.text_content() or "")
        page.get_by_role("button", name="New conversation").click()
        assert page.locator(".turn").count() == 0
        ask(page, "sort?")
        assert answers(page) == [[text] for text in first]
        assert seen.faults() == []


def test_stop_ends_the_answers_and_frees_the_server(seen: Watch, models: list[ServedModel]) -> None:
    endless = replace(models[0], end_ids=frozenset())
    hook = endless.model.register_forward_pre_hook(lambda *_: time.sleep(0.1))
    try:
        with serving([endless]) as url:
            seen.open(url)
            page = seen.page
            settled(page, length=40)
            page.get_by_label("Question").fill("sort?")
            page.keyboard.press("Enter")
            page.locator(".assistant:not(:empty)").wait_for()
            page.get_by_role("button", name="Stop").click()
            page.get_by_text("stopped").wait_for()
            page.locator("#send:enabled").wait_for()
            assert page.locator(".assistant").text_content()
            page.wait_for_timeout(500)
            assert httpx.get(f"{url}/v1/models/pretrain").json()["open_answers"] == 0
    finally:
        hook.remove()


def test_a_length_that_does_not_fit_into_a_small_model_is_what_it_has_room_for(
    seen: Watch, models: list[ServedModel]
) -> None:
    """The page asks for 128 tokens unless told otherwise, and the models of the smallest recipe read and write 128."""
    small = replace(models[0], end_ids=frozenset())
    with serving([small]) as url:
        seen.open(url)
        settled(seen.page, length=128)
        ask(seen.page, "sort?")
        assert seen.page.locator(".failed").count() == 0
        prompt = len(small.chat.encode_prompt([{"role": "user", "content": "sort?"}]))
        measured = seen.page.locator(".measured").text_content() or ""
        assert f"{64 - prompt} tokens" in measured
        assert "cut at its longest" in measured


def test_a_problem_is_said_where_the_answer_would_be(seen: Watch, models: list[ServedModel]) -> None:
    with serving(models[:1]) as url:
        seen.open(url)
        settled(seen.page)
        ask(seen.page, "sort? " * 90)
        assert "reads and writes at most 64" in (seen.page.locator(".failed").text_content() or "")
        ask(seen.page, "sort?")
        assert answers(seen.page)[0][1] == said(url, "pretrain", "sort?"), "what failed is no part of the conversation"


def test_with_a_key_the_page_asks_for_it(seen: Watch, models: list[ServedModel]) -> None:
    with serving(models[:1], access=Access(api_key="sesame")) as url:
        seen.open(url)
        page = seen.page
        page.get_by_text("This server wants an API key").wait_for()
        page.get_by_label("API key").fill("sesame")
        page.keyboard.press("Tab")
        page.locator(".model").wait_for()
        page.get_by_label("Temperature").fill("0")
        page.get_by_label("Answer, tokens at most").fill("6")
        ask(page, "sort?")
        assert len(answers(page)[0][0]) > 0
        assert page.locator(".failed").count() == 0


@pytest.mark.parametrize("bypass_csp", [False, True], ids=["with its policy", "without its policy"])
def test_what_a_model_writes_is_shown_and_obeyed_nowhere(
    chromium: Browser, models: list[ServedModel], bypass_csp: bool
) -> None:
    """A model may have learned to write a page that steals; without the policy, escaping alone must hold."""
    served = models[1]
    backend = served.tokenizer.backend
    texts = [backend.encode(text, add_special_tokens=False).ids for text in HOSTILE.values()]
    size, end = served.tokenizer.vocab_size, served.tokenizer.eos_id
    scripted = Scripted(texts, served.model.config, vocab_size=size, end_id=end)
    writer = replace(served, name="<img data-planted src=x>", model=scripted, context_length=1 << 20)
    context = chromium.new_context(bypass_csp=bypass_csp)
    try:
        seen = watch(context.new_page())
        with serving([writer]) as url:
            seen.open(url)
            settled(seen.page, length=5000)
            for text in HOSTILE.values():
                ask(seen.page, text)
                assert answers(seen.page) == [[text]]
                (asked,) = seen.page.locator(".user").all_text_contents()
                assert asked == re.sub(r"\r\n?", "\n", text).strip(), "a text field has line feeds alone"
                assert seen.faults() == []
                seen.page.get_by_role("button", name="New conversation").click()
            seen.page.wait_for_timeout(500)
            assert seen.faults() == []
            assert seen.page.url == f"{url}/"
    finally:
        context.close()
