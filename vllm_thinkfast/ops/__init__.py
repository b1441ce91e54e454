"""Functions on tensors, one folder per operator: ``reference.py`` and one file per backend.

==================  ===============================================================================
operator            what
==================  ===============================================================================
``discrete_ssd``    h = exp(g) h + x (outer) B, y = h C + D x; scalar decay per head and token.
                    Llamba (g = -softplus(a)) and Mamba-2 (g = dt A, x scaled by dt)
``selective_scan``  h = exp(dt A) h + dt x B, y = h C + D x; decay per channel and state.
                    Mamba-1
``causal_conv``     depth-wise causal convolution over packed sequences with cached state
==================  ===============================================================================

Every operator has two entry points with the same arguments in every backend: one for packed whole
sequences (prefill), one for a single token per sequence (decode). On CPU they run the kernels of
``cpu_kernels.py``, or torch where those cannot be had; ``fused_decode.py`` joins two of them to the
decode step of a whole mixer.
"""
