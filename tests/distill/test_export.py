"""The exported folder: complete, readable by the plugin's reader, replaced as a whole or not."""

import errno
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from tests.distill.students.models import (
    config_of,
    load_student,
    packed,
    random_documents,
    random_student,
)
from tests.reference.random_checkpoints import write_tokenizer
from thinkfast_distill import export as export_module
from thinkfast_distill.export import RECORD, ExportError, export
from thinkfast_distill.llama_student import LlamaStudent
from vllm_thinkfast.checkpoints.config_reader import read_config

CARD = {
    "name": "thinkfast/llamba-tiny",
    "license": "apache-2.0",
    "teacher": "thinkfast/llama-tiny",
    "data": {"arith": 750_000, "text|raw": 250_000},
    "stages": [
        {"name": "s1", "kind": "matrix_mixing", "tokens": 1000, "steps": 10,
         "metrics": {"frobenius": 3.25}},
        {"name": "s2", "kind": "end_to_end", "tokens": 2000, "steps": 20,
         "metrics": {"reverse_kl": 0.0123456}},
    ],
    "evaluation": {"pass@1": 0.5},
    "seed": 42,
    "command": "thinkfast-distill run recipe.yaml",
    "commit": "0123abc",
}  # fmt: skip


@pytest.fixture
def tokenizer(tmp_path):
    folder = tmp_path / "teacher"
    folder.mkdir()
    write_tokenizer(folder, 53 + 107)
    return folder


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def exported(kind, tokenizer, out, **options):
    student = random_student(kind, dtype=torch.float32)
    folder = export(student, student.config, tokenizer, out, card=CARD, **options)
    return student, folder


@pytest.mark.parametrize("kind", ["llamba", "mamba1", "mamba2"])
def test_export_reads_back(kind, tokenizer, tmp_path):
    """Through the plugin's reader: the same configuration and the same logits, bit by bit."""
    student, folder = exported(kind, tokenizer, tmp_path / "out")
    batch = packed([random_documents([40], 1)])
    again = load_student(folder, torch.float32)
    assert torch.equal(student(batch), again(batch))
    config = read_config(folder)
    assert config.weight_layout == "thinkfast"
    ours, theirs = student.config.to_dict(), config.to_dict()
    changed = {name for name in theirs if ours.get(name) != theirs[name]}
    tokens = {"bos_token_id", "eos_token_id", "pad_token_id"}
    assert changed <= {"architectures", "dtype", "transformers_version", *tokens}
    assert config.architectures == [type(config).__name__.replace("Config", "ForCausalLM")]
    text = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False
    )
    assert "hi" in text
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == AutoTokenizer.from_pretrained(folder).eos_token_id
    assert not list(tmp_path.glob(".*"))


def test_export_is_idempotent(tokenizer, tmp_path):
    _, folder = exported("llamba", tokenizer, tmp_path / "out")
    before = files(folder)
    exported("llamba", tokenizer, folder)
    assert files(folder) == before


def test_export_replaces_an_earlier_one(tokenizer, tmp_path):
    """Nothing of the earlier export is left."""
    _, folder = exported("mamba2", tokenizer, tmp_path / "out")
    (folder / "stray.txt").write_text("old")
    student, _ = exported("llamba", tokenizer, folder)
    assert not (folder / "stray.txt").exists()
    assert read_config(folder).num_heads == student.config.num_heads
    assert [path.name for path in tmp_path.iterdir()] in (["teacher", "out"], ["out", "teacher"])


