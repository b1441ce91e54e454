"""MATH-500, pass@k."""
