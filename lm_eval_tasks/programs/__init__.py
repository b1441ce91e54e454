"""Answers that are Python programs: found in a text, run in a sandbox, judged by unit tests.

`extract` finds the program, `checks` says what a problem asks of it, `sandbox` runs it, `grading`
puts them together for `lm_eval_tasks.scoring`. The child side is `judge` (runs the tests), `guest`
(runs the program), `wire` (what they say to each other) and `confine` (what they cannot do). This
file and the child side import nothing but the standard library: a child starts without the rest.
"""
