"""Pictures of the dashboard on a real run: `python -m tests.browser.screenshots [--all] [FOLDER]`.

Without `--all` those that the documentation shows.
"""

import argparse
import base64
import tempfile
from pathlib import Path
from typing import Any

from selenium import webdriver

from coordinator.dashboard.frame import NAVIGATION
from tests.browser.chromium import has, open_browser, prefer, resize
from tests.processes import RunningCoordinator, start_coordinator, start_worker, wait_until

ROUNDS = 15
SHOWN = (("/", 1280, "light"), ("/rounds?round=12", 1280, "dark"), ("/", 390, "dark"))
MODEL = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 2}
RUN: dict[str, Any] = {
    "name": "garden",
    "model": {"config": {**MODEL, "num_key_value_heads": 2}},
    "train": {"tokens": 20_000_000, "batch_sequences": 8},
    "round": {"inner_steps": 100},
}
WORKERS = ("attic", "bea's laptop", "library")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("docs/images"))
    parser.add_argument("--all", action="store_true", help="every page, on both widths, light and dark")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    shown = SHOWN
    if arguments.all:
        shown = tuple((path, width, how) for path in NAVIGATION for width in (1280, 390) for how in ("light", "dark"))
    with tempfile.TemporaryDirectory() as place, start_coordinator(Path(place) / "garden", **RUN) as run:
        starts = [start_worker(run.invite, Path(place) / f"worker-{name[:3]}", name=name) for name in WORKERS]
        with starts[0], starts[1], starts[2]:
            wait_until(lambda: run.status()["round"] >= ROUNDS, 400)
            with open_browser(1280) as driver:
                for path, width, scheme in shown:
                    page = path.partition("?")[0].strip("/") or "overview"
                    target = arguments.folder / f"dashboard-{page}-{width}-{scheme}.png"
                    target.write_bytes(shoot(driver, run, path, width, scheme))
                    print(target)  # noqa: T201 # a command


def shoot(driver: webdriver.Chrome, run: RunningCoordinator, path: str, width: int, scheme: str) -> bytes:
    """The whole page as PNG, as long as it is."""
    prefer(driver, scheme)
    resize(driver, width, 700)
    driver.get(run.page + path)
    wait_until(has(".verdict .round", driver), 40)
    if path in ("/", "/loss"):
        wait_until(has(".loss .nicegui-echart svg path", driver), 40)
    driver.execute_async_script("setTimeout(arguments[0], 1500)")  # until the charts have their size
    height = driver.execute_script("return document.documentElement.scrollHeight")
    clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
    shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    return base64.b64decode(shot["data"])


if __name__ == "__main__":
    main()
