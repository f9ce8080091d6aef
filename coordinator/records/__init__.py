"""What happened in a run, kept for people. Nothing is decided by it; the ledger is what counts."""