def test_export_bfloat16(tokenizer, tmp_path):
    """Matrices are rounded, the recurrence's parameters are not."""
    student, folder = exported("mamba2", tokenizer, tmp_path / "out", dtype=torch.bfloat16)
    written = load_file(folder / "model.safetensors")
    kept = {name for name, tensor in written.items() if tensor.dtype == torch.float32}
    assert kept == {
        f"model.layers.{i}.mamba.{part}" for i in (0, 2) for part in ("A_log", "D", "dt_bias")
    }
    for name, tensor in written.items():
        assert torch.equal(tensor, student.state_dict()[name].to(tensor.dtype)), name
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_export_llama(tokenizer, tmp_path):
    """A Llama trained from scratch is plain transformers."""
    config = LlamaConfig(
        vocab_size=160, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    student = LlamaStudent(config)
    folder = export(student, config, tokenizer, tmp_path / "out", card={"name": "t"})
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    batch = packed([random_documents([20], 1)])
    with torch.no_grad():
        expected = model(batch.input_ids).logits
        found = student.hidden(batch) @ student.head_weight().T
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_export_chat_template(tokenizer, tmp_path):
    """The recipe's template is the only one in the folder."""
    template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    _, folder = exported("llamba", tokenizer, tmp_path / "out", chat_template=template)
    found = AutoTokenizer.from_pretrained(folder)
    text = found.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert text == "[a]"
    assert "chat_template" not in json.loads((folder / "tokenizer_config.json").read_text())


def test_export_keeps_the_teachers_generation_config(tokenizer, tmp_path):
    given = {"eos_token_id": [2, 7], "temperature": 0.7, "do_sample": True}
    (tokenizer / "generation_config.json").write_text(json.dumps(given))
    _, folder = exported("llamba", tokenizer, tmp_path / "out")
    assert json.loads((folder / "generation_config.json").read_text()) == given
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == [2, 7]


def test_model_card(tokenizer, tmp_path):
    student, folder = exported("llamba", tokenizer, tmp_path / "out")
    card = (folder / "README.md").read_text()
    number = sum(p.numel() for p in student.parameters())
    for fact in (
        "license: apache-2.0", "base_model: thinkfast/llama-tiny", "# thinkfast/llamba-tiny",
        f"{number:,} parameters", "| s1 | matrix_mixing | 1,000 | 10 | 3.25 |  |",
        "| s2 | end_to_end | 2,000 | 20 |  | 0.01235 |", "| arith | 750,000 | 75.0% |",
        "| text\\|raw | 250,000 | 25.0% |", "$ thinkfast-distill run recipe.yaml", "0123abc",
        "| pass@1 | 0.5 |", "$ vllm serve ./llamba-tiny", "* seed: 42",
    ):  # fmt: skip
        assert fact in card, fact
    record = json.loads((folder / RECORD).read_text())
    assert record == {**CARD, "num_parameters": number, "dtype": "float32"}


def test_sharded_weights(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "MAX_SHARD_SIZE", "20KB")
    student, folder = exported("mamba1", tokenizer, tmp_path / "out")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    batch = packed([random_documents([20], 1)])
    assert torch.equal(student(batch), load_student(folder, torch.float32)(batch))


def test_refused(tokenizer, tmp_path):
    """Each with one clear line, and nothing written."""
    student = random_student("llamba", dtype=torch.float32)
    out, config = tmp_path / "out", student.config

    def refuses(match, model=student, settings=config, source=tokenizer, to=out, **options):
        options = {"card": CARD, **options}
        with pytest.raises(ExportError, match=match) as caught:
            export(model, settings, source, to, **options)
        assert "\n" not in str(caught.value)
        assert not out.exists()
        assert not list(tmp_path.glob(".*"))

    refuses("no tokenizer; expected one of tokenizer.json", source=tmp_path)
    refuses("no such file", gguf_file="absent.gguf")
    refuses("accepted: torch.float32, torch.bfloat16", dtype=torch.float16)
    refuses("card: unknown losses; accepted", card={"losses": 1})
    refuses("card: data=3 must be an object", card={"data": 3})
    refuses("card: stages", card={"stages": [{"loss": 1}]})
    refuses("cannot be written as JSON", card={"evaluation": {"kl": float("nan")}})
    refuses("do not fit the configuration", settings=config_of("llamba", num_hidden_layers=3))
    refuses("is a file", to=tokenizer / "tokenizer.json")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    refuses("not an export", to=tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "x"
    broken = random_student("llamba", dtype=torch.float32)
    with torch.no_grad():
        broken.model.layers[1].mixer.D[0] = float("nan")
    refuses(r"layers\.1\.mixer\.D: holds values that are not finite", model=broken)
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text())
    settings.pop("eos_token")
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings))
    (tokenizer / "special_tokens_map.json").unlink(missing_ok=True)
    refuses("end-of-sequence token; generation would never stop")


@pytest.mark.parametrize("has_earlier", [False, True])
def test_no_space_left(has_earlier, tokenizer, tmp_path, monkeypatch):
    """The earlier export stays as it was."""
    out = tmp_path / "out"
    if has_earlier:
        exported("llamba", tokenizer, out)
    before = files(out) if has_earlier else None

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export_module, "save_torch_state_dict", full)
    with pytest.raises(ExportError, match="No space left on device; free some space"):
        exported("mamba2", tokenizer, out)
    assert (files(out) if has_earlier else None) == before
    assert not list(tmp_path.glob(".*"))


def test_interrupted_export_leaves_the_earlier_one(tokenizer, tmp_path, monkeypatch):
    out = tmp_path / "out"
    exported("llamba", tokenizer, out)
    before = files(out)

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(export_module.model_card, "render", killed)
    with pytest.raises(KeyboardInterrupt):
        exported("mamba2", tokenizer, out)
    assert files(out) == before
    monkeypatch.undo()
    # What a kill -9 leaves behind is no obstacle either.
    shutil.copytree(out, tmp_path / ".out.partial")
    exported("mamba2", tokenizer, out)
    assert not list(tmp_path.glob(".*"))
