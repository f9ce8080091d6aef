"""The page in a real browser, on a real run: one coordinator, its validator and two workers."""

import json
import shutil
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from selenium import webdriver
from selenium.webdriver import Keys
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

from coordinator.dashboard.snapshot import PHASES
from tests.processes import RunningCoordinator, start_coordinator, start_worker, wait_until

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
WORKERS = ("ada", "bob <b>the</b> builder")

needs_chromium = pytest.mark.skipif(
    CHROMIUM is None or CHROMEDRIVER is None, reason="chromium and chromedriver are not installed"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCoordinator]:
    """A run in which two workers train."""
    place = tmp_path_factory.mktemp("page")
    with (
        start_coordinator(place / "run", train={"tokens": 100_000_000}) as coordinator,
        start_worker(coordinator.invite, place / "first", name=WORKERS[0]),
        start_worker(coordinator.invite, place / "second", name=WORKERS[1]),
    ):
        wait_until(lambda: coordinator.status()["workers"] == 2 and coordinator.status()["round"] >= 2, 60)
        yield coordinator


@contextmanager
def open_browser(width: int, height: int = 1400, scheme: str = "light") -> Iterator[webdriver.Chrome]:
    """A new browser with a viewport of that size, for a person who prefers that colour scheme."""
    assert CHROMIUM is not None
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options=options, service=Service(CHROMEDRIVER))
        try:
            size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            preference = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", preference)
            yield driver
        finally:
            driver.quit()


def read(driver: webdriver.Chrome, selector: str) -> str:
    return driver.find_element(By.CSS_SELECTOR, selector).text


def read_number(driver: webdriver.Chrome, selector: str) -> int:
    return int(read(driver, selector).replace(",", ""))


def has(selector: str, driver: webdriver.Chrome) -> Callable[[], bool]:
    return lambda: bool(driver.find_elements(By.CSS_SELECTOR, selector))


def read_log(driver: webdriver.Chrome, kind: str) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = driver.get_log(kind)  # type: ignore[no-untyped-call] # selenium has no types here
    return entries


def requested_hosts(driver: webdriver.Chrome) -> set[str]:
    """host:port of everything that was asked for over the network; chrome: and data: URLs are not."""
    urls = set()
    for entry in read_log(driver, "performance"):
        message = json.loads(entry["message"])["message"]
        match message["method"]:
            case "Network.requestWillBeSent":
                urls.add(urlsplit(message["params"]["request"]["url"]))
            case "Network.webSocketCreated":
                urls.add(urlsplit(message["params"]["url"]))
    return {url.netloc for url in urls if url.scheme in ("http", "https", "ws", "wss")}


def brightness(driver: webdriver.Chrome) -> float:
    """Mean of the background's red, green and blue, 0 to 255."""
    colour = driver.find_element(By.TAG_NAME, "body").value_of_css_property("background-color")
    channels = [float(part) for part in colour.partition("(")[2].rstrip(")").split(",")[:3]]
    return sum(channels) / 3


@needs_chromium
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_page_follows_the_run_without_reload_when_it_stays_open(
    run: RunningCoordinator, tmp_path: Path, width: int, scheme: str
) -> None:
    with open_browser(width, scheme=scheme) as driver:
        driver.get(run.page)
        wait_until(has(".nicegui-echart svg path", driver), 20)
        driver.execute_script("window.neverReloaded = true")
        seen = read_number(driver, ".round")
        wait_until(lambda: read_number(driver, ".round") > seen, 15)
        wait_until(lambda: read_number(driver, ".round") > seen + 1, 15)

        assert driver.execute_script("return window.neverReloaded")
        assert read(driver, ".phase") in PHASES.values()
        assert read(driver, ".level") == "Healthy"
        announcer = driver.find_element(By.CSS_SELECTOR, "[role=status][aria-live=polite]")
        assert announcer.get_property("textContent") == "healthy"
        names = [cell.text for cell in driver.find_elements(By.CSS_SELECTOR, "tbody th")]
        assert {*WORKERS, "validator"} <= set(names)
        assert read(driver, ".invite") == run.invite
        assert read(driver, ".command").replace("\n", "") == f"manyhands worker start {run.invite}"
        assert float(read(driver, ".train_loss strong")) > 0
        wide, visible = driver.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
        assert wide <= visible == width
        assert (brightness(driver) > 128) == (scheme == "light")
        driver.save_screenshot(str(tmp_path / "page.png"))
        assert [entry for entry in read_log(driver, "browser") if entry["level"] == "SEVERE"] == []
        assert requested_hosts(driver) == {urlsplit(run.page).netloc}


@needs_chromium
def test_invite_can_be_copied_when_only_the_keyboard_is_used(run: RunningCoordinator) -> None:
    with open_browser(1280) as driver:
        permissions = {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"], "origin": run.page}
        driver.execute_cdp_cmd("Browser.grantPermissions", permissions)
        driver.get(run.page)
        wait_until(has(".invite", driver), 20)
        for _ in range(10):
            driver.switch_to.active_element.send_keys(Keys.TAB)
            if driver.switch_to.active_element.text == "Copy invite":
                break
        driver.switch_to.active_element.send_keys(Keys.ENTER)
        wait_until(lambda: read(driver, ".copied") == "Copied.", 5)
        copied = driver.execute_async_script("navigator.clipboard.readText().then(arguments[0])")
        assert copied == run.invite


@pytest.mark.parametrize("header", [{"Host": "manyhands.example"}, {"X-Forwarded-For": "203.0.113.7"}])
def test_invite_is_not_on_the_page_when_the_request_may_come_from_outside(
    run: RunningCoordinator, header: dict[str, str]
) -> None:
    def fetch(headers: dict[str, str]) -> str:
        request = urllib.request.Request(run.page, headers=headers)  # noqa: S310 # our own http:// page
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
            text: str = answer.read().decode()
            return text

    assert run.invite in fetch({})
    hidden = fetch(header)
    assert run.invite not in hidden
    assert "manyhands coordinator invite" in hidden


def test_json_and_metrics_tell_the_same_round_when_asked_together(run: RunningCoordinator) -> None:
    before = run.status()["round"]
    rounds = run.get("/api/rounds?last=2")
    with urllib.request.urlopen(f"{run.page}/metrics", timeout=10) as answer:  # noqa: S310 # our own http:// page
        lines = answer.read().decode().splitlines()
    metrics = {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}
    after = run.status()["round"]
    assert len(rounds) == 2
    assert before <= rounds[-1]["round"] + 1 <= after
    assert before <= metrics["manyhands_rounds_merged_total"] <= after
    assert metrics["manyhands_payload_bytes_total"] > 0
    assert metrics['manyhands_peers{role="worker",status="ready"}'] == 2


@needs_chromium
def test_page_comes_back_when_the_coordinator_is_restarted(run: RunningCoordinator) -> None:
    """The last test: it ends the run."""
    with open_browser(1280) as driver:
        driver.get(run.page)
        wait_until(has(".round", driver), 20)
        seen = read_number(driver, ".round")
        driver.execute_script("window.neverReloaded = true")
        assert run.stop(timeout_s=15) == 0
        wait_until(lambda: "Connection lost" in read(driver, "#popup"), 15)
        with start_coordinator(run.folder, options=["--no-validator"]) as again:
            wait_until(lambda: not driver.execute_script("return window.neverReloaded"), 20)
            wait_until(has(".round", driver), 20)
            assert read_number(driver, ".round") >= seen
            assert again.stop(timeout_s=5) == 0  # although a browser is connected
    assert not (run.folder.parent / ".nicegui").exists()  # the coordinator's current directory
