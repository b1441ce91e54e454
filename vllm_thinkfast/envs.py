"""Every environment variable of the plugin: name, default, meaning. Read nowhere else.

==============================  =========  ======================================================
variable                        default    meaning
==============================  =========  ======================================================
VLLM_THINKFAST_OPS_BACKEND      (device)   operators to use: cpu, triton or reference. By default
                                           cpu on CPUs and triton on CUDA devices. "reference" is
                                           the sequential plain-torch code the tests compare with.
==============================  =========  ======================================================
"""

import os

OPS_BACKEND = "VLLM_THINKFAST_OPS_BACKEND"


def ops_backend() -> str | None:
    """Value of VLLM_THINKFAST_OPS_BACKEND, None if unset or empty."""
    return os.environ.get(OPS_BACKEND) or None
