"""Linear recurrence with one decay per head and token; see ``reference.py`` for the mathematics."""
