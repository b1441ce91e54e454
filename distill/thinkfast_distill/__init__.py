"""Distils Llama teachers into Llamba and MambaInLlama students (arXiv 2502.20339)."""

__version__ = "0.1.0"
