"""Configuration classes: published config files under the house's field names.

Imports neither torch nor vllm, so that the distillation package can use the same classes.
"""

from vllm_thinkfast.configs.llamba import LlambaConfig
from vllm_thinkfast.configs.mamba_in_llama import MambaInLlamaConfig

__all__ = ["LlambaConfig", "MambaInLlamaConfig"]
