"""Benchmarks: each writes benchmarks/results/NAME.json; docs/benchmarks.md is generated from these files."""
