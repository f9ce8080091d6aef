"""Chromium as people use it: a viewport, a colour scheme, and everything that it asked the network for."""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
HEIGHT = 1400

needs_chromium = pytest.mark.skipif(
    CHROMIUM is None or CHROMEDRIVER is None, reason="chromium and chromedriver are not installed"
)


@contextmanager
def open_browser(width: int, scheme: str = "light") -> Iterator[webdriver.Chrome]:
    """A new browser with a viewport of that width, for a person who prefers that colour scheme."""
    assert CHROMIUM is not None
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options=options, service=Service(CHROMEDRIVER))
        try:
            resize(driver, width)
            prefer(driver, scheme)
            yield driver
        finally:
            driver.quit()


def resize(driver: webdriver.Chrome, width: int, height: int = HEIGHT) -> None:
    """The size of the viewport; below 500 pixels it is a phone's."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def prefer(driver: webdriver.Chrome, scheme: str) -> None:
    """Light or dark, as the operating system would say."""
    preference = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", preference)


def read(driver: webdriver.Chrome, selector: str) -> str:
    return read_all(driver, selector)[0].strip()


def read_all(driver: webdriver.Chrome, selector: str) -> list[str]:
    """The texts of all that fit, read at one moment: the page changes while it is looked at."""
    script = "return [...document.querySelectorAll(arguments[0])].map((element) => element.innerText)"
    texts: list[str] = driver.execute_script(script, selector)
    return texts


def read_number(driver: webdriver.Chrome, selector: str) -> int:
    return int(read(driver, selector).replace(",", ""))


def has(selector: str, driver: webdriver.Chrome) -> Callable[[], bool]:
    return lambda: bool(driver.find_elements(By.CSS_SELECTOR, selector))


def read_log(driver: webdriver.Chrome, kind: str) -> list[dict[str, Any]]:
    """What came since the last time it was read."""
    entries: list[dict[str, Any]] = driver.get_log(kind)  # type: ignore[no-untyped-call] # selenium has no types here
    return entries


def read_errors(driver: webdriver.Chrome) -> list[dict[str, Any]]:
    """Errors on the console since the last time."""
    return [entry for entry in read_log(driver, "browser") if entry["level"] == "SEVERE"]


def requested_hosts(driver: webdriver.Chrome) -> set[str]:
    """host:port of everything that was asked for over the network since the last time; chrome: and data: are not."""
    urls = set()
    for entry in read_log(driver, "performance"):
        message = json.loads(entry["message"])["message"]
        match message["method"]:
            case "Network.requestWillBeSent":
                urls.add(urlsplit(message["params"]["request"]["url"]))
            case "Network.webSocketCreated":
                urls.add(urlsplit(message["params"]["url"]))
    return {url.netloc for url in urls if url.scheme in ("http", "https", "ws", "wss")}


def is_dark(driver: webdriver.Chrome) -> bool:
    """Whether the page's background is."""
    colour = driver.find_element(By.TAG_NAME, "body").value_of_css_property("background-color")
    channels = [float(part) for part in colour.partition("(")[2].rstrip(")").split(",")[:3]]
    return sum(channels) / 3 < 128
