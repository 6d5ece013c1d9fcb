"""A headless Chromium for tests and pictures of the server's pages."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")


def find_chromium() -> str | None:
    """The program, if this host has one; Debian's package is called chromium."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser until the block ends. Raises FileNotFoundError if this host has none."""
    program = find_chromium()
    if program is None:
        raise FileNotFoundError("There is no Chromium here; on Debian, apt-get install chromium.")
    # Root, as whom containers of CI run, has no sandbox.
    options = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=options)
        try:
            yield browser
        finally:
            browser.close()
