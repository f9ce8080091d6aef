"""Decides and remembers: leases, rounds, the ledger. Never imports torch."""
