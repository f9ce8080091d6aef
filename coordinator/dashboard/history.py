"""The run's closed rounds as the page needs them: curves of bounded size, and totals.

Reads each row once, in a thread, and keeps no rows: a run of a million rounds takes no more memory than one of a
thousand. What it holds is derived; the ledger is what counts.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Engine, select

from coordinator.storage.database import RoundRow

MAX_POINTS = 500
ROWS_A_READ = 20_000
RATE_WINDOW_S = 60.0


class Curve:
    """At most MAX_POINTS points of a curve that grows on its right: when it is full, neighbours are averaged in pairs.

    So points stay where they are until their number is halved, and the curve does not shimmer.
    """

    def __init__(self) -> None:
        self.points: list[tuple[float, float]] = []
        self._stride = 1  # values in one point
        self._in_last = 1  # values in the last point

    def add(self, x: float, y: float) -> None:
        """Append a value; `x` is not less than the last one's."""
        if self.points and self._in_last < self._stride:
            mean = self.points[-1][1]
            self._in_last += 1
            self.points[-1] = (x, mean + (y - mean) / self._in_last)
            return
        if len(self.points) == MAX_POINTS:
            pairs = zip(self.points[::2], self.points[1::2], strict=True)
            self.points = [(right[0], (left[1] + right[1]) / 2) for left, right in pairs]
            self._stride *= 2
        self.points.append((x, y))
        self._in_last = 1


class RoundHistory:
    """Follows the rounds table."""

    def __init__(self, engine: Engine) -> None:
        self.train = Curve()  # loss against tokens
        self.held_out = Curve()
        self.train_by_time = Curve()  # loss against hours since the first round
        self.held_out_by_time = Curve()
        self.first_unix_s: float | None = None
        self.last_held_out_loss: float | None = None
        self.payload_bytes = 0
        self.contributions = 0
        self.evaluations = 0
        self._engine = engine
        self._reading = asyncio.Lock()
        self._next_round = 0
        self._next_evaluated = 0
        self._recent: deque[tuple[float, int]] = deque()  # (unix_s, tokens_after) of the last RATE_WINDOW_S

    async def refresh(self) -> None:
        """Take in what is new in the table."""
        async with self._reading:
            for fetch, take in (
                (self._fetch_closed, self._take_closed),
                (self._fetch_evaluated, self._take_evaluated),
            ):
                while rows := await asyncio.to_thread(fetch):
                    take(rows)
                    if len(rows) < ROWS_A_READ:
                        break

    @property
    def last_merge_unix_s(self) -> float | None:
        """When the last round closed."""
        return self._recent[-1][0] if self._recent else None

    def tokens_per_s(self) -> float | None:
        """Credited tokens a second of all peers together, over the last minute or, when longer, the last round."""
        if len(self._recent) < 2:
            return None
        (first_s, first_tokens), (last_s, last_tokens) = self._recent[0], self._recent[-1]
        return (last_tokens - first_tokens) / (last_s - first_s) if last_s > first_s else None

    def hours(self, unix_s: float) -> float:
        """Since the first round was closed."""
        self.first_unix_s = unix_s if self.first_unix_s is None else self.first_unix_s
        return (unix_s - self.first_unix_s) / 3600

    def _fetch_closed(self) -> Sequence[Any]:
        columns = (
            RoundRow.round,
            RoundRow.unix_s,
            RoundRow.tokens_after,
            RoundRow.mean_loss,
            RoundRow.payload_bytes,
            RoundRow.contributions,
        )
        query = select(*columns).where(RoundRow.round >= self._next_round).order_by(RoundRow.round)
        with self._engine.connect() as connection:
            return connection.execute(query.limit(ROWS_A_READ)).all()

    def _fetch_evaluated(self) -> Sequence[Any]:
        query = (
            select(RoundRow.round, RoundRow.unix_s, RoundRow.tokens_after, RoundRow.held_out_loss)
            .where(RoundRow.round >= self._next_evaluated, RoundRow.held_out_loss.is_not(None))
            .order_by(RoundRow.round)
        )
        with self._engine.connect() as connection:
            return connection.execute(query.limit(ROWS_A_READ)).all()

    def _take_closed(self, rows: Sequence[Any]) -> None:
        for round_, unix_s, tokens_after, mean_loss, payload_bytes, contributions in rows:
            self.train.add(tokens_after, mean_loss)
            self.train_by_time.add(self.hours(unix_s), mean_loss)
            self.payload_bytes += payload_bytes
            self.contributions += contributions
            self._recent.append((unix_s, tokens_after))
            while len(self._recent) > 2 and self._recent[0][0] < unix_s - RATE_WINDOW_S:
                self._recent.popleft()
            self._next_round = round_ + 1

    def _take_evaluated(self, rows: Sequence[Any]) -> None:
        for round_, unix_s, tokens_after, held_out_loss in rows:
            self.held_out.add(tokens_after, held_out_loss)
            self.held_out_by_time.add(self.hours(unix_s), held_out_loss)
            self.last_held_out_loss = held_out_loss
            self.evaluations += 1
            self._next_evaluated = round_ + 1
