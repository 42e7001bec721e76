"""A real headless browser for the pages that are reported: Debian's chromium through playwright, without a network.

    def test_something(browser_page, tmp_path):
        browser_page.goto((tmp_path / "page.html").as_uri())

Where there is no chromium these tests are skipped; `.ci/run` installs it. A page that logs an error, throws, opens a
dialog, or asks for anything but files, data and blobs fails its test at the end.
"""

import shutil

import pytest

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
LOCAL = ("file:", "data:", "blob:", "about:")


def _executable() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        pytest.skip("no chromium in PATH: apt-get install chromium")
    return found


@pytest.fixture(scope="module")
def chromium():
    """One browser for the tests of a module; it lives no longer, as its event loop would disturb other tests."""
    executable = _executable()
    sync_api = pytest.importorskip("playwright.sync_api")
    sync_api.expect.set_options(timeout=60_000)  # machines that run these tests are shared
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=FLAGS)
        yield browser
        browser.close()


def watch(page) -> list[str]:
    """What goes wrong in `page` from now on, in words."""
    problems: list[str] = []
    page.on("console", lambda message: message.type == "error" and problems.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: problems.append(f"thrown: {error}"))
    page.on("requestfailed", lambda request: problems.append(f"failed: {request.url[:200]} {request.failure}"))
    page.on("request", lambda r: r.url.startswith(LOCAL) or problems.append(f"asked the network: {r.url[:200]}"))

    def dismiss(dialog):
        problems.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    page.on("dialog", dismiss)
    return problems


@pytest.fixture
def browser_page(chromium):
    """A fresh page of 1280 × 800, offline, with a profile of its own."""
    context = chromium.new_context(viewport={"width": 1280, "height": 800}, offline=True, reduced_motion="reduce")
    page = context.new_page()
    page.set_default_timeout(60_000)
    problems = watch(page)
    yield page
    context.close()
    assert problems == []
