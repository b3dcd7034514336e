"""A browser that is already on this machine; without one the tests say what to install and are skipped."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import tests.airflow_home  # noqa: F401 - Airflow gets its temporary home before a test module imports it
from tests.browser.pages import BrowserMissing, login_airflow, open_browser
from tests.live_stack import LiveStack

if TYPE_CHECKING:
    from playwright.sync_api import Page  # pyright: ignore[reportMissingImports]


@pytest.fixture(scope="session", autouse=True)
def _browser_is_there() -> None:
    """Before the stack starts, which takes a minute."""
    try:
        with open_browser():
            pass
    except BrowserMissing as missing:
        pytest.skip(str(missing))


@pytest.fixture
def page(_browser_is_there: None, live: LiveStack, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Page]:
    """A page that is logged in to Airflow; what it showed last is kept as a picture, for when a test fails."""
    with open_browser() as page:
        login_airflow(page, live.record.airflow_url, live.secrets.admin_password)
        yield page
        name = re.sub(r"\W+", "-", request.node.name)
        page.screenshot(path=tmp_path / f"{name}.png")
