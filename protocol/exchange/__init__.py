"""How large things travel: content-addressed payloads, kept in a store and fetched by hash."""
