"""The operator's actions end to end: signed in with the token in a real browser, on a run that workers ask to join."""

import urllib.request
from collections.abc import Iterator
from contextlib import suppress

import pytest
from selenium import webdriver
from selenium.common.exceptions import (
    ElementNotInteractableException,
    NoSuchElementException,
    StaleElementReferenceException,
)
from selenium.webdriver.common.by import By

from tests.browser.axe import find_violations
from tests.browser.chromium import has, needs_chromium, open_browser, read, read_all, read_errors
from tests.processes import RunningCoordinator, start_coordinator, start_worker, wait_until

pytestmark = needs_chromium

CHANGING = (StaleElementReferenceException, ElementNotInteractableException)  # a page that is looked at meanwhile


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCoordinator]:
    """A run that ada and bob have joined, and that waits for its operator's approval."""
    place = tmp_path_factory.mktemp("guarded")
    tokens = {"tokens": 100_000_000}
    with (
        start_coordinator(place / "run", options=["--no-validator"], train=tokens, invite={"approval": True}) as run,
        start_worker(run.invite, place / "ada", name="ada"),
        start_worker(run.invite, place / "bob", name="bob"),
    ):
        wait_until(lambda: len(run.status()["peers"]) == 2, 60)
        yield run


@pytest.fixture(scope="module")
def operator(guarded: RunningCoordinator) -> Iterator[webdriver.Chrome]:
    """A browser that has signed in, after one wrong try."""
    with open_browser(1280) as driver:
        driver.get(f"{guarded.page}/sign-in")
        for token, path in (("wrong", "/sign-in?wrong=1"), (read_token(guarded), "/")):
            type_into(driver, "input#token", token)
            press(driver, "Sign in", ".sign-in-form")
            wait_until(lambda path=path: driver.current_url == guarded.page + path, 40)
        yield driver


def read_token(run: RunningCoordinator) -> str:
    return (run.folder / "operator-token").read_text().strip()


def press(driver: webdriver.Chrome, words: str, inside: str = "body") -> None:
    """Click the button with these words as soon as it is there."""

    def click() -> bool:
        with suppress(*CHANGING):
            for button in driver.find_elements(By.CSS_SELECTOR, f"{inside} button"):
                if button.is_displayed() and button.text == words:
                    button.click()
                    return True
        return False

    wait_until(click, 40)


def type_into(driver: webdriver.Chrome, selector: str, words: str) -> None:
    """Type the words there as soon as that can be done: a dialog opens by degrees."""

    def enter() -> bool:
        with suppress(NoSuchElementException, *CHANGING):
            driver.find_element(By.CSS_SELECTOR, selector).send_keys(words)
            return True
        return False

    wait_until(enter, 40)


def open_page(driver: webdriver.Chrome, run: RunningCoordinator, path: str) -> None:
    driver.get(run.page + path)
    wait_until(has(".verdict .round", driver), 40)


def find_peer(run: RunningCoordinator, name: str) -> dict[str, object]:
    peer: dict[str, object] = next(peer for peer in run.status()["peers"] if peer["name"] == name)
    return peer


def test_workers_train_when_the_operator_approves_them(guarded: RunningCoordinator, operator: webdriver.Chrome) -> None:
    assert guarded.status()["round"] == 0
    open_page(operator, guarded, "/peers")
    assert find_violations(operator) == []
    for left in (1, 0):
        press(operator, "Approve", ".waiting")
        wait_until(lambda left=left: len(read_all(operator, ".waiting tbody tr")) == left, 40)
    wait_until(lambda: guarded.status()["round"] >= 1, 60)
    assert not any(peer["waiting_for_approval"] for peer in guarded.status()["peers"])


