"""Students with weights to compare, and packed batches."""

from pathlib import Path

import torch

from thinkfast_distill import students
from thinkfast_distill.batch import PackedBatch
from vllm_thinkfast.checkpoints.config_reader import read_config
from vllm_thinkfast.checkpoints.folder import read_folder
from vllm_thinkfast.checkpoints.reader import house_tensors
from vllm_thinkfast.configs import LlambaConfig, MambaInLlamaConfig

LLAMBA = {
    "vocab_size": 53,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_heads": 4,
    "n_groups": 2,
    "ssm_state_size": 8,
    "tie_word_embeddings": True,
}
HYBRID = {
    "vocab_size": 53,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attention_layers": [1],
    "mamba_num_heads": 4,
    "mamba_n_groups": 2,
    "ssm_state_size": 8,
}


def config_of(kind, **changes):
    """A small configuration of one of the three kinds."""
    if kind == "llamba":
        return LlambaConfig(**{**LLAMBA, **changes})
    return MambaInLlamaConfig(**{**HYBRID, "mamba_version": kind, **changes})


def random_student(kind, seed=0, dtype=torch.float64, **changes):
    """A student whose every parameter matters: none is zero, one or constant."""
    torch.manual_seed(seed)
    student = students.build(config_of(kind, **changes))
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if parameter.dim() == 1 and "A_log" not in name and "dt" not in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
        student.model.embed_tokens.weight.mul_(0.3)
    return student.to(dtype)


def load_student(folder: Path, dtype=torch.float64):
    """A student with the weights of a folder in a published format."""
    config = read_config(folder)
    student = students.build(config)
    tensors = dict(house_tensors(config, read_folder(folder), source=str(folder)))
    if config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    student.load_state_dict(tensors)
    return student.to(dtype)


def packed(rows, pad_to=None):
    """A batch from rows of documents, each a list of token ids."""
    length = pad_to or max(sum(map(len, row)) for row in rows)
    ids, positions, documents = [], [], []
    for row in rows:
        row_ids = [i for document in row for i in document]
        row_positions = [p for document in row for p in range(len(document))]
        row_documents = [d for d, document in enumerate(row) for _ in document]
        missing = length - len(row_ids)
        ids.append(row_ids + [0] * missing)
        positions.append(row_positions + list(range(missing)))
        documents.append(row_documents + [-1] * missing)
    document_ids = torch.tensor(documents, dtype=torch.int32)
    return PackedBatch(torch.tensor(ids), torch.tensor(positions), document_ids, document_ids >= 0)


def random_documents(lengths, seed, vocab_size=53):
    """Token ids of documents with the given lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab_size, (n,), generator=generator).tolist() for n in lengths]
