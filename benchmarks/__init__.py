"""Benchmarks: one script a figure. Each prints the reference beside ours, measured in the same run.

python -m benchmarks.<name> [--quick] [--json FILE]
"""
