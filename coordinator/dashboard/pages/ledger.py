"""`/ledger`: who is credited what, and the proof of each receipt."""

from coordinator.dashboard.data_table import Cell, Column, DataTable, Row, download, linked, row
from coordinator.dashboard.elements import UNKNOWN, Facts, count, peer_path, section, text
from coordinator.dashboard.frame import Frame, Viewer
from coordinator.dashboard.receipts import ReceiptTable
from coordinator.dashboard.snapshot import Snapshot
from coordinator.records.reader import read_leaderboard, read_receipts
from coordinator.records.views import Standing

MAX_STANDINGS, MAX_RECEIPTS = 100, 12
COLUMNS = (
    Column("Worker"),
    Column("Rank", "number"),
    Column("Tokens", "number"),
    Column("Share", "number"),
    Column("Accepted", "number"),
    Column("Late", "number"),
    Column("Refused", "number"),
    Column("Compute", "number"),
    Column("Device", "wide quiet"),
    Column("Proof"),
)


async def build(_: Frame, viewer: Viewer) -> None:
    board = viewer.board
    engine = board.server.database.readers
    with section("chain", "The chain"):
        text(
            "p", "Each entry is signed and names the hash of the one before; nothing can be changed unnoticed.", "muted"
        )
        facts = Facts({"entry": "Last receipt", "workers": "Workers credited", "tokens": "Tokens credited"})
        text("p", "Head", "muted")
        head = text("code", "", "chain-head")
        text("p", "The whole of it, computed again on any machine that has the run folder:", "muted")
        text("code", "manyhands verify RUN_FOLDER", "command")
    with section("leaderboard", "Leaderboard"):
        board_note = text("p", "", "muted")
        standings = DataTable(COLUMNS, labelledby="leaderboard", empty="Nobody was credited yet.")
    with section("receipts", "Newest receipts"):
        receipts = ReceiptTable("receipts")

    async def show(snapshot: Snapshot) -> None:
        lines = await board.share(read_leaderboard, engine, MAX_STANDINGS, every_s=3.0)
        newest = await board.share(read_receipts, engine, None, MAX_RECEIPTS)
        head.text = snapshot.ledger_head
        workers = sum(peer["credited_tokens"] > 0 for peer in snapshot.status["peers"])
        facts.show(
            entry=f"{newest[0].seq:,}" if newest else UNKNOWN,
            workers=f"{workers:,}",
            tokens=f"{snapshot.status['tokens']:,}",
        )
        board_note.text = f"The first {MAX_STANDINGS} of {count(workers, 'worker')}." if workers > MAX_STANDINGS else ""
        standings.show([describe_standing(one) for one in lines])
        names = {peer["peer"]: peer["name"] for peer in snapshot.status["peers"]}
        receipts.show(newest, names, snapshot.now_unix_s)

    viewer.updaters.append(show)


def describe_standing(one: Standing) -> Row:
    proof: Cell = UNKNOWN
    if one.last_receipt_seq is not None:
        proof = download("Newest proof", f"/api/proof/{one.last_receipt_seq}", f"receipt-{one.last_receipt_seq}.json")
    return row(
        one.peer,
        linked(one.name or one.peer[-8:], peer_path(one.peer)),
        f"{one.rank:,}",
        f"{one.tokens:,}",
        f"{100 * one.share:.1f} %",
        f"{one.accepted:,}",
        f"{one.late:,}",
        f"{one.refused:,}",
        f"{one.compute_s / 3600:,.2f} h",
        one.device or UNKNOWN,
        proof,
    )
