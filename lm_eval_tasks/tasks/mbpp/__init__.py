"""MBPP: short Python programs with unit tests."""
