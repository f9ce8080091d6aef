"""The page with a long history: 1,000 peers and 10,000 rounds, ten viewers in a real Chromium.

A run folder is filled by the coordinator's own core under a virtual clock (dashboard_fill.py), a real coordinator is
started on it, and Chromium opens its pages. Printed are the first paint of each page, how long a change takes to show
on all viewers' pages, and what share of a core the coordinator spends more with ten viewers than with none. While it is
measured, the run is paused and resumed every two seconds, so that there is something to show.

    python -m benchmarks.dashboard [--quick] [--json FILE] [--folder DIR]
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from benchmarks.dashboard_fill import fill
from benchmarks.figures import Figure, write_figures

PEERS, ROUNDS, VIEWERS = 1_000, 10_000, 10
QUICK_PEERS, QUICK_ROUNDS = 100, 500
HTTP_PORT, GRPC_PORT = 17641, 17640
CPU_OVER_S = 30.0
CHANGE_EVERY_S = 2.0
CHANGES = 8
PAGES = ("/", "/loss", "/rounds", "/peers", "/incidents", "/ledger", "/communication", "/coordinator", "/cost")
PAUSED = "paused by the operator"  # what the verdict says on every page
READINGS = (
    "/api/status",
    "/api/waterfall",
    "/api/rounds",
    "/api/incidents",
    "/api/markers",
    "/api/leaderboard",
    "/api/communication",
    "/api/receipts",
    "/api/curves",
    "/api/cost",
    "/metrics",
)
FIRST_PAINT = "return performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? null"


@dataclass(frozen=True, slots=True)
class Coordinator:
    """A coordinator process on the filled folder."""

    folder: Path
    process: "subprocess.Popen[str]"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{HTTP_PORT}"

    def operate(self, verb: str) -> None:
        subprocess.run(
            [sys.executable, "-m", "manyhands", "coordinator", verb, str(self.folder)],
            check=True,
            stdout=subprocess.DEVNULL,
        )

    def cpu_share(self, over_s: float, meanwhile: Callable[[float], None]) -> float:
        """Share of one core that the process uses while `meanwhile(until)` goes on."""
        process = psutil.Process(self.process.pid)
        started_s, before = time.monotonic(), process.cpu_times()
        meanwhile(started_s + over_s)
        after, seconds = process.cpu_times(), time.monotonic() - started_s
        return (after.user + after.system - before.user - before.system) / seconds


@contextmanager
def run_coordinator(folder: Path) -> Iterator[Coordinator]:
    """Start one and wait until its page answers."""
    command = [sys.executable, "-m", "manyhands", "coordinator", "start", str(folder), "--no-validator", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            if process.stdout is None or not process.stdout.readline():
                raise SystemExit("the coordinator did not start")
            yield Coordinator(folder, process)
        finally:
            process.terminate()
            process.wait(30)


@contextmanager
def open_chromium() -> Iterator[webdriver.Chrome]:
    """Headless; nothing of it is kept."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    # Windows that are not in front must not sleep: ten people look at the same time.
    flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-timer-throttling")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*flags, "--disable-renderer-backgrounding", f"--user-data-dir={profile}"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        try:
            yield driver
        finally:
            driver.quit()


