"""A scenario from a real run: what its journal shows, what follows from that, and how it is written down."""
