"""Depth-wise causal convolution over packed sequences with a cached tail; see ``reference.py``."""
