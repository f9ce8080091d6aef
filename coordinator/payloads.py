"""Payloads of committed contributions: waits for each, looks inside, tells the core its norm or why it is refused.

A payload is taken only when a header named its hash and size before (commit, then reveal), so nobody can fill the disk.
"""

import asyncio
from collections.abc import Callable

import structlog

from coordinator.core.effects import CheckPayload
from coordinator.core.events import PayloadChecked
from protocol.codecs import get_codec
from protocol.errors import ManyhandsError
from protocol.exchange.piece_index import has_index, make_piece_index
from protocol.exchange.store import BlobStore
from protocol.signing import sha256_hex

log = structlog.get_logger()


class PayloadChecker:
    """Expected payloads by hash."""

    def __init__(self, store: BlobStore, num_parameters: int, submit: Callable[[PayloadChecked], None]) -> None:
        self._store = store
        self._num_parameters = num_parameters
        self._submit = submit
        self._expected: dict[str, CheckPayload] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def expect(self, check: CheckPayload) -> None:
        """A header was committed: its payload may come now. When it is here already it is checked at once."""
        self._expected[check.payload_hash] = check
        if self._store.has(check.payload_hash):
            self.arrived(check.payload_hash)

    def expected_size(self, payload_hash: str, peer: str) -> int | None:
        """Size in bytes of a payload that this peer may push, or None when nothing was announced."""
        check = self._expected.get(payload_hash)
        return check.payload_bytes if check is not None and check.peer == peer else None

    def is_known(self, payload_hash: str, peer: str) -> bool:
        """Whether these bytes were revealed before, or are due from another peer: a copy earns nothing."""
        check = self._expected.get(payload_hash)
        return self._store.has(payload_hash) if check is None else check.peer != peer

    def arrived(self, payload_hash: str, upload_bps: float = 0.0) -> None:
        """The blob is complete and its hash holds: look inside, in a thread. upload_bps: bits a second as it came."""
        check = self._expected.pop(payload_hash, None)
        if check is not None:
            task = asyncio.create_task(self._check(check, upload_bps))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def forget(self) -> None:
        """A round closed: what it still waited for is not taken any more."""
        self._expected.clear()

    async def _check(self, check: CheckPayload, upload_bps: float) -> None:
        norm, reason = await asyncio.to_thread(self._inspect, check)
        self._submit(
            PayloadChecked(
                peer=check.peer,
                payload_hash=check.payload_hash,
                norm=norm,
                upload_bps=upload_bps,
                refused_because=reason,
            )
        )

    def _inspect(self, check: CheckPayload) -> tuple[float, str]:
        try:
            payload = self._store.read(check.payload_hash)
            if len(payload) != check.payload_bytes:
                return 0.0, f"the payload has {len(payload)} bytes; its header says {check.payload_bytes}"
            codec = get_codec(check.codec, dict(check.codec_options))  # a payload written with others is refused
            norm = codec.inspect(payload, self._num_parameters).norm
            if has_index(len(payload)):
                index = make_piece_index(payload)
                if sha256_hex(index) != check.pieces_hash:
                    return 0.0, "the piece index that its header names is not this payload's"
                self._store.put(index)
            return norm, ""
        except ManyhandsError as error:
            return 0.0, str(error)
