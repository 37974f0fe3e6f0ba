"""Passes: rewrites of a `Graph`, exact or lossy, one file per pass."""
