"""HumanEval: Python functions with unit tests."""
