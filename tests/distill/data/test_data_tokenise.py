import json

import numpy as np
import pytest
import torch

from thinkfast_distill.data import tokenise as tokenise_module
from thinkfast_distill.data.arith_tokenizer import build_tokenizer, write_tokenizer
from thinkfast_distill.data.decontaminate import Decontaminator
from thinkfast_distill.data.errors import DataError
from thinkfast_distill.data.formatting import Formatter
from thinkfast_distill.data.loader import Loader
from thinkfast_distill.data.memmap import MemmapReader
from thinkfast_distill.data.source_config import source_config
from thinkfast_distill.data.tokenise import main, tokenise

ARITH = {"kind": "arith", "name": "s", "num": 40}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def formatter(tokenizer):
    return Formatter(tokenizer)


def _files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_memmap_trains_like_its_source(tmp_path, tokenizer, formatter):
    meta = tokenise(source_config(ARITH), formatter, tmp_path / "s")
    assert meta["num_documents"] == 40
    assert (tmp_path / "s" / "tokens.u32").stat().st_size == 4 * meta["num_tokens"]
    memmap = {"kind": "memmap", "path": str(tmp_path / "s")}
    one, other = (Loader([s], tokenizer, 256, 4, 3, loss_on="completion") for s in (ARITH, memmap))
    for _ in range(2):
        a, b = one.next(), other.next()
        assert torch.equal(a.input_ids, b.input_ids)
        assert torch.equal(a.loss_mask, b.loss_mask)
        assert a.sample_ids == b.sample_ids


def test_raw_text_needs_no_mask_file(tmp_path, formatter):
    (tmp_path / "a.jsonl").write_text('{"text": "12 apples"}\n{"text": "5"}\n')
    config = source_config({"kind": "jsonl", "path": str(tmp_path / "a.jsonl")})
    tokenise(config, formatter, tmp_path / "out")
    assert set(_files(tmp_path / "out")) == {"tokens.u32", "offsets.i64", "meta.json"}
    reader = MemmapReader(tmp_path / "out", formatter)
    assert len(reader) == 2
    assert reader.document(1).tokens.dtype == np.uint32
    assert reader.document(1).completion.tolist() == [True, True]
    assert [reader.num_tokens(i) for i in range(2)] == [3, 2]


@pytest.mark.parametrize("stop", [0, 1, 6, 7, 25, 39])
def test_an_interrupted_command_continues_exactly(tmp_path, formatter, monkeypatch, stop):
    tokenise(source_config(ARITH), formatter, tmp_path / "whole", save_every=3)
    real = tokenise_module.read_in_order

    def interrupted(config, formatter, first):
        for i, document in enumerate(real(config, formatter, first)):
            if i == stop:
                raise KeyboardInterrupt
            yield document

    monkeypatch.setattr(tokenise_module, "read_in_order", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tokenise(source_config(ARITH), formatter, tmp_path / "s", save_every=3)
    assert not (tmp_path / "s").exists()
    with (tmp_path / "s.partial" / "tokens.u32").open("ab") as tokens:
        tokens.write(b"torn")  # written, but not saved
    starts = []
    monkeypatch.setattr(
        tokenise_module,
        "read_in_order",
        lambda c, f, first: starts.append(first) or real(c, f, first),
    )
    tokenise(source_config(ARITH), formatter, tmp_path / "s", save_every=3)
    assert starts == [stop - stop % 3]
    assert _files(tmp_path / "s") == _files(tmp_path / "whole")
    assert not (tmp_path / "s.partial").exists()


def test_a_part_of_another_command_is_not_continued(tmp_path, formatter, monkeypatch):
    def broken(config, formatter, first):
        raise KeyboardInterrupt
        yield

    with monkeypatch.context() as patch:
        patch.setattr(tokenise_module, "read_in_order", broken)
        with pytest.raises(KeyboardInterrupt):
            tokenise(source_config(ARITH), formatter, tmp_path / "s")
    with pytest.raises(DataError, match=r"s\.partial was begun with another max_documents"):
        tokenise(source_config(ARITH), formatter, tmp_path / "s", max_documents=3)


def test_limits_and_dropped_documents(tmp_path, formatter):
    rows = [{"text": t} for t in ("1", "1 " * 50, "what is two", "2", "3", "4")]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = source_config({"kind": "jsonl", "path": str(tmp_path / "a.jsonl")})
    known = Decontaminator(["What is two?"])
    meta = tokenise(
        config, formatter, tmp_path / "one", max_documents=3, max_document_tokens=20,
        decontaminator=known,
    )  # fmt: skip
    assert meta["num_documents"] == 3
    assert meta["dropped"] == {"exact": 1, "ngram": 0, "long": 1}
    assert meta["decontamination"]["fingerprint"] == known.fingerprint
    meta = tokenise(config, formatter, tmp_path / "two", max_tokens=3)
    assert meta["num_documents"] == 2, "the document that reaches the limit is complete"
    with pytest.raises(DataError, match="no document left to write"):
        tokenise(config, formatter, tmp_path / "three", max_document_tokens=1)


def test_folders_of_other_tokenizers_templates_or_damage_are_refused(tmp_path, formatter):
    tokenise(source_config(ARITH), formatter, tmp_path / "s")
    other = build_tokenizer()
    other.add_tokens(["x"])
    with pytest.raises(DataError, match="made with another tokenizer"):
        MemmapReader(tmp_path / "s", Formatter(other))
    template = str(formatter.tokenizer.chat_template) + " "
    with pytest.raises(DataError, match="another chat template or date"):
        MemmapReader(tmp_path / "s", Formatter(formatter.tokenizer, chat_template=template))
    file = tmp_path / "s" / "completion.u8"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"completion\.u8 should have \d+ bytes"):
        MemmapReader(tmp_path / "s", formatter)
    with pytest.raises(DataError, match=r"has no meta\.json"):
        MemmapReader(tmp_path / "none", formatter)
    (tmp_path / "s" / "meta.json").write_text('{"version": 9}')
    with pytest.raises(DataError, match="has not the format version 1"):
        MemmapReader(tmp_path / "s", formatter)


def test_command(tmp_path, capsys):
    write_tokenizer(tmp_path / "tokenizer")
    arguments = ["{kind: arith, num: 5}", "--tokenizer", str(tmp_path / "tokenizer")]
    arguments += ["--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert "5 documents" in capsys.readouterr().out
    for wrong, message in [
        (arguments, "exists; remove it"),
        (["{kind: arith}", *arguments[1:]], "arith has no end; give num"),
        (["finemath", *arguments[1:]], "give one of finemath-4plus, openmathinstruct-2"),
        (["{kind: memmap, path: x}", *arguments[1:-1], str(tmp_path / "b")], "tokenised already"),
        ([arguments[0], "--tokenizer", str(tmp_path), *arguments[3:]], "cannot be loaded"),
    ]:
        assert main(wrong) == 2
        error = capsys.readouterr().err.splitlines()
        assert error[-1].startswith("error: ")
        assert message in error[-1]
