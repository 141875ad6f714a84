"""Measurements, each a command whose last line is one JSON object: `python -m benchmarks.NAME [--quick]`."""