def test_run_pauses_and_goes_on_when_the_operator_says_so(
    guarded: RunningCoordinator, operator: webdriver.Chrome
) -> None:
    open_page(operator, guarded, "/coordinator")
    press(operator, "Pause the run")
    wait_until(has(".dialog", operator), 40)
    wait_until(lambda: find_violations(operator) == [], 40)  # it fades in: until then its contrast is low
    press(operator, "Cancel", ".dialog")
    press(operator, "Pause the run")
    press(operator, "Pause", ".dialog")
    wait_until(lambda: guarded.status()["phase"] == "paused", 40)
    wait_until(lambda: read(operator, ".level") == "Stalled", 40)
    press(operator, "Resume the run")
    wait_until(lambda: guarded.status()["phase"] != "paused", 40)


def test_rounds_take_what_the_operator_sets(guarded: RunningCoordinator, operator: webdriver.Chrome) -> None:
    open_page(operator, guarded, "/coordinator")
    type_into(operator, ".control input", "4")
    press(operator, "Set the round time")
    wait_until(lambda: guarded.status()["round_time_s"] == 4.0, 40)
    wait_until(lambda: "4 s" in guarded.status()["plan"], 30)


def test_invite_is_shown_once_and_revoked_when_the_operator_wants_it(
    guarded: RunningCoordinator, operator: webdriver.Chrome
) -> None:
    open_page(operator, guarded, "/coordinator")
    before = len(operator.find_elements(By.CSS_SELECTOR, ".invites tbody tr"))
    press(operator, "Issue an invite")
    wait_until(has(".new-invite", operator), 40)
    invite = read(operator, ".new-invite")
    assert invite.startswith("mh1.")
    assert invite != guarded.invite
    wait_until(lambda: len(operator.find_elements(By.CSS_SELECTOR, ".invites tbody tr")) == before + 1, 40)
    newest = ".invites tbody tr:first-child"
    press(operator, "Revoke", newest)
    press(operator, "Revoke", ".dialog")
    wait_until(lambda: "revoked" in read(operator, newest), 40)


def test_banned_worker_is_gone_until_it_is_let_in_again(
    guarded: RunningCoordinator, operator: webdriver.Chrome
) -> None:
    peer = find_peer(guarded, "bob")["peer"]
    open_page(operator, guarded, f"/peers/{peer}")
    press(operator, "Ban")
    type_into(operator, ".dialog input", "sends nonsense")
    press(operator, "Ban", ".dialog")
    wait_until(lambda: find_peer(guarded, "bob")["banned"] and not find_peer(guarded, "bob")["connected"], 40)
    open_page(operator, guarded, "/incidents")
    wait_until(lambda: "sends nonsense" in read(operator, ".content"), 40)
    open_page(operator, guarded, f"/peers/{peer}")
    press(operator, "Unban")
    wait_until(lambda: not find_peer(guarded, "bob")["banned"], 40)
    assert read_errors(operator) == []


def test_controls_are_not_there_when_nobody_is_signed_in(guarded: RunningCoordinator) -> None:
    for path in ("/", "/coordinator", "/peers"):
        with urllib.request.urlopen(guarded.page + path, timeout=10) as answer:  # noqa: S310 # our own http:// page
            page = answer.read().decode()
        assert "Pause the run" not in page
        assert "Issue an invite" not in page
        assert '"act": "ban"' not in page.replace('":"', '": "')


def test_open_page_refuses_when_the_operator_has_signed_out_elsewhere(
    guarded: RunningCoordinator, operator: webdriver.Chrome
) -> None:
    """The last test: it signs the browser out."""
    open_page(operator, guarded, "/coordinator")
    first = operator.current_window_handle
    operator.switch_to.new_window("tab")
    open_page(operator, guarded, "/")
    press(operator, "Sign out")
    wait_until(lambda: "Sign in" in read(operator, ".tools"), 40)
    operator.close()
    operator.switch_to.window(first)
    press(operator, "Pause the run")
    press(operator, "Pause", ".dialog")
    wait_until(lambda: "signed out" in read(operator, "body"), 40)
    assert guarded.status()["phase"] != "paused"
