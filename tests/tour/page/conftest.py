"""A browser for the page's tests, and pages to open in it."""

import os
import shutil

import pytest
from tour.page.pages import Browser, measured_tour

from curvops.tour.page import write_page


def _program(*names):
    return next(filter(None, map(shutil.which, names)), None)


@pytest.fixture(scope="session")
def chromium(tmp_path_factory):
    """Return a headless Chromium; without one the tests are skipped, but not where everything must be tested."""
    program, driver = _program("chromium", "chromium-browser", "google-chrome"), _program("chromedriver")
    if not (program and driver):
        reason = "the page's tests need Chromium and its driver: apt-get install chromium chromium-driver"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    browser = Browser(program, driver, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.driver.quit()


@pytest.fixture(scope="session")
def tour():
    """Return the six matrices of a tiny network."""
    return measured_tour()


@pytest.fixture(scope="session")
def tour_page(tour, tmp_path_factory):
    """Return the file of a page with one stop."""
    return write_page(tmp_path_factory.mktemp("pages") / "tour.html", tour)


@pytest.fixture
def page(chromium, tour_page):
    """Return the browser with a page of one stop, as it is when it is opened."""
    if chromium.driver.current_url == tour_page.as_uri():
        chromium.reset()
    else:
        chromium.open(tour_page)
    return chromium
