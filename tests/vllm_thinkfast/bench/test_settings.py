"""The command line's lists, and what is refused."""

from pathlib import Path

import pytest

from tests.vllm_thinkfast.bench.scripted import settings
from vllm_thinkfast.bench.settings import (
    Cell,
    Model,
    find_models,
    parse_cells,
    parse_engine_options,
)


def test_parse_cells() -> None:
    cells, limit = parse_cells("1,4", "8+2,16+4", "3", None)
    assert [cell.label for cell in cells] == [
        "1 x 8+2",
        "4 x 8+2",
        "1 x 16+4",
        "4 x 16+4",
        "n=3 x 8+2",
        "n=3 x 16+4",
    ]
    assert limit == 4
    assert cells[2] == Cell("separate", 1, 16, 4)
    assert cells[2].length == 20


def test_parse_cells_without_doubles() -> None:
    cells, _ = parse_cells("2,2,max", "8+2", "", None)
    assert [cell.label for cell in cells] == ["2 x 8+2", "max x 8+2"]


def test_limit_of_sequences() -> None:
    assert parse_cells("1,max", "8+2", "", None)[1] == 1024
    assert parse_cells("1,max", "8+2", "", 7)[1] == 7
    assert parse_cells("2048,max", "8+2", "", None)[1] == 2048
    assert parse_cells("max", "8+2", "2048", None)[1] == 2048
    with pytest.raises(ValueError, match="--max-num-seqs 7: less than the batch of 9"):
        parse_cells("1", "8+2", "9", 7)


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        (("0", "8+2", ""), "--batch-sizes 0: need whole numbers from 1 up"),
        (("x", "8+2", ""), "--batch-sizes x"),
        (("²", "8+2", ""), "--batch-sizes ²"),
        (("1", "8", ""), r"--lengths 8: need PROMPT\+GENERATED"),
        (("1", "8+1", ""), r"--lengths 8\+1: generated tokens 1: need whole numbers from 2 up"),
        (("1", "0+8", ""), r"--lengths 0\+8: prompt 0: need whole numbers from 1 up"),
        (("1", "", ""), "--lengths is empty"),
        (("1", "8+2", "1"), "--num-samples 1: need whole numbers from 2 up"),
        (("", "8+2", ""), "both empty"),
    ],
)
def test_refused_lists(lists: tuple[str, str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_cells(*lists, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "is no JSON"),
        ("[1]", "need an object"),
        ('{"seed": 1}', "seed: leave it out, and use --seed instead"),
        ('{"max_model_len": 64}', "max_model_len: leave it out, and use --lengths instead"),
        ('{"max_num_seqs": 1, "dtype": "half"}', "dtype, max_num_seqs: .* --dtype, --max-num-seqs"),
        ('{"tensor_parallel_size": 2}', "tensor_parallel_size 2: the bench is for one device"),
    ],
)
def test_refused_engine_options(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_engine_options(text)


def test_options_with_a_flag_are_no_engine_options() -> None:
    """Whatever the bench hands to vLLM by itself, but for its tokenizer and a default."""
    for name in settings().llm_options().keys() - {"skip_tokenizer_init", "gpu_memory_utilization"}:
        with pytest.raises(ValueError, match=rf"--engine-options: {name}: leave it out"):
            parse_engine_options(f'{{"{name}": null}}')


def test_engines_with_a_given_cache_share_a_gpu() -> None:
    """vLLM refuses to start where less than this part of the device is free."""
    assert settings().llm_options()["gpu_memory_utilization"] == 0.01
    assert "gpu_memory_utilization" not in settings(kv_cache_bytes=None).llm_options()
    by_user = settings(engine_options={"gpu_memory_utilization": 0.5})
    assert by_user.llm_options()["gpu_memory_utilization"] == 0.5


def test_find_models(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    models = find_models(f"llama, own={tmp_path / 'mine'}", "tiny", "dummy", tmp_path / "out")
    assert models == [
        Model("llama", tmp_path / "out" / "models" / "tiny-llama", "llama"),
        Model("own", tmp_path / "mine", None),
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("names", "load_format", "message"),
    [
        ("gpt", "dummy", "--models gpt: accepted are llama, llamba, mambainllama, mamba2"),
        ("llama,llama", "dummy", "llama stands there twice"),
        ("", "dummy", "--models is empty"),
        ("x=nowhere", "dummy", "nowhere has no config.json"),
        ("llama", "auto", "llama has no weights: use --load-format dummy"),
    ],
)
def test_refused_models(names: str, load_format: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        find_models(names, "tiny", load_format, tmp_path)


def test_identity_follows_the_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    model = Model("x", tmp_path, None)
    first = model.identity
    assert model.identity == first
    (tmp_path / "config.json").write_text('{"a": 1}')
    second = model.identity
    assert second != first
    (tmp_path / "model.safetensors").write_bytes(b"1")
    assert model.identity != second
