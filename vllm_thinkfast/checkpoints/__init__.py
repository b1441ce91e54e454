"""Readers of published checkpoint folders: one key map per format, in both directions.

Imports neither torch kernels nor vllm.
"""
