"""Every environment variable of the plugin: name, default, meaning. Read nowhere else.

==============================  =========  ======================================================
variable                        default    meaning
==============================  =========  ======================================================
VLLM_THINKFAST_OPS_BACKEND      (device)   operators to use: cpu, triton or reference. By default
                                           cpu on CPUs and triton on CUDA devices. "reference" is
                                           the sequential plain-torch code the tests compare with.
VLLM_THINKFAST_FORK             1          0: every sample of a prompt prefills it for itself, and
                                           vLLM's own defaults for prefix caching apply.
==============================  =========  ======================================================
"""

import os

OPS_BACKEND = "VLLM_THINKFAST_OPS_BACKEND"
FORK = "VLLM_THINKFAST_FORK"


def ops_backend() -> str | None:
    """Value of VLLM_THINKFAST_OPS_BACKEND, None if unset or empty."""
    return os.environ.get(OPS_BACKEND) or None


def fork() -> bool:
    """Value of VLLM_THINKFAST_FORK.

    Raises:
        ValueError: it is neither 0 nor 1.
    """
    value = os.environ.get(FORK) or "1"
    if value not in ("0", "1"):
        raise ValueError(f"{FORK}={value}: accepted are 0 and 1; unset it for the default, 1.")
    return value == "1"
