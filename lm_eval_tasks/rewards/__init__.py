"""Process reward models: a score for every step of a sampled solution.

Scoring is a phase of its own, after sampling: ``thinkfast-eval reward RUN --reward SPEC`` reads a
run folder and writes ``scores/<name>.jsonl``. A reward model is a published protocol (`protocols`:
which tokens, which positions, which numbers) on a backend (`hf`, `vllm_engine`, `remote`: who
computes the numbers). Nothing here imports torch or vllm before a model is opened.
"""
