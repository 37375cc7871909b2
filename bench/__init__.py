"""Benchmarks: python -m bench.ops, python -m bench.models; see README.md here."""
