"""Pure decisions: `handle(state, event, now_s) -> effects`. No I/O, no clock, no randomness of its own."""
