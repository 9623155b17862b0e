"""Benchmarks: `python -m benchmarks.NAME` prints a table, with `--json` exactly one JSON document."""
