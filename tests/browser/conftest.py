"""A browser that is already on this machine; without one the tests say what to install and are skipped."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.browser.screenshots import BrowserMissing, login_airflow, open_browser
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
def page(_browser_is_there: None, people_stack: LiveStack) -> "Iterator[Page]":
    """A page that is logged in to Airflow."""
    with open_browser() as page:
        login_airflow(page, people_stack.record.airflow_url, people_stack.secrets.admin_password)
        yield page
