"""Benchmarks: speed beside other libraries, one module per ``coterie bench`` command."""
