"""Tests of the distillation package; paths mirror ``distill/thinkfast_distill``."""
