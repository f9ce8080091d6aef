"""What must be kept for every peer: in memory while it is little, then in temporary files.

So a simulation's memory grows with the chunk, not with the peers. A file is read and written, not mapped: pages of a
map count as the process's own memory until the system takes them back. Where the temporary folder lies in memory itself
(tmpfs), point TMPDIR at a disk. Both stores can be pickled, with all that is in them.

Shape letters: P peers, W values a peer.
"""

import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from protocol.exchange.store import naming_full_disks

Rows = NDArray[np.float32]
_MEMORY_BYTES = 1 << 26  # of one store, before it goes to a file


class _Spill:
    """A temporary file, there from the first write on."""

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Raises DiskFullError."""
        with naming_full_disks(Path(tempfile.gettempdir())):
            if self._file is None:
                self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  # open as long as self
                weakref.finalize(self, self._file.close)
            self._file.seek(offset)
            view = memoryview(data)
            while view:
                view = view[self._file.write(view) :]

    def read_into(self, offset: int, buffer: memoryview) -> None:
        if self._file is None:
            raise ValueError("nothing was written")
        self._file.seek(offset)
        while buffer:
            buffer = buffer[self._file.readinto(buffer) :]  # type: ignore[attr-defined]  # a FileIO


class PeerVectors:
    """A vector for every peer, float32 (W,), zeros until it is written."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._rows = np.empty((0, width), np.float32)  # the first slots
        self._most_rows = _MEMORY_BYTES // (4 * width) if width else 0
        self._spill = _Spill()  # the others
        self._slots: dict[str, int] = {}
        self._free: list[int] = []

    def __contains__(self, peer: str) -> bool:
        """Whether the peer's vector was written since it was cleared."""
        return peer in self._slots

    def read(self, peers: Sequence[str]) -> Rows:
        """float32 (P, W), the caller's own."""
        rows = np.zeros((len(peers), self._width), np.float32)
        for place, peer in enumerate(peers):
            slot = self._slots.get(peer)
            if slot is None:
                continue
            if slot < self._most_rows:
                rows[place] = self._rows[slot]
            else:
                self._spill.read_into(self._offset(slot), rows[place].data.cast("B"))
        return rows

    def read_one(self, peer: str) -> Rows:
        """float32 (W,), to look at until the next write: where it lies in memory, it is not copied."""
        slot = self._slots.get(peer, self._most_rows)
        rows = self._rows[slot : slot + 1] if slot < self._most_rows else self.read([peer])
        return rows.reshape(self._width)

    def write(self, peers: Sequence[str], rows: Rows) -> None:
        """Keep rows (P, W). Raises DiskFullError."""
        slots = [self._slot(peer) for peer in peers]
        if len(rows) == len(slots) and max(slots, default=0) < self._most_rows:
            self._rows[slots] = rows
            return
        for slot, row in zip(slots, rows, strict=True):
            if slot < self._most_rows:
                self._rows[slot] = row
            else:
                self._spill.write(self._offset(slot), row.data.cast("B"))

    def clear(self, peer: str) -> None:
        """The peer's vector is zeros again; its place is given to others."""
        slot = self._slots.pop(peer, None)
        if slot is not None:
            self._free.append(slot)

    def _slot(self, peer: str) -> int:
        slot = self._slots.get(peer)
        if slot is None:
            slot = self._slots[peer] = self._free.pop() if self._free else len(self._slots)
            if len(self._rows) <= slot < self._most_rows:
                more = np.empty((min(self._most_rows, 2 * slot + 16), self._width), np.float32)
                more[: len(self._rows)] = self._rows
                self._rows = more
        return slot

    def _offset(self, slot: int) -> int:
        return 4 * self._width * (slot - self._most_rows)

    def __getstate__(self) -> dict[str, Any]:
        return {"width": self._width, "rows": {peer: self.read([peer])[0] for peer in self._slots}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        PeerVectors.__init__(self, state["width"])
        for peer, row in state["rows"].items():
            self.write([peer], row[None])


class PayloadSpool:
    """The payloads of a round, by hash."""

    def __init__(self) -> None:
        self.clear()

    def add(self, payload_hash: str, payload: bytes) -> None:
        """Raises DiskFullError."""
        if payload_hash in self._held or payload_hash in self._places:
            return
        if self._held_bytes + len(payload) <= _MEMORY_BYTES:
            self._held[payload_hash] = payload
            self._held_bytes += len(payload)
            return
        self._spill.write(self._end, payload)
        self._places[payload_hash] = (self._end, len(payload))
        self._end += len(payload)

    def read(self, payload_hash: str) -> bytes:
        """Raises KeyError for a payload that is not there."""
        held = self._held.get(payload_hash)
        if held is not None:
            return held
        offset, size = self._places[payload_hash]
        payload = bytearray(size)
        self._spill.read_into(offset, memoryview(payload))
        return bytes(payload)

    def clear(self) -> None:
        self._held: dict[str, bytes] = {}
        self._held_bytes = 0
        self._spill = _Spill()
        self._places: dict[str, tuple[int, int]] = {}
        self._end = 0

    def __getstate__(self) -> dict[str, bytes]:
        return {payload_hash: self.read(payload_hash) for payload_hash in (*self._held, *self._places)}

    def __setstate__(self, payloads: dict[str, bytes]) -> None:
        PayloadSpool.__init__(self)
        for payload_hash, payload in payloads.items():
            self.add(payload_hash, payload)
