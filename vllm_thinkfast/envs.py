"""Every environment variable of the plugin: name, default, meaning. Read nowhere else.

==============================  =========  ======================================================
variable                        default    meaning
==============================  =========  ======================================================
VLLM_THINKFAST_OPS_BACKEND      (device)   operators to use: cpu, triton or reference. By default
                                           cpu on CPUs and triton on CUDA devices. "reference" is
                                           the sequential plain-torch code the tests compare with.
VLLM_THINKFAST_FORK             1          0: every sample of a prompt prefills it for itself, and
                                           vLLM's own defaults for prefix caching apply.
VLLM_THINKFAST_SSM_STATE        (dtype)    int8: the SSM states in the cache are 8 bits with a scale
                                           per row. By default --mamba-ssm-cache-dtype decides.
==============================  =========  ======================================================
"""

import os

OPS_BACKEND = "VLLM_THINKFAST_OPS_BACKEND"
FORK = "VLLM_THINKFAST_FORK"
SSM_STATE = "VLLM_THINKFAST_SSM_STATE"


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


def is_ssm_state_int8() -> bool:
    """Whether VLLM_THINKFAST_SSM_STATE asks for 8-bit SSM states.

    Raises:
        ValueError: its value is neither empty nor int8.
    """
    value = os.environ.get(SSM_STATE) or ""
    if value not in ("", "int8"):
        raise ValueError(
            f"{SSM_STATE}={value}: accepted is int8; unset it for what --mamba-ssm-cache-dtype "
            "says."
        )
    return value == "int8"
