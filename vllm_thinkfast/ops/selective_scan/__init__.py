"""Mamba-1's recurrence with one decay per channel and state; see ``reference.py``."""
