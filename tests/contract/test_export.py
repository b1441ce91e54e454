"""What was trained is what is served: student logits before export, vLLM's after."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT / "distill") not in sys.path:  # where thinkfast-distill is not installed
    sys.path.insert(0, str(ROOT / "distill"))

from tests.distill.students.models import packed  # noqa: E402
from tests.reference.random_checkpoints import write_tokenizer  # noqa: E402
from tests.vllm_thinkfast.models.engines import (  # noqa: E402
    EnginePool,
    log_probabilities,
    random_prompts,
)
from thinkfast_distill import students  # noqa: E402
from thinkfast_distill.export import export  # noqa: E402
from thinkfast_distill.students import Student  # noqa: E402
from vllm_thinkfast.configs import LlambaConfig, MambaInLlamaConfig  # noqa: E402

pytestmark = pytest.mark.engine

TOLERANCE = 2e-3
"""Largest allowed difference of a float32 log-probability."""

SIZES = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "max_position_embeddings": 1024,
}
# vLLM's CPU attention wants head widths of 32 or 64. As M1, Mamba-1 cuts them into slices of 16.
ATTENTION = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "attention_layers": [1],
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}
MAMBA2 = {"mamba_num_heads": 4, "mamba_n_groups": 2, "ssm_state_size": 32}
MAMBA1 = {"mamba_num_heads": 8, "mamba_n_groups": 4, "ssm_state_size": 16}

KINDS = {
    "llamba": lambda: LlambaConfig(
        **SIZES, num_heads=4, n_groups=4, ssm_state_size=16, tie_word_embeddings=True
    ),
    # Of a teacher with a bias on o_proj.
    "llamba_biases": lambda: LlambaConfig(
        **SIZES, num_heads=4, n_groups=4, ssm_state_size=16, use_bias=True
    ),
    "mambainllama_mamba2": lambda: MambaInLlamaConfig(
        **SIZES, **ATTENTION, **MAMBA2, mamba_version="mamba2", tie_word_embeddings=True
    ),
    "mambainllama_mamba1": lambda: MambaInLlamaConfig(
        **SIZES, **ATTENTION, **MAMBA1, mamba_version="mamba1"
    ),
}


@pytest.fixture(scope="module")
def engines() -> Iterator[EnginePool]:
    pool = EnginePool()
    yield pool
    pool.close()


def random_student(config: LlambaConfig | MambaInLlamaConfig) -> Student:
    """Weights of which every one matters, also where a fresh student has ones or zeros."""
    torch.manual_seed(11)
    student = students.build(config)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.2 * parameter.std().nan_to_num(1.0) * torch.randn_like(parameter))
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
        student.model.embed_tokens.weight.mul_(0.2)
    return student


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_served_is_trained(kind: str, engines: EnginePool, tmp_path: Path) -> None:
    """Prompts of two to several chunks of tokens, packed in training and batched in serving."""
    student = random_student(KINDS[kind]())
    (tmp_path / "teacher").mkdir()
    write_tokenizer(tmp_path / "teacher", SIZES["vocab_size"])
    card = {"name": kind, "command": "test"}
    folder = export(student, student.config, tmp_path / "teacher", tmp_path / "out", card=card)
    prompts = random_prompts([2, 33, 131], SIZES["vocab_size"], seed=5)
    with torch.no_grad():
        trained = student(packed([prompts]))[0].double().log_softmax(-1)
    assert trained.exp().max() < 0.999  # a one-hot distribution would hide errors
    served = log_probabilities(engines.get(folder), prompts)
    for prompt, ours, found in zip(prompts, trained.split([2, 33, 131]), served, strict=True):
        error = (found.double() - ours[:-1]).abs().max()
        assert error <= TOLERANCE, f"{kind}, {len(prompt)} tokens: max error {error:.2e}"
