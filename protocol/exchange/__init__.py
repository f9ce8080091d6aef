"""How large things travel: content-addressed payloads, kept in a store and fetched by hash."""

from protocol.exchange.lean_hivemind import defer_hivemind

defer_hivemind()
