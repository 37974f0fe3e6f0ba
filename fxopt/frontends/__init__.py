"""Frontends: one file per source of models; each returns a `Graph`."""
