"""Backends: what runs a graph on a target. One file or folder per backend; each defines one `Backend`."""
