"""The page's small parts: plain HTML elements whose text is always text.

Peers' names and words are hostile: they go to the browser as text, never as HTML.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from urllib.parse import quote

from nicegui import ui

UNKNOWN = "\N{EN DASH}"


def box(tag: str, classes: str = "") -> ui.element:
    return ui.element(tag).classes(classes)


def text(tag: str, words: str, classes: str = "") -> ui.label:
    label = ui.label(words).classes(classes)
    label.tag = tag
    return label


def link(words: str, href: str, classes: str = "") -> ui.label:
    anchor = text("a", words, classes)
    anchor.props["href"] = href
    return anchor


def button(words: str, classes: str = "") -> ui.label:
    element = text("button", words, classes)
    element.props["type"] = "button"
    return element


@contextmanager
def section(name: str, heading: str, classes: str = "") -> Iterator[ui.label]:
    """A box with a heading that names it; `name` is the heading's id. Yields the heading."""
    with box("section", classes or name).props(f"aria-labelledby={name}"):
        yield text("h2", heading).props(f"id={name}")


class Facts:
    """A list of names and values (`dl`) whose values change."""

    def __init__(self, names: Mapping[str, str], classes: str = "") -> None:
        """`names`: what `show` calls a value -> what people read."""
        self._values: dict[str, ui.label] = {}
        with box("dl", classes):
            for key, name in names.items():
                with box("div"):
                    text("dt", name)
                    self._values[key] = text("dd", UNKNOWN, key)

    def show(self, **values: str) -> None:
        for key, words in values.items():
            self._values[key].text = words


def peer_path(peer: str) -> str:
    """The address of a peer's own page."""
    return f"/peers/{quote(peer, safe='')}"


def count(number: int, one: str, many: str = "") -> str:
    """`1 worker`, `1,200 workers`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def describe_bytes(size: float) -> str:
    """Three digits at most and a decimal unit."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 999.5 or unit == "TB":
            break
        size /= 1000
    return f"{size:.3g} {unit}" if size < 99.5 and unit != "B" else f"{size:.0f} {unit}"


def number(value: float | None, form: str = ",.0f", unit: str = "") -> str:
    """The value, or a dash when it is not known."""
    return UNKNOWN if value is None else f"{value:{form}}{unit}"


def listed(words: Sequence[str], most: int = 3) -> str:
    """`a, b, c and 4 more`."""
    more = len(words) - most
    return ", ".join(words[:most]) + (f" and {more} more" if more > 0 else "")
