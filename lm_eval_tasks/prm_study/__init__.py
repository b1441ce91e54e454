"""How good a reward model must be: the paper's open check, on stored samples.

Scores of a process reward model are made worse in a controlled way, replaced by another model's, or
replaced by a verifier of known accuracy; what Best-of-N and weighted Best-of-N then gain or lose
against the majority vote is reported with intervals. Nothing here needs a model.
"""
