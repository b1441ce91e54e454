"""Data: sources, mixing by tokens, packing, decontamination, and the ``arith`` problems."""
