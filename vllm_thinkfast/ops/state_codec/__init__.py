"""States in 8 bits: one scale per row of N, rounded up or down at random; see ``reference.py``."""
