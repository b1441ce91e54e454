"""Reward strings."""

from pathlib import Path

import pytest

from lm_eval_tasks.errors import InputError
from lm_eval_tasks.rewards.spec import parse_spec


@pytest.mark.parametrize(
    ("text", "protocol", "split", "name"),
    [
        ("RLHFlow/Llama3.1-8B-PRM-Deepseek-Data", "rlhflow-deepseek", "paragraph", None),
        ("RLHFlow/Llama3.1-8B-PRM-Mistral-Data", "rlhflow-mistral", "line", None),
        ("Qwen/Qwen2.5-Math-PRM-7B", "qwen2.5-math-prm", "paragraph", None),
        ("peiyi9979/math-shepherd-mistral-7b-prm", "math-shepherd", "line", None),
        ("/models/Skywork-o1-Open-PRM-Qwen-2.5-1.5B/", "skywork-o1", "newline", None),
        ("thinkfast/prm-tiny", "rlhflow-deepseek", "line", "prm-tiny"),
        ("Qwen/Qwen2.5-Math-PRM-7B,split=line", "qwen2.5-math-prm", "line", None),
        ("my prm,protocol=math-shepherd", "math-shepherd", "line", "my-prm"),
        ("my-prm,protocol=rlhflow-mistral,split=paragraph,name=x", "rlhflow-mistral", "paragraph",
         "x"),
    ],
)  # fmt: skip
def test_parse_spec(text: str, protocol: str, split: str, name: str | None) -> None:
    spec = parse_spec(text)
    base = text.split(",")[0].rstrip("/").rpartition("/")[2]
    default = f"{base}-line" if "split=line" in text else base
    assert (spec.protocol, spec.split, spec.name) == (protocol, split, name or default)
    assert spec.backend == "hf"


def test_settings() -> None:
    spec = parse_spec(
        "prm-tiny,backend=vllm,dtype=bfloat16,max_tokens=512,engine.max_num_seqs=8,"
        "engine.enforce_eager=true,engine.quantization=fp8"
    )
    assert (spec.backend, spec.dtype, spec.max_tokens) == ("vllm", "bfloat16", 512)
    assert spec.engine == {"max_num_seqs": 8, "enforce_eager": True, "quantization": "fp8"}
    assert parse_spec("prm-tiny,url=http://h:8000").backend == "remote"
    nested = "[" * 20_000
    assert parse_spec(f"prm-tiny,backend=vllm,engine.a={nested}").engine == {"a": nested}


def test_hash_says_what_a_score_means(tmp_path: Path) -> None:
    base = parse_spec("prm-tiny").hash()
    assert parse_spec("prm-tiny,name=other,batch_tokens=5,device=cuda").hash() == base
    others = ["split=paragraph", "dtype=bfloat16", "backend=vllm", "max_tokens=9", "revision=abc"]
    hashes = {parse_spec(f"prm-tiny,{other}").hash() for other in others}
    assert len(hashes | {base}) == len(others) + 1
    vllm = parse_spec("prm-tiny,backend=vllm").hash()
    for setting in ("quantization=fp8", "dtype=float16", "kv_cache_dtype=fp8", "max_model_len=64",
                    'hf_overrides={"a": 1}', "new_in_vllm=1"):  # fmt: skip
        found = parse_spec(f"prm-tiny,backend=vllm,engine.{setting}")
        assert found.identity()["engine"] == found.engine
        hashes.add(found.hash())
    assert len(hashes | {base}) == len(others) + 7
    neutral = (
        "engine.gpu_memory_utilization=0.5,engine.tensor_parallel_size=2,engine.max_num_seqs=8,"
        "engine.enforce_eager=true,engine.block_size=32,engine.quantization=null"
    )
    assert parse_spec(f"prm-tiny,backend=vllm,{neutral}").hash() == vllm
    near, far = (parse_spec(f"prm-tiny,url=http://{host}").hash() for host in ("a", "b"))
    assert near == far != base


def test_hashes_of_earlier_score_files() -> None:
    """Without engine arguments that change numbers a hash stays what it was, so runs go on."""
    assert parse_spec("o/prm-tiny,name=x").hash() == "b58f8e5b289e9ec6"
    spec = "o/prm-tiny,backend=vllm,dtype=float32,engine.max_num_seqs=8"
    assert parse_spec(spec).hash() == "e7347d565d0717e4"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "begin with the model's name"),
        ("protocol=math-shepherd", "begin with the model's name"),
        ("some/model", "is not one of the published models"),
        ("prm-tiny,protocol=orm", "protocol=orm is not known; accepted: rlhflow-deepseek"),
        ("prm-tiny,split=word", "split=word is not known; accepted: paragraph"),
        ("prm-tiny,backend=gguf", "backend=gguf is not known; accepted: hf, vllm, remote"),
        ("prm-tiny,colour=red", "'colour=red' is not accepted"),
        ("prm-tiny,split", "'split' is not accepted"),
        ("prm-tiny,max_tokens=-1", "max_tokens=-1 must be a whole number above 0"),
        ("prm-tiny,batch_tokens=x", "batch_tokens=x must be a whole number above 0"),
        ("prm-tiny,backend=remote", "url= goes with backend=remote"),
        ("prm-tiny,backend=hf,url=http://h", "url= goes with backend=remote"),
        ("prm-tiny,engine.seed=1", "engine.* goes with backend=vllm"),
        ("prm-tiny,name=../x", "name '../x' is not accepted"),
    ],
)
def test_bad_spec(text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError):
        parse_spec(text)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
