"""``thinkfast convert``, ``state-size`` and the command line itself, as a user types them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.reference.random_checkpoints import CONTAINERS, FORMATS, write_checkpoint
from vllm_thinkfast import __version__, cli
from vllm_thinkfast.checkpoints import convert as convert_module

RECORD = convert_module.RECORD


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A published M1 folder with a tokenizer."""
    return write_checkpoint(tmp_path / "source", "m1", seed=1, has_tokenizer=True)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must be refused: exit code 2, one line on stderr, nothing on stdout."""

    def run(*arguments: object) -> str:
        capsys.readouterr()  # of the commands before
        assert cli.main([str(argument) for argument in arguments]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        (line,) = printed.err.splitlines()
        assert line.startswith(f"thinkfast {arguments[0]}: ")
        return line

    return run


def thinkfast(*arguments: object) -> int:
    """Runs the command in this process; returns its exit code."""
    return cli.main([str(argument) for argument in arguments])


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """File -> (time of change, bytes)."""
    return {f.name: (f.stat().st_mtime_ns, f.read_bytes()) for f in folder.iterdir()}


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


# The command line itself


def run_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vllm_thinkfast.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_version() -> None:
    finished = run_process("--version")
    assert (finished.returncode, finished.stdout) == (0, f"{__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "COMMAND"),
        (("serve",), "invalid choice: 'serve'"),
        (("convert", "only-one"), "dst"),
        (("convert", "a", "b", "--force"), "--force"),
        (("state-size", "a", "--dtype", "float64"), "invalid choice: 'float64'"),
        (("state-size", "a", "--num-tokens", "many"), "invalid int value: 'many'"),
    ],
)
def test_wrong_usage(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""


@pytest.mark.parametrize("verb", ["doctor", "convert", "state-size"])
def test_help_names_every_verb(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--help"])
    assert stopped.value.code == 0
    assert verb in capsys.readouterr().out


# convert


@pytest.mark.parametrize("fmt", FORMATS)
def test_convert(fmt: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_checkpoint(tmp_path / "source", fmt, container="sharded_bin")
    assert thinkfast("convert", folder, tmp_path / "out") == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert f"serve it with: vllm serve {tmp_path / 'out'}" in printed.out
    assert f"written from {fmt}" in printed.out
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors"} <= names
    assert not [name for name in names if name.endswith(".bin") or name == "mamba_config.json"]


def test_convert_json(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = []
    for _ in range(2):
        assert thinkfast("convert", source, tmp_path / "out", "--json") == 0
        report.append(json.loads(capsys.readouterr().out))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert report[0] == {
        "destination": str(tmp_path / "out"),
        "weight_layout": "m1",
        "num_tensors": len(tensors),
        "num_bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "was_done_before": False,
    }
    assert report[1] == {**report[0], "was_done_before": True}


def test_convert_again_changes_nothing(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert thinkfast("convert", source, tmp_path / "out") == 0
    before = contents(tmp_path / "out")
    capsys.readouterr()
    assert thinkfast("convert", source, tmp_path / "out") == 0
    assert "already there" in capsys.readouterr().out
    assert contents(tmp_path / "out") == before


def test_convert_notices_a_changed_source(
    source: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    """The old result is neither kept silently nor replaced silently."""
    assert thinkfast("convert", source, tmp_path / "out") == 0
    edit_weights(source, lambda tensors: tensors["model.norm.weight"].mul_(2))
    line = refused("convert", source, tmp_path / "out")
    assert "exists and is not this conversion" in line
    assert "--overwrite" in line
    assert thinkfast("convert", source, tmp_path / "out", "--overwrite") == 0
    old, new = (load_file(path / "model.safetensors") for path in (source, tmp_path / "out"))
    assert torch.equal(old["model.norm.weight"], new["model.norm.weight"])


def test_convert_with_tokenizer(source: Path, tmp_path: Path) -> None:
    """Text becomes the same ids as with the tokenizer that was named, chat template included."""
    from transformers import AutoTokenizer

    llamba = write_checkpoint(tmp_path / "llamba", "llamba")
    assert thinkfast("convert", llamba, tmp_path / "out", "--tokenizer", source) == 0
    named, written = (AutoTokenizer.from_pretrained(f) for f in (source, tmp_path / "out"))
    assert written("one two\nthree").input_ids == named("one two\nthree").input_ids
    assert written.chat_template == named.chat_template
    assert thinkfast("convert", llamba, tmp_path / "plain") == 0
    assert not (tmp_path / "plain" / "tokenizer.json").exists()


def test_convert_with_a_tokenizer_that_is_not_there(
    source: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    line = refused("convert", source, tmp_path / "out", "--tokenizer", tmp_path / "absent")
    assert f"--tokenizer {tmp_path / 'absent'}: cannot be loaded" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("container", CONTAINERS)
def test_convert_reads_every_container(container: str, tmp_path: Path) -> None:
    one = write_checkpoint(tmp_path / "one", "mambainllama_mamba2", seed=4)
    other = write_checkpoint(tmp_path / "other", "mambainllama_mamba2", seed=4, container=container)
    for folder in (one, other):
        assert thinkfast("convert", folder, tmp_path / f"{folder.name}-out") == 0
    files = [tmp_path / name / "model.safetensors" for name in ("one-out", "other-out")]
    expected, found = (load_file(file) for file in files)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def no_folder(folder: Path) -> None:
    shutil.rmtree(folder)


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def no_mamba_config(folder: Path) -> None:
    (folder / "mamba_config.json").unlink()


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def broken_json(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')


def json_list(folder: Path) -> None:
    (folder / "mamba_config.json").write_text("[1]")


def cut_weights(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 1000)


def bin_that_is_text(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_text("hello\n")


def missing_shard(folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def missing_tensor(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.pop("model.layers.0.mamba.A_log"))


def surplus_tensor(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.update(extra=torch.zeros(3)))


def wrong_shape(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(7)}))


def unknown_option(folder: Path) -> None:
    edit_json(folder / "mamba_config.json", ssm_cfg={"expand": 1, "use_magic": True})


def options_that_are_a_number(folder: Path) -> None:
    edit_json(folder / "mamba_config.json", ssm_cfg=3)


def layers_that_are_a_number(folder: Path) -> None:
    edit_json(folder / "mamba_config.json", attn_layers=1)


def layer_that_is_not_there(folder: Path) -> None:
    edit_json(folder / "mamba_config.json", attn_layers=[99])


BAD_FOLDERS: dict[Callable[[Path], None], tuple[str, ...]] = {
    no_folder: ("no config.json; expected a Llamba or MambaInLlama checkpoint folder",),
    no_config: ("no config.json; expected a Llamba or MambaInLlama checkpoint folder",),
    no_mamba_config: ("model_type='llama' without mamba_config.json; accepted: ",),
    no_weights: ("no weights; expected *.safetensors or pytorch_model.bin",),
    broken_json: ("config.json: not a readable JSON file",),
    json_list: ("mamba_config.json: expected a JSON object, found list",),
    cut_weights: ("model.safetensors: not a readable safetensors file",),
    bin_that_is_text: ("pytorch_model.bin: not a readable weight file",),
    missing_shard: ("model-00001-of-00001.safetensors", "which the folder lacks"),
    missing_tensor: ("missing: model.layers.0.mamba.A_log [128, 16]",),
    surplus_tensor: ("surplus: extra [3]",),
    wrong_shape: ("model.norm.weight: expected [128], found [7]",),
    unknown_option: ("unknown option(s) use_magic=True; accepted: ",),
    options_that_are_a_number: ("ssm_cfg=3",),
    layers_that_are_a_number: ("1", "list"),
    layer_that_is_not_there: ("attention_layers=[99] must be distinct indices from 0 to 2",),
}


@pytest.mark.parametrize("spoil", BAD_FOLDERS, ids=lambda spoil: spoil.__name__)
def test_convert_refuses(
    spoil: Callable[[Path], None], source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last line names the file, what was found and what is accepted; nothing was written."""
    spoil(source)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert thinkfast("convert", source, tmp_path / "out") == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Traceback" not in printed.err
    line = printed.err.splitlines()[-1]
    assert line.startswith("thinkfast convert: ")
    for part in BAD_FOLDERS[spoil]:
        assert part in line
    assert sorted(path.name for path in tmp_path.iterdir()) == left


