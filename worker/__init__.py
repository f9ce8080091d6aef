"""Computes: inner steps on leased data, on whatever machine this is."""
