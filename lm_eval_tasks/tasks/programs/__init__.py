"""Thirty small Python functions with unit tests, shipped with the package."""
