"""vLLM model classes, read top down: block, model, causal language model."""
