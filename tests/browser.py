"""Debian's Chromium, driven by Playwright: pages are looked at as people see them."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NEEDS_CHROMIUM = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip


def pictures() -> Path:
    """Where screenshots are kept: GENGAP_SCREENSHOTS, or `screenshots` in the repository."""
    folder = Path(os.environ.get("GENGAP_SCREENSHOTS", Path(__file__).parent.parent / "screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def page(**context: Any) -> Iterator[Any]:
    """A page in a headless browser; `page.complaints` fills with console errors, page errors and failed requests.

    Args:
        context: options of Playwright's `new_context`, such as viewport, offline, color_scheme.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        found = browser.new_context(**context).new_page()
        found.complaints = complaints = []
        found.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
        found.on("pageerror", lambda error: complaints.append(str(error)))
        found.on("requestfailed", lambda request: complaints.append(f"{request.url}: {request.failure}"))
        yield found
        browser.close()
