"""The overview in a real browser: it follows the run, shows the invite to whom it may, comes back after a restart."""

import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from selenium.webdriver import Keys
from selenium.webdriver.common.by import By

from coordinator.dashboard.snapshot import PHASES
from tests.browser.chromium import (
    has,
    needs_chromium,
    open_browser,
    read,
    read_all,
    read_errors,
    read_number,
    requested_hosts,
)
from tests.browser.conftest import WORKERS
from tests.processes import RunningCoordinator, start_coordinator, wait_until


@needs_chromium
def test_page_follows_the_run_without_reload_when_it_stays_open(run: RunningCoordinator) -> None:
    with open_browser(1280) as driver:
        driver.get(run.page)
        wait_until(has(".loss .nicegui-echart svg path", driver), 40)
        driver.execute_script("window.neverReloaded = true")
        seen = read_number(driver, ".verdict .round")
        wait_until(lambda: read_number(driver, ".verdict .round") > seen, 40)
        wait_until(lambda: read_number(driver, ".verdict .round") > seen + 1, 40)

        assert driver.execute_script("return window.neverReloaded")
        assert read(driver, ".phase") in PHASES.values()
        assert read(driver, ".level") == "Healthy"
        announcer = driver.find_element(By.CSS_SELECTOR, "[role=status][aria-live=polite]")
        assert announcer.get_property("textContent") == "healthy"
        assert set(read_all(driver, ".peers tbody th")) == set(WORKERS)
        assert float(read(driver, ".train_loss strong")) > 0
        assert read_errors(driver) == []
        assert requested_hosts(driver) == {urlsplit(run.page).netloc}


@needs_chromium
def test_focus_stays_in_the_table_when_the_page_is_brought_up_to_date(run: RunningCoordinator) -> None:
    with open_browser(1280) as driver:
        driver.get(run.page)
        wait_until(has(".peers tbody th a", driver), 40)
        driver.execute_script("document.querySelector('.peers tbody th a').focus()")
        focused = driver.switch_to.active_element.text
        seen = read_number(driver, ".verdict .round")
        wait_until(lambda: read_number(driver, ".verdict .round") > seen + 1, 40)
        assert driver.switch_to.active_element.text == focused in WORKERS


@needs_chromium
def test_invite_can_be_copied_when_only_the_keyboard_is_used(run: RunningCoordinator) -> None:
    with open_browser(1280) as driver:
        permissions = {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"], "origin": run.page}
        driver.execute_cdp_cmd("Browser.grantPermissions", permissions)
        driver.get(f"{run.page}/join")
        wait_until(has(".run-invite", driver), 40)
        assert read(driver, ".run-invite") == run.invite
        assert read(driver, ".run-command").replace("\n", "") == f"manyhands worker start {run.invite}"
        assert has(".qr svg path", driver)()
        for _ in range(25):
            driver.switch_to.active_element.send_keys(Keys.TAB)
            if driver.switch_to.active_element.text == "Copy invite":
                break
        driver.switch_to.active_element.send_keys(Keys.ENTER)
        wait_until(lambda: read(driver, ".copied") == "Copied.", 40)
        copied = driver.execute_async_script("navigator.clipboard.readText().then(arguments[0])")
        assert copied == run.invite


@needs_chromium
@pytest.mark.parametrize("kind", ["svg", "png"])
def test_chart_is_saved_as_it_looks_when_its_button_is_pressed(
    run: RunningCoordinator, tmp_path: Path, kind: str
) -> None:
    with open_browser(1280, "dark") as driver:
        behaviour = {"behavior": "allow", "downloadPath": str(tmp_path)}
        driver.execute_cdp_cmd("Browser.setDownloadBehavior", behaviour)
        driver.get(f"{run.page}/loss")
        wait_until(has(".loss .nicegui-echart svg path", driver), 40)
        buttons = {button.text: button for button in driver.find_elements(By.CSS_SELECTOR, ".loss .save button")}
        buttons[f"Save as {kind.upper()}"].click()
        saved = tmp_path / f"loss.{kind}"
        wait_until(saved.is_file, 40)
        content = saved.read_bytes()
    assert content.startswith(b"<svg" if kind == "svg" else b"\x89PNG")
    assert kind == "png" or b"tokens</text>" in content


@pytest.mark.parametrize("header", [{"Host": "manyhands.example"}, {"X-Forwarded-For": "203.0.113.7"}])
def test_invite_is_not_on_the_page_when_the_request_may_come_from_outside(
    run: RunningCoordinator, header: dict[str, str]
) -> None:
    def fetch(headers: dict[str, str]) -> str:
        request = urllib.request.Request(f"{run.page}/join", headers=headers)  # noqa: S310 # our own http:// page
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
            text: str = answer.read().decode()
            return text

    assert run.invite in fetch({})
    hidden = fetch(header)
    assert run.invite not in hidden
    assert "Ask the operator" in hidden


def test_json_and_metrics_tell_the_same_round_when_asked_together(run: RunningCoordinator) -> None:
    before = run.status()["round"]
    rounds = run.get("/api/rounds?last=2")
    with urllib.request.urlopen(f"{run.page}/metrics", timeout=10) as answer:  # noqa: S310 # our own http:// page
        lines = answer.read().decode().splitlines()
    metrics = {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}
    after = wait_until(lambda: run.status()["round"] > before and run.status()["round"], 30)
    assert len(rounds) == 2
    assert before <= rounds[-1]["round"] + 1 <= after
    assert before <= metrics["manyhands_rounds_merged_total"] <= after
    assert metrics["manyhands_payload_bytes_total"] > 0
    assert metrics['manyhands_peers{role="worker",status="ready"}'] == 2


@needs_chromium
def test_page_comes_back_when_the_coordinator_is_restarted(tmp_path: Path) -> None:
    options = ["--no-validator"]
    with open_browser(1280) as driver, start_coordinator(tmp_path / "run", options=options) as first:
        driver.get(first.page)
        wait_until(has(".verdict .round", driver), 40)
        driver.execute_script("window.neverReloaded = true")
        assert first.stop(timeout_s=15) == 0  # although a browser is connected
        wait_until(lambda: "Connection lost" in read(driver, "#popup"), 40)
        with start_coordinator(first.folder, options=options) as again:
            wait_until(lambda: not driver.execute_script("return window.neverReloaded"), 40)
            wait_until(has(".verdict .round", driver), 40)
            assert again.stop(timeout_s=5) == 0
    assert not (tmp_path / ".nicegui").exists()  # the coordinator's current directory
