"""A run under a virtual clock: the real core and protocol rules, and peers whose work takes virtual time."""
