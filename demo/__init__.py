"""`make demo`: a real Llama against a MambaInLlama converted from it, both served by vLLM."""
