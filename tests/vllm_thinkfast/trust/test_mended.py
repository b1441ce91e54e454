"""What the damaged folders of test_fuzz.py brought to light, one line each."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.reference.random_checkpoints import ROPE_LLAMA3, write_checkpoint
from vllm_thinkfast.checkpoints.config_reader import read_config
from vllm_thinkfast.checkpoints.convert import convert_checkpoint
from vllm_thinkfast.checkpoints.folder import read_folder, read_json
from vllm_thinkfast.checkpoints.key_map import CheckpointError
from vllm_thinkfast.checkpoints.reader import house_tensors
from vllm_thinkfast.configs import LlambaConfig, MambaInLlamaConfig

MIL1, MIL2, M1 = "mambainllama_mamba1", "mambainllama_mamba2", "m1"


def read(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder under the house's names."""
    return dict(house_tensors(read_config(folder), read_folder(folder), source=str(folder)))


@pytest.mark.parametrize(
    ("format", "file", "changes", "message"),
    [
        # Took the default in silence.
        (M1, "config.json", {"head_dim": 0}, r"head_dim=0 must be an integer >= 1"),
        (M1, "config.json", {"head_dim": 17}, r"head_dim=17 must be even"),
        (M1, "config.json", {"num_key_value_heads": 0}, r"num_key_value_heads=0 must be"),
        (MIL1, "config.json", {"rope_theta": 0}, r"rope_theta=0 must be a number > 0"),
        (MIL1, "config.json", {"rope_scaling": []}, r"rope_scaling=\[\] must be an object"),
        (MIL1, "mamba_config.json", {"ssm_cfg": []}, r"ssm_cfg=\[\] must be an object"),
        (MIL1, "mamba_config.json", {"attn_layers": False}, r"attention_layers=False must be"),
        ("llamba", "config.json", {"ssm_cfg": False}, r"ssm_cfg=False must be an object"),
        # Took one of two values, or a value for another.
        (M1, "mamba_config.json", {"attn_layers": [True]}, r"attention_layers=\[True\]"),
        (
            M1,
            "mamba_config.json",
            {"attention_layers": [0]},
            r"attn_layers=\[1\] contradicts attention_layers=\[0\]",
        ),
        (
            MIL1,
            "config.json",
            {"rope_scaling": {"rope_type": "default", "type": "linear", "factor": 2.0}},
            r"rope_type='default' contradicts type='linear'",
        ),
        ("llamba", "config.json", {"rms_norm_eps": 0.5}, r"rms_norm_eps beside d_model"),
        (MIL1, "config.json", {"use_bias": True}, r"use_bias beside mamba_config\.json"),
        (MIL1, "config.json", {"model_type": "gpt2"}, r"model_type='gpt2' beside mamba_config"),
        (MIL1, "config.json", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor is not"),
        # Ignored a misspelt field.
        (MIL1, "config.json", {"rope_thetas": 5.0}, r"'rope_thetas'; did you mean 'rope_theta'"),
        ("llamba", "config.json", {"norm_epsilom": 0.1}, r"did you mean 'norm_epsilon'"),
        (
            MIL1,
            "config.json",
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "factors": 3.0}},
            r"unknown option\(s\) factors=3\.0",
        ),
        # Ended in an error of Python's, or never.
        (MIL1, "mamba_config.json", {"ssm_cfg": {"expand": None}}, r"expand=None must be a number"),
        (MIL1, "mamba_config.json", {"ssm_cfg": {"expand": 1e308}}, r"expand=1e\+308 is above"),
        (MIL1, "mamba_config.json", {"ssm_cfg": {"expand": "1"}}, r"expand='1' must be a number"),
        (MIL2, "mamba_config.json", {"ssm_cfg": {"d_state": 32, "ngroups": "4"}}, r"ngroups='4'"),
        (
            MIL1,
            "config.json",
            {"rope_scaling": {**ROPE_LLAMA3, "low_freq_factor": 4.0}},
            r"low_freq_factor=4\.0 must be below high_freq_factor=4\.0",
        ),
        ("llamba", "config.json", {"n_layer": 10**12}, r"num_hidden_layers=10+ is above"),
        (M1, "config.json", {"num_hidden_layers": 10**9}, r"n_layer=3 contradicts"),
        ("llamba", "config.json", {"n_layer": 10**9}, r"num_hidden_layers=10+ is above 10000"),
        ("llamba", "config.json", {"num_labels": 10**9}, r"num_labels=10+ is above 100000"),
        ("llamba", "config.json", {"norm_epsilon": 10**400}, r"final_norm_eps=10+.* must be a"),
        ("llamba", "config.json", {"to_dict": 1}, r"'to_dict' cannot be a field"),
        ("llamba", "config.json", {"self": 1}, r"'self' cannot be a field"),
        ("llamba", "config.json", {"torch_dtype": "load"}, r"torch_dtype='load' is not supported"),
        ("llamba", "config.json", {"quantization_config": 5}, r"quantization_config=5 must be"),
        ("llamba", "config.json", {"num_labels": "x"}, r"num_labels='x' must be an integer"),
        ("llamba", "config.json", {"id2label": 5}, r"transformers does not accept a field"),
        ("llamba", "config.json", {"architectures": "A"}, r"architectures='A' must be a list"),
        # Named only our own word for the field.
        ("llamba", "config.json", {"n_layer": 0}, r"\(num_hidden_layers is n_layer\)"),
        (M1, "mamba_config.json", {"ssm_cfg": {"d_conv": 1}}, r"is ssm_cfg\.d_conv of mamba_conf"),
        # Was as long as the value, or wrote control characters to the terminal.
        ("llamba", "config.json", {"n_layer": "x" * 9000}, r"x\.\.\. \(9002 characters\)"),
        (M1, "mamba_config.json", {"\x1b[31m": 1}, r"unknown option\(s\) '\\x1b\[31m'=1"),
    ],
)  # fmt: skip
def test_field(format: str, file: str, changes: Any, message: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "ckpt", format)
    fields = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**fields, **changes}))
    with pytest.raises(ValueError, match=message) as caught:
        read_config(folder)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"a": 1, "a": 2}', "'a' occurs twice; remove one"),
        (b'{"a": ' + b"[" * 100_000, "not a readable JSON file: nested too deeply"),
        (b'{"a": ' + b"[" * 60 + b"]" * 60 + b"}", "nested deeper than 32 levels"),
        (b'{"a": ' + b"7" * 5000 + b"}", "not a readable JSON file: Exceeds the limit"),
        (b'\xef\xbb\xbf{"a": 1}', "not a readable JSON file"),
    ],
    ids=["twice", "endless", "deep", "digits", "mark"],
)
def test_json(text: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=message):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/passwd", "..", 5, None])
def test_index_outside_of_the_folder(name: Any, tmp_path: Path) -> None:
    """A folder's weights are in the folder."""
    folder = write_checkpoint(tmp_path / "ckpt", "llamba", container="sharded_safetensors")
    other = write_checkpoint(tmp_path / "other", "llamba")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(read(other), name)}))
    with pytest.raises(CheckpointError, match=r"accepted: the name of a \.safetensors file"):
        read(folder)


