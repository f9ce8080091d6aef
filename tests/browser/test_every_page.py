"""Every page in a real browser on a real run: nothing on the console, nothing from elsewhere, nothing out of reach."""

from collections.abc import Sequence
from urllib.parse import urlsplit

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By

from coordinator.dashboard.frame import NAVIGATION
from tests.browser.axe import find_violations
from tests.browser.chromium import (
    has,
    is_dark,
    needs_chromium,
    open_browser,
    read,
    read_all,
    read_errors,
    requested_hosts,
)
from tests.browser.conftest import EARLIER
from tests.processes import RunningCoordinator, wait_until

HEADINGS = {**NAVIGATION, "/peers/nobody": "No such peer", "/rounds?round=1": "Rounds", "/sign-in?wrong=1": "Sign in"}


def list_pages(run: RunningCoordinator) -> dict[str, str]:
    """Path and h1 of every page, with one peer's own."""
    peer = next(one for one in run.status()["peers"] if one["name"] == "ada")
    return {**HEADINGS, f"/peers/{peer['peer']}": "ada"}


def find_clipped(driver: webdriver.Chrome) -> Sequence[str]:
    """Texts that reach out of the viewport, unless they can be scrolled to."""
    found: list[str] = driver.execute_script(
        """
        return [...document.querySelectorAll(".content *, .verdict *")].filter((element) => {
          const box = element.getBoundingClientRect();
          const scrolls = element.closest(".data-table, .visually-hidden, thead, svg");
          return element.textContent && box.width && box.right > window.innerWidth + 1 && !scrolls;
        }).map((element) => element.outerHTML.slice(0, 150));
        """
    )
    return found


@needs_chromium
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_every_page_is_whole_and_accessible_when_it_is_opened(run: RunningCoordinator, width: int, scheme: str) -> None:
    faults: dict[str, object] = {}
    with open_browser(width, scheme) as driver:
        for path, heading in list_pages(run).items():
            driver.get(run.page + path)
            wait_until(has("h1", driver), 40)
            wait_until(has(".verdict .round", driver), 40)
            wide, visible = driver.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
            grave = find_violations(driver)
            shown = driver.find_element(By.TAG_NAME, "h1").get_property("textContent")
            found = {
                "heading": shown if shown != heading else "",
                "scrolls sideways": wide > visible or visible != width,
                "clipped": find_clipped(driver),
                "accessibility": grave,
                "console": read_errors(driver),
                "dark": is_dark(driver) != (scheme == "dark"),
            }
            faults |= {f"{path}: {what}": fault for what, fault in found.items() if fault}
        assert faults == {}
        assert requested_hosts(driver) == {urlsplit(run.page).netloc}


@needs_chromium
def test_current_page_is_marked_and_content_can_be_skipped_to_when_the_keyboard_is_used(
    run: RunningCoordinator,
) -> None:
    with open_browser(1280) as driver:
        driver.get(f"{run.page}/ledger")
        wait_until(has("h1", driver), 40)
        assert read(driver, "nav [aria-current=page]") == "Ledger"
        driver.execute_cdp_cmd(
            "Input.dispatchKeyEvent", {"type": "rawKeyDown", "key": "Tab", "windowsVirtualKeyCode": 9}
        )
        assert driver.switch_to.active_element.text == "Skip to the page"
        driver.switch_to.active_element.send_keys("\ue007")
        wait_until(lambda: driver.switch_to.active_element.get_attribute("id") == "content", 40)


@needs_chromium
def test_theme_stays_when_another_page_is_opened(run: RunningCoordinator) -> None:
    with open_browser(1280, "light") as driver:
        driver.get(run.page)
        wait_until(has("button.theme", driver), 40)
        button = driver.find_element(By.CSS_SELECTOR, "button.theme")
        button.click()
        button.click()
        assert button.text == "Dark"
        assert is_dark(driver)
        driver.get(f"{run.page}/peers")
        wait_until(has("button.theme", driver), 40)
        assert read(driver, "button.theme") == "Dark"
        assert is_dark(driver)


@needs_chromium
def test_rounds_can_be_stepped_through_when_buttons_are_pressed(run: RunningCoordinator) -> None:
    with open_browser(1280) as driver:
        driver.get(f"{run.page}/rounds?round=1")
        wait_until(lambda: has("tbody tr", driver)() and read(driver, "#round") == "Round 1", 40)
        names = set(read_all(driver, "tbody th a"))
        assert names & {"ada", "bob <b>the</b> builder"}
        buttons = {button.text: button for button in driver.find_elements(By.CSS_SELECTOR, ".round button")}
        buttons["Earlier"].click()
        wait_until(lambda: read(driver, "#round") == "Round 0", 40)
        buttons["Newest"].click()
        wait_until(lambda: int(read(driver, "#round").split()[1].replace(",", "")) > 1, 40)


@needs_chromium
def test_earlier_run_is_drawn_beside_when_it_is_chosen(run: RunningCoordinator) -> None:
    with open_browser(1280) as driver:
        driver.get(f"{run.page}/loss")
        wait_until(has(".loss .nicegui-echart svg path", driver), 40)
        dashed = ".loss .nicegui-echart path[stroke-dasharray][stroke='#8a94a3'][d*='L']"  # a line with points
        assert not has(dashed, driver)()
        driver.find_element(By.CSS_SELECTOR, ".compare").click()
        wait_until(has(".q-menu .q-item", driver), 40)
        next(item for item in driver.find_elements(By.CSS_SELECTOR, ".q-menu .q-item") if item.text == EARLIER).click()
        wait_until(has(dashed, driver), 40)


@needs_chromium
def test_peers_are_found_and_sorted_when_somebody_looks_for_one(run: RunningCoordinator) -> None:
    def names() -> list[str]:
        return read_all(driver, ".peers tbody th")

    with open_browser(1280) as driver:
        driver.get(f"{run.page}/peers")
        wait_until(lambda: len(names()) == 3, 40)
        next(button for button in driver.find_elements(By.CSS_SELECTOR, "button.sort") if button.text == "Name").click()
        wait_until(lambda: names() == ["ada", "bob <b>the</b> builder", "validator"], 40)
        driver.find_element(By.CSS_SELECTOR, ".peers input").send_keys("BUILDER")
        wait_until(lambda: names() == ["bob <b>the</b> builder"], 40)
