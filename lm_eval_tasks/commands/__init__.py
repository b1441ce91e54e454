"""The subcommands of ``thinkfast-eval``, one module each.

A module has ``add_arguments(parser)`` and ``run(options) -> int``; `lm_eval_tasks.cli` imports it
when its name is given, so that no subcommand waits for what another one imports.
"""
