"""Receipts as a table, each with its proof to download."""

from collections.abc import Mapping, Sequence

from coordinator.dashboard.data_table import Column, DataTable, download, linked, row
from coordinator.dashboard.elements import peer_path
from coordinator.dashboard.snapshot import describe_age
from coordinator.records.views import ReceiptLine

COLUMNS = (
    Column("Entry", "number"),
    Column("Round", "number"),
    Column("When"),
    Column("Peer", "wide"),
    Column("Shards", "number"),
    Column("Tokens", "number"),
    Column("Hash", "mono"),
    Column("Proof"),
)
PEER = 3


class ReceiptTable:
    def __init__(self, labelledby: str, *, with_peer: bool = True) -> None:
        self._with_peer = with_peer
        columns = COLUMNS if with_peer else COLUMNS[:PEER] + COLUMNS[PEER + 1 :]
        self._table = DataTable(
            columns, labelledby=labelledby, empty="No receipt yet: they are written when a round is merged."
        )

    def show(self, receipts: Sequence[ReceiptLine], names: Mapping[str, str], now_unix_s: float) -> None:
        """`names` by peer."""
        rows = []
        for receipt in receipts:
            cells = [
                f"{receipt.seq:,}",
                linked(f"{receipt.round:,}", f"/rounds?round={receipt.round}"),
                describe_age(now_unix_s - receipt.unix_s),
                linked(names.get(receipt.peer) or receipt.peer[-8:], peer_path(receipt.peer)),
                f"{receipt.shards:,}",
                f"{receipt.tokens:,}",
                receipt.hash[:12],
                download("Proof", f"/api/proof/{receipt.seq}", f"receipt-{receipt.seq}.json"),
            ]
            rows.append(row(str(receipt.seq), *(cells if self._with_peer else cells[:PEER] + cells[PEER + 1 :])))
        self._table.show(rows)
