import json
import shutil

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


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_memmap_must_be_decontaminated_as_the_mixture_says(tmp_path, tokenizer, formatter):
    """Its documents are tokens, in which the run cannot look for problems any more."""
    rows = [{"text": f"{i} apples and 3 pears in a basket"} for i in range(8)]
    source = {"kind": "jsonl", "path": str(_write(tmp_path / "a.jsonl", rows)), "epochs": None}
    problems = [{"problem": rows[i]["text"]} for i in range(0, 8, 2)]
    problems = str(_write(tmp_path / "problems.jsonl", problems))
    other = str(_write(tmp_path / "other.jsonl", [{"problem": "What is two and two?"}]))
    known = {name: Decontaminator.from_files([name]) for name in (problems, other)}
    for folder, against in (("none", None), ("other", known[other]), ("right", known[problems])):
        tokenise(source_config(source), formatter, tmp_path / folder, decontaminator=against)

    def sources(folder):
        return [{"kind": "memmap", "path": str(tmp_path / folder), "epochs": None}]

    for folder, how in (("none", "without decontamination"), ("other", "against other problems")):
        with pytest.raises(DataError, match=rf"{folder} was made {how}, .* --decontaminate"):
            Loader(sources(folder), tokenizer, 88, 1, 0, decontaminate=[problems])
    Loader(sources("none"), tokenizer, 88, 1, 0)
    found = Loader(sources("right"), tokenizer, 88, 1, 0, decontaminate=[problems])
    direct = Loader([source], tokenizer, 88, 1, 0, decontaminate=[problems])

    def tokens(loader):
        batch = loader.next()
        assert len(batch.sample_ids[0]) == 4
        return sorted(batch.input_ids[0][batch.document_ids[0] >= 0].tolist())

    assert tokens(found) == tokens(direct), "the same four documents"


def test_memmap_of_step_labels_learns_the_labels_alone(tmp_path, tokenizer, formatter):
    labelled = {"kind": "arith", "name": "s", "num": 20, "mistakes": 0.5}
    for folder, extra in (("labels", {}), ("steps", {"learn_steps": True})):
        tokenise(source_config({**labelled, **extra}), formatter, tmp_path / folder)

    def batch(**source):
        return Loader([source], tokenizer, 512, 2, 3, loss_on="all").next()

    for folder, extra in (("labels", {}), ("steps", {"learn_steps": True})):
        wanted = batch(**labelled, **extra)
        memmap = {"kind": "memmap", "name": "s", "path": str(tmp_path / folder)}
        found = batch(**memmap, step_labels=True, **extra)
        assert torch.equal(found.input_ids, wanted.input_ids)
        assert torch.equal(found.loss_mask, wanted.loss_mask)
        assert source_config({**memmap, "step_labels": True, **extra}).has_step_labels
        with pytest.raises(DataError, match=r"step_labels: false, but .* step_labels: true"):
            batch(**memmap)
    with pytest.raises(DataError, match=r"learn_steps: false, but .* learn_steps: true"):
        batch(**memmap, step_labels=True)
    tokenise(source_config(ARITH), formatter, tmp_path / "plain")
    with pytest.raises(DataError, match=r"step_labels: true, but .* no step labels"):
        batch(kind="memmap", path=str(tmp_path / "plain"), step_labels=True)


def test_memmap_that_was_made_again_is_not_continued(tmp_path, tokenizer, formatter):
    source = {"kind": "memmap", "path": str(tmp_path / "s")}
    for num in (40, 41):
        tokenise(source_config({**ARITH, "num": num}), formatter, tmp_path / "s")
        loader = Loader([source], tokenizer, 256, 1, 3)
        if num == 40:
            state = loader.state()
            Loader([source], tokenizer, 256, 1, 3, state)
            shutil.rmtree(tmp_path / "s")
    with pytest.raises(DataError, match=r"source s: .* \(documents: then 40, now 41\)"):
        Loader([source], tokenizer, 256, 1, 3, state)


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


@pytest.mark.parametrize("at", ["rename", "unlink"])
def test_a_kill_at_the_end_loses_nothing(tmp_path, formatter, monkeypatch, at):
    def killed(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tokenise_module.Path, at, killed)
        with pytest.raises(KeyboardInterrupt):
            tokenise(source_config(ARITH), formatter, tmp_path / "s")
    if at == "rename":
        monkeypatch.setattr(tokenise_module.Writer, "add", lambda *_: pytest.fail("begun again"))
        tokenise(source_config(ARITH), formatter, tmp_path / "s")
    assert len(MemmapReader(tmp_path / "s", formatter)) == ARITH["num"]


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
        (["{preset: finemath}", *arguments[1:]], "source.preset: 'finemath' is not accepted"),
    ]:
        assert main(wrong) == 2
        error = capsys.readouterr().err.splitlines()
        assert error[-1].startswith("error: ")
        assert message in error[-1]
