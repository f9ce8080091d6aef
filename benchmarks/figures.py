"""What all benchmarks share: their two options, and the file of figures that documents and checks are made from.

A figures file is one flat JSON object: name -> number or text. Nothing here measures.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

Figure = int | float | str


def parse_options(description: str, argv: list[str] | None = None) -> argparse.Namespace:
    """`quick`: bool, a run of about a minute; `json`: Path or None, where the figures go."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="smaller sizes, about a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as a flat JSON object")
    return parser.parse_args(argv)


def write_figures(path: Path | None, figures: Mapping[str, Figure]) -> None:
    """Write the figures to `path` (replacing what is there), or nowhere when it is None."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(figures), indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
