"""Arithmetic word problems for tiny models, pass@k."""
