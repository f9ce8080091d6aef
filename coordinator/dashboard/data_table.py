"""A table whose rows change while people read it, and a phone's cards from the same markup."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nicegui import ui
from nicegui.events import GenericEventArguments

Cell = str | dict[str, str]
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Column:
    """`css`: `number` (right-aligned), `wide` (a whole line of a phone's card), `quiet`; several with blanks."""

    label: str
    css: str = ""
    key: str = ""
    sortable: bool = False


def row(key: str, *cells: Cell, css: str = "") -> Row:
    """A line of the table; `key` says which line it is when lines move."""
    return {"key": key, "cells": list(cells), "css": css}


def linked(text: str, href: str, sub: str = "") -> Cell:
    return {"text": text, "href": href, "sub": sub}


def download(text: str, href: str, file: str) -> Cell:
    return {"text": text, "href": href, "download": file}


def action(text: str, verb: str, label: str) -> Cell:
    """A button; `label` is what screen readers say."""
    return {"text": text, "act": verb, "label": label}


def titled(text: str, title: str, css: str = "") -> Cell:
    """Words that are cut short when there is no room, with the whole of them as a tooltip."""
    return {"text": text, "title": title, "css": css}


class DataTable(ui.element, component="data_table.js"):
    """Shows `rows`; while there are none, the sentence `empty`."""

    def __init__(
        self,
        columns: Sequence[Column],
        *,
        labelledby: str,
        empty: str,
        on_act: Callable[[str, str], Awaitable[None]] | None = None,
        on_sort: Callable[[str], Awaitable[None]] | None = None,
    ) -> None:
        """`on_act` is called with an action's verb and its row's key, `on_sort` with a column's key."""
        super().__init__()
        self.classes("data-table")
        self._rows: Sequence[Row] = ()
        self.props["columns"] = [
            {"label": column.label, "css": column.css, "key": column.key or column.label, "sortable": column.sortable}
            for column in columns
        ]
        self.props["rows"] = []
        self.props["labelledby"] = labelledby
        self.props["empty"] = empty
        if on_act is not None:
            act = on_act

            async def handle_act(event: GenericEventArguments) -> None:
                verb, key = event.args
                await act(str(verb), str(key))

            self.on("act", handle_act)
        if on_sort is not None:
            sort = on_sort

            async def handle_sort(event: GenericEventArguments) -> None:
                await sort(str(event.args))

            self.on("sort", handle_sort)

    def show(self, rows: Sequence[Row]) -> None:
        """Bring the rows up to date; nothing is sent when they are the same."""
        if rows is self._rows or rows == self._rows:
            return
        self._rows = rows
        self.props["rows"] = list(rows)

    def mark_sorting(self, key: str, *, descending: bool) -> None:
        self.props["sortedBy"] = key
        self.props["descending"] = descending
