"""What must be kept for every peer, in temporary files: a simulation's memory grows with the chunk, not with the peers.

A file begins in memory and moves to the disk when it has grown. It is read and written, not mapped: pages of a map
count as the process's own memory until the system takes them back. Where the temporary folder lies in memory itself
(tmpfs), point TMPDIR at a disk. Both stores can be pickled, with all that is in them.

Shape letters: P peers, W values a peer.
"""

import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protocol.exchange.store import naming_full_disks

Rows = NDArray[np.float32]
_MEMORY_BYTES = 1 << 26  # of one file


class PeerVectors:
    """A vector for every peer, float32 (W,), zeros until it is written."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._file = tempfile.SpooledTemporaryFile(max_size=_MEMORY_BYTES)  # noqa: SIM115  # open as long as self
        self._folder = Path(tempfile.gettempdir())
        weakref.finalize(self, self._file.close)
        self._slots: dict[str, int] = {}
        self._free: list[int] = []

    def __contains__(self, peer: str) -> bool:
        """Whether the peer's vector was written since it was cleared."""
        return peer in self._slots

    def read(self, peers: Sequence[str]) -> Rows:
        """float32 (P, W), the caller's own."""
        rows = np.zeros((len(peers), self._width), np.float32)
        for peer, row in zip(peers, rows, strict=True):
            slot = self._slots.get(peer)
            if slot is not None:
                self._file.seek(4 * self._width * slot)
                self._file.readinto(row.data)
        return rows

    def write(self, peers: Sequence[str], rows: Rows) -> None:
        """Keep rows (P, W). Raises DiskFullError."""
        with naming_full_disks(self._folder):
            for peer, row in zip(peers, rows, strict=True):
                self._file.seek(4 * self._width * self._slot(peer))
                self._file.write(row.data)

    def clear(self, peer: str) -> None:
        """The peer's vector is zeros again; its place is given to others."""
        slot = self._slots.pop(peer, None)
        if slot is not None:
            self._free.append(slot)

    def _slot(self, peer: str) -> int:
        slot = self._slots.get(peer)
        if slot is None:
            slot = self._slots[peer] = self._free.pop() if self._free else len(self._slots)
        return slot

    def __getstate__(self) -> dict[str, Any]:
        return {"width": self._width, "rows": {peer: self.read([peer])[0] for peer in self._slots}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        PeerVectors.__init__(self, state["width"])
        for peer, row in state["rows"].items():
            self.write([peer], row[None])


class PayloadSpool:
    """The payloads of a round, by hash."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=_MEMORY_BYTES)  # noqa: SIM115  # open as long as self
        self._folder = Path(tempfile.gettempdir())
        weakref.finalize(self, self._file.close)
        self._places: dict[str, tuple[int, int]] = {}
        self._end = 0

    def add(self, payload_hash: str, payload: bytes) -> None:
        """Raises DiskFullError."""
        if payload_hash in self._places:
            return
        with naming_full_disks(self._folder):
            self._file.seek(self._end)
            self._file.write(payload)
        self._places[payload_hash] = (self._end, len(payload))
        self._end += len(payload)

    def read(self, payload_hash: str) -> bytes:
        """Raises KeyError for a payload that is not there."""
        offset, size = self._places[payload_hash]
        self._file.seek(offset)
        return self._file.read(size)

    def clear(self) -> None:
        self._places.clear()
        self._end = 0

    def __getstate__(self) -> dict[str, bytes]:
        return {payload_hash: self.read(payload_hash) for payload_hash in self._places}

    def __setstate__(self, payloads: dict[str, bytes]) -> None:
        PayloadSpool.__init__(self)
        for payload_hash, payload in payloads.items():
            self.add(payload_hash, payload)
