"""The conversion of a Llama to a MambaInLlama: what is copied, where to, and that it loads."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from demo.student import every_nth_layer, slice_order, write_student
from vllm_thinkfast.checkpoints.config_reader import read_config
from vllm_thinkfast.checkpoints.folder import read_folder
from vllm_thinkfast.checkpoints.reader import house_tensors

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 32
R = HEADS // KV_HEADS


def _convert(llama: Path, folder: Path, **options: object) -> dict[str, torch.Tensor]:
    folder.mkdir()
    write_student(llama, folder, **options)  # type: ignore[arg-type]
    return load_file(folder / "model.safetensors")


@pytest.fixture
def teacher(llama: Path) -> dict[str, torch.Tensor]:
    return load_file(llama / "model.safetensors")


def test_write_student_loads_as_published(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "student"
    _convert(llama, folder)
    stated = json.loads((folder / "config.json").read_text())
    assert stated["architectures"] == ["LlamaForCausalLM"]
    config = read_config(folder)
    assert config.weight_layout == "mambainllama_mamba1"
    assert config.attention_layers == [3]
    assert (config.ssm_state_size, config.mixer_size, config.xb_size) == (16, 192, 64)
    assert config.mamba_num_heads // config.mamba_n_groups == R
    found = dict(house_tensors(config, read_folder(folder), source=str(folder)))
    rows = 192 + 64 + 64 + 192 + 12
    assert found["model.layers.0.mamba.in_proj.weight"].shape == (rows, 192)
    assert (folder / "tokenizer_config.json").is_file()


def test_write_student_keeps_the_rest(
    llama: Path, teacher: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    student = _convert(llama, tmp_path / "student", attention_layers=[1, 4])
    copied = [n for n in teacher if ".self_attn." not in n]
    copied += [n for n in teacher if n.startswith(("model.layers.1.", "model.layers.4."))]
    for name in copied:
        assert torch.equal(student[name], teacher[name]), name
    attention = {n.split(".")[2] for n in student if ".self_attn." in n}
    assert attention == {"1", "4"}
    assert {n.split(".")[2] for n in student if ".mamba." in n} == {"0", "2", "3"}
    assert all(torch.isfinite(value).all() for value in student.values())


def test_write_student_d_state_of_a_head_copies_rows_in_order(
    llama: Path, teacher: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    student = _convert(llama, tmp_path / "student", d_state=HEAD_DIM)
    for mixer, attention in (
        ("C_proj", "q_proj"),
        ("B_proj", "k_proj"),
        ("in_proj_x", "v_proj"),
        ("out_proj", "o_proj"),
    ):
        expected = teacher[f"model.layers.0.self_attn.{attention}.weight"]
        assert torch.equal(student[f"model.layers.0.mamba.{mixer}.weight"], expected), mixer


@pytest.mark.parametrize("d_state", [8, 16, 32])
def test_write_student_pairs_slices_of_one_head(
    llama: Path, teacher: dict[str, torch.Tensor], tmp_path: Path, d_state: int
) -> None:
    """As the mixer repeats keys and values, every query slice meets its own head's slice."""
    student = _convert(llama, tmp_path / "student", d_state=d_state)
    mixer = {
        name.rpartition(".mamba.")[2]: value
        for name, value in student.items()
        if name.startswith("model.layers.2.mamba.")
    }

    def attention(name: str) -> torch.Tensor:
        return teacher[f"model.layers.2.self_attn.{name}_proj.weight"]

    def served(weight: torch.Tensor) -> torch.Tensor:
        """What the mixer computes with: slices of d_state rows, each repeated R times in a row."""
        return weight.view(-1, d_state, weight.shape[1]).repeat_interleave(R, dim=0)

    C = mixer["C_proj.weight"].view(-1, d_state, 192)
    out = mixer["out_proj.weight"].T.reshape(-1, d_state, 192)
    B, x = served(mixer["B_proj.weight"]), served(mixer["in_proj_x.weight"])
    assert len(C) == len(B) == len(x) == len(out) == HEADS * HEAD_DIM // d_state
    q = attention("q").view(HEADS, HEAD_DIM, 192)
    k, v = (attention(name).view(KV_HEADS, HEAD_DIM, 192) for name in "kv")
    o = attention("o").T.reshape(HEADS, HEAD_DIM, 192)
    seen = set()
    for s in range(len(C)):
        (match,) = [
            (h, m)
            for h in range(HEADS)
            for m in range(HEAD_DIM // d_state)
            if torch.equal(C[s], q[h, m * d_state : (m + 1) * d_state])
        ]
        seen.add(match)
        h, m = match
        rows = slice(m * d_state, (m + 1) * d_state)
        assert torch.equal(B[s], k[h // R, rows])
        assert torch.equal(x[s], v[h // R, rows])
        assert torch.equal(out[s], o[h, rows])
    assert len(seen) == len(C)


def test_write_student_is_reproducible(llama: Path, tmp_path: Path) -> None:
    first, again, other = (
        _convert(llama, tmp_path / name, seed=seed)
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    name = "model.layers.0.mamba.in_proj_z.weight"
    assert not torch.equal(first[name], other[name])
    # what comes from the teacher does not depend on the seed
    name = "model.layers.0.mamba.C_proj.weight"
    assert torch.equal(first[name], other[name])


def test_write_student_initial_step_sizes(llama: Path, tmp_path: Path) -> None:
    student = _convert(llama, tmp_path / "student")
    dt = torch.nn.functional.softplus(student["model.layers.0.mamba.dt_proj.bias"])
    assert dt.min() > 9e-4
    assert dt.max() < 0.11
    A = student["model.layers.0.mamba.A_log"].exp()
    assert torch.allclose(A, torch.arange(1.0, 17.0).expand(192, 16))


def test_write_student_refuses_uneven_slices(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="d_state=24 must divide the teacher's head width 32"):
        _convert(llama, tmp_path / "student", d_state=24)


def test_slice_order() -> None:
    # 4 query heads of 4 channels, 2 key heads, slices of 2: heads 0 and 1 share key head 0.
    expected = [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    assert slice_order(4, 2, 4, 2).tolist() == expected


def test_every_nth_layer() -> None:
    assert every_nth_layer(30) == [3, 7, 11, 15, 19, 23, 27]
