"""Mixers on vLLM's ``MambaBase``: projections, state binding and the opaque custom op."""
