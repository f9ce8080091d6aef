"""`/export`: everything as files, for whoever wants to look closer."""

from coordinator.dashboard.data_table import Column, DataTable, download, row
from coordinator.dashboard.elements import box, link, section, text
from coordinator.dashboard.frame import Frame, Viewer

TABLES = {
    "rounds": "one row a merged round: time, seconds, tokens, contributions, bytes, losses",
    "work": "one row a lease: who, when leased, committed, checked and merged, result and reason",
    "incidents": "what went wrong, with evidence and action",
    "receipts": "the ledger's receipts: who was credited how much for which lease",
    "peers": "everybody who ever joined, with totals",
}
COLUMNS = (Column("Table"), Column("Rows", "wide"), Column("CSV"), Column("Parquet"))
KINDS = {"csv": "CSV", "parquet": "Parquet"}
CHARTS = {"/loss": "Loss", "/rounds": "Rounds", "/communication": "Communication"}


async def build(_: Frame, __: Viewer) -> None:
    with section("tables", "Tables"):
        text("p", "As they are at this moment, whole. Times are Unix seconds.", "muted")
        rows = [
            row(
                name,
                name,
                words,
                *(download(label, f"/api/export/{name}.{kind}", f"{name}.{kind}") for kind, label in KINDS.items()),
            )
            for name, words in TABLES.items()
        ]
        DataTable(COLUMNS, labelledby="tables", empty="").show(rows)
    with section("charts", "Charts"):
        text("p", "Below each chart stand buttons that save it as SVG or PNG, in the colours that you see:")
        with box("ul"):
            for href, words in CHARTS.items():
                with box("li"):
                    link(words, href)
    with section("interfaces", "For programs"):
        text("p", "The same as JSON, described by an OpenAPI document; metrics for Prometheus.")
        with box("ul"):
            for href in ("/api/openapi.json", "/api/status", "/api/rounds", "/metrics"):
                with box("li"):
                    link(href, href)
    with section("model", "The model"):
        text("p", "On the coordinator's machine, in the Hugging Face layout:")
        text("code", "manyhands export RUN_FOLDER model", "command")