def wait_for(predicate: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not predicate():
        if time.monotonic() > deadline_s:
            raise SystemExit("the page did not show what it should have shown")
        time.sleep(0.02)


def says(driver: webdriver.Chrome, words: str) -> bool:
    return words in str(driver.execute_script("return document.body.innerText"))


def measure_paint(driver: webdriver.Chrome, url: str) -> float:
    """Milliseconds from the request to the first contentful paint."""
    driver.get(url)
    found: list[float] = []

    def is_painted() -> bool:
        paint = driver.execute_script(FIRST_PAINT)
        found.extend([] if paint is None else [float(paint)])
        return paint is not None

    wait_for(is_painted)
    return found[-1]


def measure_readings(url: str) -> dict[str, float]:
    """Milliseconds that each address of the API takes, the first time."""
    taken = {}
    for address in READINGS:
        started_s = time.perf_counter()
        with urllib.request.urlopen(url + address) as answer:  # noqa: S310 # our own coordinator
            answer.read()
        taken[address] = 1000 * (time.perf_counter() - started_s)
    return taken


def measure_updates(coordinator: Coordinator, driver: webdriver.Chrome, windows: Sequence[str]) -> list[float]:
    """Milliseconds from the operator's command, when it is carried out, until all viewers' pages show it."""
    taken = []
    for change in range(CHANGES):
        pauses = change % 2 == 0
        coordinator.operate("pause" if pauses else "resume")
        started_s = time.perf_counter()
        for window in windows:
            driver.switch_to.window(window)
            wait_for(lambda: says(driver, PAUSED) == pauses)  # noqa: B023 # called at once
        taken.append(1000 * (time.perf_counter() - started_s))
    return taken


def keep_changing(coordinator: Coordinator) -> Callable[[float], None]:
    def change(until_s: float) -> None:
        pauses = True
        while time.monotonic() < until_s:
            coordinator.operate("pause" if pauses else "resume")
            pauses = not pauses
            time.sleep(CHANGE_EVERY_S)
        coordinator.operate("resume")

    return change


def measure(folder: Path) -> dict[str, Figure]:
    figures: dict[str, Figure] = {"database_mb": sum(f.stat().st_size for f in folder.glob("run.db*")) / 1e6}
    started_s = time.monotonic()
    with run_coordinator(folder) as coordinator, open_chromium() as driver:
        figures["coordinator_start_s"] = time.monotonic() - started_s
        wait_for(lambda: _answers(coordinator.url))
        with urllib.request.urlopen(f"{coordinator.url}/api/status") as answer:  # noqa: S310 # our own coordinator
            status = json.load(answer)
        figures |= {"rounds": status["round"], "peers": len(status["peers"])}
        alone = coordinator.cpu_share(CPU_OVER_S, keep_changing(coordinator))
        for address, taken in measure_readings(coordinator.url).items():
            figures[f"read{address.replace('/', '_')}_ms"] = taken
        for page in PAGES:
            figures[f"first_paint{page.replace('/', '_')}_ms"] = measure_paint(driver, coordinator.url + page)
        again = [measure_paint(driver, coordinator.url) for _ in range(5)]
        figures["first_paint_again_ms"] = median(again)
        driver.get(coordinator.url)
        for _ in range(VIEWERS - 1):
            driver.switch_to.new_window("window")
            driver.get(coordinator.url)
        updates = measure_updates(coordinator, driver, driver.window_handles)
        figures |= {"update_median_ms": median(updates), "update_max_ms": max(updates)}
        with_viewers = coordinator.cpu_share(CPU_OVER_S, keep_changing(coordinator))
        figures |= {
            "cpu_share_alone": alone,
            "cpu_share_with_viewers": with_viewers,
            "cpu_share_of_page": with_viewers - alone,
            "memory_mb": psutil.Process(coordinator.process.pid).memory_info().rss / 1e6,
        }
    return figures


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url + "/api/coordinator").close()  # noqa: S310 # our own coordinator
    except urllib.error.URLError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description="First paint, update time and CPU of the page with a long history.")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_PEERS} peers and {QUICK_ROUNDS} rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as a flat JSON object")
    parser.add_argument("--folder", type=Path, help="keep the filled run here; use it again when it is there")
    options = parser.parse_args()
    num_peers, num_rounds = (QUICK_PEERS, QUICK_ROUNDS) if options.quick else (PEERS, ROUNDS)
    figures: dict[str, Figure] = {"viewers": VIEWERS}
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)) / "run"
        if not (folder / "run.db").is_file():
            folder.parent.mkdir(parents=True, exist_ok=True)
            print(f"filling {num_rounds:,} rounds of {num_peers:,} peers …", flush=True)
            figures["fill_s"] = fill(
                folder,
                num_peers=num_peers,
                num_rounds=num_rounds,
                http_port=HTTP_PORT,
                grpc_port=GRPC_PORT,
                progress=lambda done: print(f"  {done:,} rounds", flush=True) if done % 1000 == 0 else None,
            )
        figures |= measure(folder)
    figures["load_average"] = psutil.getloadavg()[0]
    for name, value in figures.items():
        print(f"{name:32} {value:,.3f}" if isinstance(value, float) else f"{name:32} {value:,}")
    write_figures(options.json, figures)


if __name__ == "__main__":
    main()