@pytest.mark.parametrize("part", ["ssm_cfg", "mlp_cfg"])
@pytest.mark.parametrize("value", [3, [1], "x"])
def test_llamba_part_that_is_no_object(
    part: str, value: object, tmp_path: Path, refused: Callable[..., str]
) -> None:
    folder = write_checkpoint(tmp_path / "source", "llamba")
    edit_json(folder / "config.json", **{part: value})
    line = refused("state-size", folder)
    assert part in line
    assert repr(value) in line


def test_convert_into_its_source(source: Path, refused: Callable[..., str]) -> None:
    before = contents(source)
    for destination in (source, source / "out"):
        assert "must lie outside of the source" in refused("convert", source, destination)
    assert contents(source) == before


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)], ids=["plain", "overwrite"])
def test_convert_over_a_folder_that_holds_the_source(
    overwrite: tuple[str, ...], tmp_path: Path, refused: Callable[..., str]
) -> None:
    """--overwrite must never remove the checkpoint that is being converted."""
    source = write_checkpoint(tmp_path / "models" / "source", "m1")
    before = contents(source)
    refused("convert", source, tmp_path / "models", *overwrite)
    assert contents(source) == before


def test_convert_over_something_else(
    source: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("keep")
    assert "pass --overwrite" in refused("convert", source, tmp_path / "out")
    assert (tmp_path / "out" / "precious.txt").read_text() == "keep"


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)], ids=["plain", "overwrite"])
def test_convert_over_a_file(
    overwrite: tuple[str, ...], source: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    (tmp_path / "out").write_text("keep")
    assert str(tmp_path / "out") in refused("convert", source, tmp_path / "out", *overwrite)
    assert (tmp_path / "out").read_text() == "keep"


def test_convert_below_a_file(source: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "file").write_text("keep")
    assert str(tmp_path / "file") in refused("convert", source, tmp_path / "file" / "out")


def test_convert_result_that_lost_its_weights(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A record without its weights is no finished conversion."""
    assert thinkfast("convert", source, tmp_path / "out") == 0
    (tmp_path / "out" / "model.safetensors").unlink()
    capsys.readouterr()
    code = thinkfast("convert", source, tmp_path / "out")
    assert "already there" not in capsys.readouterr().out
    assert code == 2 or (tmp_path / "out" / "model.safetensors").is_file()


def test_convert_result_with_a_spoilt_record(
    source: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    assert thinkfast("convert", source, tmp_path / "out") == 0
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    del record["num_tensors"]
    (tmp_path / "out" / RECORD).write_text(json.dumps(record))
    assert "--overwrite" in refused("convert", source, tmp_path / "out")


def test_convert_without_space(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Not the user's mistake: exit code 1, one line, nothing left, the old result untouched."""
    assert thinkfast("convert", source, tmp_path / "out") == 0
    before = contents(tmp_path / "out")
    capsys.readouterr()

    def no_space(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert_module, "save_file", no_space)
    assert thinkfast("convert", source, tmp_path / "out", "--overwrite") == 1
    assert capsys.readouterr().err == ("thinkfast convert: [Errno 28] No space left on device\n")
    assert contents(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_convert_killed(sent: signal.Signals, source: Path, tmp_path: Path) -> None:
    """A killed run leaves no folder that looks finished, and the next run succeeds."""
    # The run stops after the weights are written, until it is killed. Shells start background jobs
    # with SIGINT ignored, which processes inherit.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "import sys, time, vllm_thinkfast.checkpoints.convert as c; from pathlib import Path; "
        "wait = lambda *a: (Path(sys.argv[3]).touch(), time.sleep(60)); "
        "c._copy_other_files = wait; "
        "from vllm_thinkfast.cli import main; sys.exit(main(['convert', *sys.argv[1:3]]))"
    )
    reached = tmp_path / "reached"
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "out"), str(reached)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not reached.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert reached.exists()
    process.send_signal(sent)
    assert process.wait(timeout=30) != 0
    assert not (tmp_path / "out").exists()
    assert thinkfast("convert", source, tmp_path / "out") == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["out", "reached", "source"]


# state-size


def expected_sizes(
    folder: Path, fmt: str, act_bytes: int, ssm_bytes: int, ranks: int
) -> dict[str, int]:
    """Counted from the tensors in the folder, not from any configuration class."""
    tensors = load_file(folder / "model.safetensors")
    conv = sum(
        tensor.shape[0] * (tensor.shape[2] - 1)
        for name, tensor in tensors.items()
        if name.endswith("conv1d.weight")
    )
    if fmt == "llamba":
        config = json.loads((folder / "config.json").read_text())
        state = config["n_layer"] * config["d_model"] * config["ssm_cfg"]["d_state"]
        kv = 0
    else:
        mamba = json.loads((folder / "mamba_config.json").read_text())
        config = json.loads((folder / "config.json").read_text())
        if fmt == "mambainllama_mamba2":
            num_mixers = config["num_hidden_layers"] - len(mamba["attn_layers"])
            state = num_mixers * mamba["d_inner"] * mamba["ssm_cfg"]["d_state"]
        else:
            state = sum(t.numel() for name, t in tensors.items() if name.endswith(".A_log"))
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        kv = 2 * len(mamba["attn_layers"]) * config["num_key_value_heads"] * head_dim
    return {
        "conv_bytes": conv * act_bytes // ranks,
        "ssm_bytes": state * ssm_bytes // ranks,
        "kv_bytes_per_token": kv * act_bytes // ranks,
    }


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(
    ("flags", "act_bytes", "ssm_bytes", "ranks"),
    [
        ((), 2, 4, 1),
        (("--dtype", "float32", "--ssm-dtype", "bfloat16"), 4, 2, 1),
        (("--tensor-parallel-size", "2", "--num-tokens", "77"), 2, 4, 2),
    ],
    ids=["defaults", "dtypes", "two_ranks"],
)
def test_state_size(
    fmt: str,
    flags: tuple[str, ...],
    act_bytes: int,
    ssm_bytes: int,
    ranks: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = write_checkpoint(tmp_path / "source", fmt)
    expected = expected_sizes(folder, fmt, act_bytes, ssm_bytes, ranks)
    num_tokens = 77 if "77" in flags else 4096
    total = (
        expected["conv_bytes"] + expected["ssm_bytes"] + num_tokens * expected["kv_bytes_per_token"]
    )
    assert thinkfast("state-size", folder, "--json", *flags) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {**expected, "num_tokens": num_tokens, "total_bytes": total}
    assert thinkfast("state-size", folder, *flags) == 0
    table = capsys.readouterr().out
    assert f"{expected['ssm_bytes'] / 2**20:.3f} MiB" in table
    assert f"{num_tokens} tokens in all" in table
    assert f"{total / 2**20:.3f} MiB" in table


@pytest.mark.parametrize("fmt", FORMATS)
def test_state_size_int8(fmt: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A byte for each element, and a scale of four for each row of N of them."""
    folder = write_checkpoint(tmp_path / "source", fmt)
    elements = expected_sizes(folder, fmt, 2, 1, 1)["ssm_bytes"]
    mamba = folder / "mamba_config.json"
    options = json.loads((mamba if mamba.exists() else folder / "config.json").read_text())
    N = options["ssm_cfg"].get("d_state", 16)
    assert thinkfast("state-size", folder, "--json", "--ssm-dtype", "int8") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ssm_bytes"] == elements + elements // N * 4


@pytest.mark.parametrize("fmt", FORMATS)
def test_state_size_in_memory(fmt: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One state per sequence, and two to spare: vLLM's null block and one that moves on."""
    folder = write_checkpoint(tmp_path / "source", fmt)
    flags = ("--num-tokens", "64", "--memory-gib", "0.001")
    assert thinkfast("state-size", folder, "--json", *flags) == 0
    found = json.loads(capsys.readouterr().out)
    state = found["conv_bytes"] + found["ssm_bytes"]
    expected = (int(0.001 * 2**30) - 2 * state) // (state + 64 * found["kv_bytes_per_token"])
    assert found["max_sequences"] == expected > 0
    assert thinkfast("state-size", folder, *flags) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith(f"0.001 GiB of cache: {expected} sequences decode at once")
    assert line.endswith("padding") == (fmt != "llamba")
    assert thinkfast("state-size", folder, "--memory-gib", "1e-9") == 0
    assert "1e-09 GiB of cache: 0 sequences" in capsys.readouterr().out


def test_state_size_of_a_converted_folder(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert thinkfast("convert", source, tmp_path / "out") == 0
    capsys.readouterr()
    printed = []
    for folder in (source, tmp_path / "out"):
        assert thinkfast("state-size", folder) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]


def test_state_size_without_weights(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Config files are enough."""
    assert thinkfast("state-size", source, "--json") == 0
    expected = capsys.readouterr().out
    no_weights(source)
    assert thinkfast("state-size", source, "--json") == 0
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--num-tokens", "0"), "--num-tokens 0: must be at least 1"),
        (("--tensor-parallel-size", "-2"), "--tensor-parallel-size -2: must be at least 1"),
        (("--tensor-parallel-size", "3"), "tensor_parallel_size=3 does not divide"),
        (("--memory-gib", "0"), "--memory-gib 0.0: must be a number above 0"),
        (("--memory-gib", "nan"), "--memory-gib nan: must be a number above 0"),
        (("--memory-gib", "inf"), "--memory-gib inf: must be a number above 0"),
        (("--memory-gib", "1e300"), "--memory-gib 1e+300: must be a number above 0"),
    ],
)
def test_state_size_refuses(
    flags: tuple[str, ...], message: str, source: Path, refused: Callable[..., str]
) -> None:
    assert message in refused("state-size", source, *flags)


def test_state_size_of_another_model(tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert "model_type='gpt2'" in refused("state-size", tmp_path)
