"""Measurements. Each module is run with ``python -m bench.NAME`` and compares with a baseline in the same run."""
