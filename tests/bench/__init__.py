"""Benchmarks of the product on this machine: `python -m tests.bench [names…] [--json] [--scale 1.0]` (see docs/performance.md)."""