@pytest.mark.parametrize("value", [5, [], None])
def test_index_without_a_map(value: Any, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "ckpt", "llamba", container="sharded_safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": value}))
    with pytest.raises(CheckpointError, match=r"weight_map=.* must be an object"):
        read(folder)


def test_infinity_survives_convert(tmp_path: Path) -> None:
    """transformers saves Infinity as an object, which was no number for us."""
    limit = {"ssm_cfg": {"dt_limit": [0.1, math.inf]}}
    folder = write_checkpoint(tmp_path / "ckpt", MIL2, mamba_config=limit)
    convert_checkpoint(folder, tmp_path / "out")
    assert read_config(tmp_path / "out").time_step_limit == [0.1, math.inf]


@pytest.mark.parametrize(
    "change",
    [
        lambda state, name: {**state, name: state[name].to("meta")},
        lambda state, name: {**state, name: state[name].to_sparse()},
        lambda state, name: {**state, 5: state[name]},
        lambda state, name: {**state, None: state[name]},
    ],
    ids=["without_numbers", "sparse", "integer_name", "no_name"],
)
def test_no_plain_tensors(change: Any, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "ckpt", "llamba", container="bin")
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    name = next(name for name, tensor in state.items() if tensor.dim() == 2)
    torch.save(change(state, name), folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: entries that are no tensors"):
        read(folder)


def test_pickle_message_gives_no_bad_advice(tmp_path: Path) -> None:
    """torch explains how to run the file's code all the same; we do not."""
    folder = write_checkpoint(tmp_path / "ckpt", "llamba", container="bin")
    torch.save({"x": Path}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"it would call pathlib\.Path when it is") as caught:
        read(folder)
    assert "weights_only" not in str(caught.value)


def test_vllm_reads_local_folders_as_strictly(tmp_path: Path) -> None:
    """Of two equal fields vLLM's own reader takes the last."""
    from vllm_thinkfast import plugin
    from vllm_thinkfast.config_parser import ThinkfastConfigParser

    plugin.register()
    llamba = write_checkpoint(tmp_path / "llamba", "llamba")
    hybrid = write_checkpoint(tmp_path / "hybrid", M1)
    for folder, file in ((llamba, "config.json"), (hybrid, "mamba_config.json")):
        text = (folder / file).read_text()
        (folder / file).write_text(text.replace('"d_model": ', '"d_model": 1,\n "d_model": ', 1))
        with pytest.raises(CheckpointError, match=r"'d_model' occurs twice"):
            ThinkfastConfigParser().parse(folder, trust_remote_code=False)


@pytest.mark.parametrize("config_class", [LlambaConfig, MambaInLlamaConfig])
def test_fields_of_other_programs_are_kept(config_class: Any) -> None:
    """Only what is close to a field of ours counts as misspelt."""
    fields = {"unsloth_version": "2025.1", "use_cache": True, "num_experts": 5, "pad_token_id": 0}
    config = config_class(**fields, architectures=["A"], dtype="bfloat16")
    assert config.unsloth_version == "2025.1"
    assert config_class.from_dict(config.to_dict()).to_dict() == config.to_dict()
