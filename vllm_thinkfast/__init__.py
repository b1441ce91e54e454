"""vLLM plugin that serves Llamba and MambaInLlama checkpoints.

Importing this package imports neither torch nor vllm: vLLM reads the entry point
``vllm_thinkfast.plugin:register`` in every process, also in those that serve another model.
"""

__version__ = "0.1.0"
