"""Student models: Llamba and MambaInLlama with gradients, on packed rows."""

from thinkfast_distill.students.model import Student, build

__all__ = ["Student", "build"]
