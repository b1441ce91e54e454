"""Draw samples from a model into a `lm_eval_tasks.samples.SampleStore`.

Engines are imported inside the functions that start them: importing this package needs none.
"""
