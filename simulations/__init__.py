"""The same core, codecs and merge under a virtual clock and network."""
