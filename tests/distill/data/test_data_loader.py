"""Mixing, packing and batches; above all: nothing lost, nothing twice, and exact continuation."""

import json
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest
import torch

from thinkfast_distill.data.arith_tokenizer import build_tokenizer
from thinkfast_distill.data.errors import DataError
from thinkfast_distill.data.loader import Loader
from thinkfast_distill.data.presets import SOURCES, expand
from thinkfast_distill.data.source_config import source_config
from thinkfast_distill.data.sources import JsonlRecords
from thinkfast_distill.recipe import RecipeError

EOS = 2


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _texts(path, lengths, number):
    """Raw texts that are ``lengths`` tokens long with their EOS; the numbers tell them apart."""
    rows = [{"text": " ".join([str(number + i % 9)] * (n // 2))} for i, n in enumerate(lengths)]
    return {"kind": "jsonl", "path": _write(path, rows)}


@pytest.fixture
def mixed(tmp_path):
    """Two sources of short and of very long documents, and one of conversations."""
    chats = [{"problem": f"{i % 90}+1?", "generated_solution": f"{i % 90 + 1}"} for i in range(300)]
    return [
        _texts(tmp_path / "short.jsonl", [4 + 2 * (i % 9) for i in range(300)], 10),
        _texts(tmp_path / "long.jsonl", [70 + 2 * i for i in range(60)], 20),
        {"kind": "jsonl", "path": _write(tmp_path / "chat.jsonl", chats), "layout": "prompt"},
    ]


def _budgets(sources, *tokens):
    return [source | {"tokens": n} for source, n in zip(sources, tokens, strict=True)]


def _all_batches(loader, total):
    batches = []
    while sum(sum(batch.source_tokens.values()) for batch in batches) < total:
        batches.append(loader.next())
    with pytest.raises(DataError, match="the token budgets of all sources"):
        loader.next()
    return batches


def _pieces(batch):
    """(name, tokens) of every document in a batch, and checks of its boundaries."""
    found = []
    for ids, positions, documents, loss, names in zip(
        batch.input_ids, batch.position_ids, batch.document_ids, batch.loss_mask, batch.sample_ids,
        strict=True,
    ):  # fmt: skip
        real = int((documents >= 0).sum())
        assert (documents[real:] == -1).all(), "padding only at the end"
        assert not loss[real:].any()
        for d, name in enumerate(names):
            (here,) = torch.nonzero(documents == d, as_tuple=True)
            assert here.tolist() == list(range(int(here[0]), int(here[0]) + len(here)))
            assert positions[here].tolist() == list(range(len(here)))
            found.append((name, tuple(ids[here].tolist())))
        assert int(documents.max()) == len(names) - 1
    return found


def test_no_token_is_lost_or_repeated(mixed, tokenizer):
    """Every document comes out whole: long ones in parts of a row, the rest in a last one."""
    budgets = (1200, 3000, 800)
    loader = Loader(_budgets(mixed, *budgets), tokenizer, 64, 4, seed=1)
    batches = _all_batches(loader, sum(budgets))
    parts = {}
    for batch in batches:
        for name, ids in _pieces(batch):
            name, _, start = name.partition("+")
            parts.setdefault(name, {})[int(start or 0)] = ids
    realised = Counter()
    cut = []
    for name, found in parts.items():
        source, _, index = name.partition(":")
        assert sorted(found) == list(range(0, 64 * len(found), 64)), "no part twice or missing"
        whole = [token for start in sorted(found) for token in found[start]]
        realised[source] += len(whole)
        with open(mixed[["short", "long", "chat"].index(source)]["path"]) as lines:
            record = json.loads(lines.readlines()[int(index)])
        if "text" in record:
            expected = [*tokenizer.encode(record["text"], add_special_tokens=False), EOS]
        else:
            text = f"<|bos|><|user|>{record['problem']}<|assistant|>{record['generated_solution']}"
            expected = [*tokenizer.encode(text, add_special_tokens=False), EOS]
        if whole != expected:
            assert whole == expected[: len(whole)]
            cut.append(source)
    assert realised == {"short": 1200, "long": 3000, "chat": 800}, "budgets are met exactly"
    assert len(cut) == len(set(cut)) <= 3, "only the last document of each source may be cut"
    total = Counter()
    for batch in batches:
        total.update(batch.source_tokens)
        assert sum(batch.source_tokens.values()) == int((batch.document_ids >= 0).sum())
    assert total == realised
    report = loader.report()
    assert [one["tokens"] for one in report["sources"]] == list(budgets)
    assert sum(one["share"] for one in report["sources"]) == pytest.approx(1)


def test_shares_are_kept_all_the_way(mixed, tokenizer):
    """Never more than one document away, although documents differ in length by a factor of 30."""
    sources = [s | {"weight": w, "epochs": None} for s, w in zip(mixed, (1, 2, 1), strict=True)]
    loader = Loader(sources, tokenizer, 64, 4, seed=3)
    for _ in range(60):
        loader.next()
        tokens = [one["tokens"] for one in loader.state()["sources"]]
        for used, share in zip(tokens, (0.25, 0.5, 0.25), strict=True):
            assert abs(used - share * sum(tokens)) <= 190
    assert loader.state()["sources"][0]["epoch"] > 0, "passes do not disturb the shares"


def test_rows_are_nearly_full(mixed, tokenizer):
    sources = [source | {"epochs": None} for source in mixed]
    loader = Loader(sources, tokenizer, 128, 8, seed=0)
    batches = [loader.next() for _ in range(20)]
    filled = sum(int((batch.document_ids >= 0).sum()) for batch in batches)
    assert filled / (20 * 8 * 128) > 0.97


def _equal(one, other):
    return (
        torch.equal(one.input_ids, other.input_ids)
        and torch.equal(one.position_ids, other.position_ids)
        and torch.equal(one.document_ids, other.document_ids)
        and torch.equal(one.loss_mask, other.loss_mask)
        and one.sample_ids == other.sample_ids
    )


def test_a_resumed_loader_continues_exactly(mixed, tokenizer):
    sources = [source | {"epochs": None} for source in mixed]

    def new(state=None):
        return Loader(sources, tokenizer, 64, 4, 5, state)

    whole = new()
    expected = [whole.next() for _ in range(12)]
    had_waiting = False
    for stop in range(12):
        loader = new()
        for _ in range(stop):
            loader.next()
        state = json.loads(json.dumps(loader.state()))
        had_waiting = had_waiting or bool(state["waiting"])
        resumed = new(state)
        assert resumed.state() == state
        for batch in expected[stop:]:
            assert _equal(resumed.next(), batch)
    assert had_waiting, "otherwise carrying over was not tested"


def test_ranks_share_the_same_global_batch_and_state(mixed, tokenizer):
    sources = [source | {"epochs": None} for source in mixed]

    def new(state=None):
        return Loader(sources, tokenizer, 64, 4, 5, state)

    whole, parts, state = new(), [new(), new()], None
    for _ in range(3):
        batch = whole.next()
        for rank, loader in enumerate(parts):
            part = loader.next(rank, 2)
            assert torch.equal(part.input_ids, batch.input_ids[rank::2])
            assert torch.equal(part.loss_mask, batch.loss_mask[rank::2])
            assert part.sample_ids == batch.sample_ids[rank::2]
        assert parts[0].state() == parts[1].state() == whole.state()
        state = whole.state()
    batch = whole.next()  # two ranks go on as four
    for rank in range(4):
        part = new(state).next(rank, 4)
        assert torch.equal(part.input_ids, batch.input_ids[rank::4])
    with pytest.raises(DataError, match="4 rows per batch cannot be shared by 3 ranks"):
        whole.next(0, 3)


def test_order_depends_on_the_seed_and_differs_between_epochs(tmp_path, tokenizer):
    source = _texts(tmp_path / "a.jsonl", [8] * 40, 10) | {"epochs": 2}

    def names(seed):
        loader = Loader([source], tokenizer, 32, 4, seed)
        return [n for _ in range(4) for row in loader.next().sample_ids for n in row]

    one = names(1)
    assert one == names(1)
    assert one != names(2)
    first, second = one[:40], [*one[40:]]
    assert sorted(first) == sorted(f"a:{i}" for i in range(40))
    assert first[: len(second)] != second
    assert set(second) <= set(first)


def test_loss_masks_follow_the_source(mixed, tokenizer):
    sources = [mixed[0], mixed[2] | {"loss_on": "completion"}]
    batch = Loader(sources, tokenizer, 64, 4, 0).next()
    for row, names in enumerate(batch.sample_ids):
        for d, name in enumerate(names):
            here = batch.document_ids[row] == d
            mask, ids = batch.loss_mask[row][here], batch.input_ids[row][here]
            if name.startswith("chat"):
                start = ids.tolist().index(tokenizer.convert_tokens_to_ids("<|assistant|>")) + 1
                assert mask.tolist() == [i >= start for i in range(len(ids))]
            else:
                assert mask.all()
    completion = Loader(mixed, tokenizer, 64, 4, 0, loss_on="completion")
    everything = Loader(mixed, tokenizer, 64, 4, 0, loss_on="all")
    assert completion.next().num_targets() < everything.next().num_targets()
    assert completion.fingerprint != everything.fingerprint


def test_arith_source_needs_no_files(tokenizer):
    sources = [
        {"kind": "arith", "weight": 1, "min_steps": 1, "max_steps": 3},
        {"kind": "arith", "weight": 3},
    ]
    loader = Loader(sources, tokenizer, 256, 4, 0, loss_on="completion")
    batch = loader.next()
    text = tokenizer.decode(batch.input_ids[0][batch.document_ids[0] == 0])
    assert text.startswith("<|bos|><|user|>")
    assert text.endswith("<|eos|>")
    assert "####" in text
    shares = [one["share"] for one in loader.report()["sources"]]
    assert shares == pytest.approx([0.25, 0.75], abs=0.05)


def test_parquet_gives_what_jsonl_gives(tmp_path, tokenizer):
    rows = [{"text": f"{i} apples", "other": i} for i in range(50)]
    jsonl = {"kind": "jsonl", "name": "s", "path": _write(tmp_path / "a.jsonl", rows)}
    for part in (0, 1):
        table = pyarrow.Table.from_pylist(rows[25 * part : 25 * part + 25])
        pyarrow.parquet.write_table(table, tmp_path / f"p{part}.parquet")
    parquet = {"kind": "parquet", "name": "s", "path": str(tmp_path / "p*.parquet")}
    one, other = (Loader([s], tokenizer, 16, 4, 0) for s in (jsonl, parquet))
    assert _equal(one.next(), other.next())


def test_stream_has_every_record_once_and_resumes(tmp_path, tokenizer):
    """Through the datasets library's own streaming, with a local file in place of the hub."""
    path = _write(tmp_path / "a.jsonl", [{"text": f"{10 + i}"} for i in range(50)])
    source = {"kind": "hub", "dataset": "json", "data_files": path, "epochs": None}
    source |= {"shuffle_window": 16}

    def new(state=None):
        return Loader([source], tokenizer, 8, 2, 0, state)

    loader = new()
    batches = [loader.next() for _ in range(14)]
    names = [n for batch in batches for row in batch.sample_ids for n in row]
    assert sorted(names[:50]) == sorted(f"json:{i}" for i in range(50))
    assert names[:16] != [f"json:{i}" for i in range(16)]
    assert names[50:100] != names[:50]
    half = new()
    for _ in range(5):
        half.next()
    resumed = new(json.loads(json.dumps(half.state())))
    assert all(_equal(resumed.next(), batch) for batch in batches[5:])


def test_stream_skips_what_is_held_out(tmp_path, tokenizer):
    path = _write(tmp_path / "a.jsonl", [{"text": f"{10 + i}"} for i in range(50)])
    source = {"kind": "hub", "dataset": "json", "data_files": path, "epochs": None}
    source |= {"shuffle_window": 16}
    batch = Loader([{**source, "skip": 20}], tokenizer, 2 * 30, 1, 0).next()
    names = batch.sample_ids[0]
    assert sorted(names) == sorted(f"json:{i}" for i in range(20, 50)), "records keep their numbers"
    found = {name: int(tokenizer.decode(ids[0])) for name, ids in _pieces(batch)}
    assert found == {f"json:{i}": 10 + i for i in range(20, 50)}
    with pytest.raises(DataError, match=r"skip: -1 must be >= 0"):
        Loader([{**source, "skip": -1}], tokenizer, 64, 1, 0)


def test_dropped_documents_are_counted(tmp_path, tokenizer):
    problem = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    rows = [{"text": f"{i} apples"} for i in range(20)]
    rows += [{"text": problem.upper()}, {"text": "So " + problem}, {"text": "1 " * 200}]
    source = {"kind": "jsonl", "path": _write(tmp_path / "a.jsonl", rows), "epochs": None}
    evaluation = tmp_path / "eval.jsonl"
    evaluation.write_text(json.dumps({"problem": problem}) + "\n")
    loader = Loader(
        [source], tokenizer, 32, 4, 0, decontaminate=[evaluation], max_document_tokens=100
    )
    names = {n for _ in range(6) for row in loader.next().sample_ids for n in row}
    assert names == {f"a:{i}" for i in range(20)}
    (found,) = loader.report()["sources"]
    assert found["epoch"] >= 1
    assert set(found["dropped"].values()) <= {found["epoch"], found["epoch"] + 1}
    assert loader.report()["decontamination"]["problems"] == 1
    everything_dropped = source | {"path": _write(tmp_path / "b.jsonl", rows[20:22])}
    loader = Loader([everything_dropped], tokenizer, 32, 4, 0, decontaminate=[evaluation])
    with pytest.raises(DataError, match="a whole pass had no usable document"):
        loader.next()


def test_a_source_that_ends_before_its_budget(tmp_path, tokenizer):
    source = _texts(tmp_path / "a.jsonl", [8] * 10, 10)
    loader = Loader([source | {"tokens": 100}], tokenizer, 32, 4, 0)
    with pytest.raises(DataError, match=r"a ended before its budget of 100 tokens: 10 documents"):
        loader.next()
    loader = Loader([source | {"tokens": 100, "epochs": 2}], tokenizer, 32, 4, 0)
    assert sum(loader.next().source_tokens.values()) == 100
    with pytest.raises(DataError, match=r"budgets of all sources \(100 tokens\) are used after 1"):
        loader.next()


def test_passes_may_change_but_not_below_those_that_were_made(tmp_path, tokenizer):
    source = _texts(tmp_path / "a.jsonl", [8] * 40, 10)

    def new(epochs, state=None):
        return Loader([source | {"epochs": epochs}], tokenizer, 32, 2, 0, state)

    loader = new(3)
    while loader.state()["sources"][0]["epoch"] < 1:
        loader.next()
    state = loader.state()
    expected = loader.next()
    for epochs in (2, 3, 9, None):
        assert _equal(new(epochs, state).next(), expected), epochs
    with pytest.raises(DataError, match=r"a: epochs: 1, but the run is in pass 2 .* at least 2"):
        new(1, state)
    # States of earlier versions counted the passes.
    earlier = {**state, "fingerprint": new(3)._fingerprints[1]}
    assert earlier["fingerprint"] != state["fingerprint"]
    assert _equal(new(3, earlier).next(), expected)
    # Of a source with the default, that is the hash of today.
    assert len(set(new(1)._fingerprints)) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "csv"}, "sources.0: kind 'csv' is not accepted; accepted: jsonl, parquet"),
        ({"txt_field": "a"}, "sources.0: txt_field: unknown key; accepted: kind, name"),
        ({"tokens": 0}, "tokens: 0 must be above 0"),
        ({"tokens": 5, "weight": 1}, "give tokens or weight, not both"),
        ({"path": "none.jsonl"}, "none.jsonl is not a file"),
        ({"path": "none*.jsonl"}, "no file matches 'none*.jsonl'"),
        ({"path": []}, "the list is empty"),
        ({"text_field": "content"}, "a.jsonl:1: no field 'content'; the fields are 'text'"),
        ({"layout": "prose"}, "'prose' is not accepted"),
    ],
)
def test_wrong_source_options_are_reported(tmp_path, tokenizer, change, message):
    source = _texts(tmp_path / "a.jsonl", [8], 10) | change
    with pytest.raises(DataError) as caught:
        Loader([source], tokenizer, 32, 4, 0)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a.jsonl: the file is empty"),
        (b"\n \n", "a.jsonl: the file is empty"),
        (b'\n{"text": "1"\n', "a.jsonl:2: not JSON"),
        (b"[1]\n", "a.jsonl:1: need a JSON object, got list"),
        (b'{"text": "\xff"}\n', "a.jsonl:1: not UTF-8"),
        (b'{"text": ""}\n', "a.jsonl:1: field 'text' is empty"),
    ],
)
def test_malformed_files_are_reported_with_their_line(tmp_path, tokenizer, content, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError) as caught:
        Loader([{"kind": "jsonl", "path": str(tmp_path / "a.jsonl")}], tokenizer, 32, 4, 0)
    assert message in str(caught.value)
    assert "source a: " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_malformed_line_in_the_middle_is_reported_when_it_is_read(tmp_path, tokenizer):
    lines = ['{"text": "1"}'] * 30
    lines[17] = '{"text": 1}'
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    loader = Loader([{"kind": "jsonl", "path": str(tmp_path / "a.jsonl")}], tokenizer, 32, 4, 0)
    with pytest.raises(DataError, match=r"a\.jsonl:18: field 'text' must be text, got int"):
        loader.next()


def test_wrong_parquet_files_are_reported(tmp_path, tokenizer):
    path = tmp_path / "a.parquet"
    source = {"kind": "parquet", "path": str(path)}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"body": "1"}]), path)
    with pytest.raises(DataError, match="no field 'text'; the fields are 'body'"):
        Loader([source], tokenizer, 32, 4, 0)
    pyarrow.parquet.write_table(pyarrow.Table.from_pydict({"text": []}), path)
    with pytest.raises(DataError, match="the file has no rows"):
        Loader([source], tokenizer, 32, 4, 0)
    path.write_text("not parquet")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        Loader([source], tokenizer, 32, 4, 0)


def test_states_of_other_data_are_refused(mixed, tokenizer):
    state = Loader(mixed, tokenizer, 64, 4, 5).state()
    for other in (
        lambda: Loader(mixed, tokenizer, 64, 4, 6, state),
        lambda: Loader(mixed, tokenizer, 32, 4, 5, state),
        lambda: Loader(mixed[:2], tokenizer, 64, 4, 5, state),
        lambda: Loader(mixed, tokenizer, 64, 4, 5, state, loss_on="completion"),
    ):
        with pytest.raises(DataError, match="saved with other sources, seed"):
            other()
    with pytest.raises(DataError, match="version 0"):
        Loader(mixed, tokenizer, 64, 4, 5, state | {"version": 0})


def test_a_file_with_other_records_is_not_continued(mixed, tokenizer):
    """One record more or less is another order, not only another end."""
    loader = Loader(mixed, tokenizer, 64, 4, 5)
    loader.next()
    state = json.loads(json.dumps(loader.state()))
    with open(mixed[0]["path"], "a") as lines:
        lines.write('{"text": "1"}\n')
    with pytest.raises(DataError, match=r"source short: its data has changed .* then 300, now 301"):
        Loader(mixed, tokenizer, 64, 4, 5, state)
    for one in state["sources"]:
        del one["contents"]  # a state of an earlier version
    Loader(mixed, tokenizer, 64, 4, 5, state)


def test_fingerprints_do_not_change_with_the_version(tokenizer):
    """Otherwise runs that were begun with an earlier version could not be continued."""
    loader = Loader([{"kind": "arith"}], tokenizer, 256, 8, 42, loss_on="completion")
    assert loader.fingerprint == "09724c7dd27f65f4"
    hub, memmap = ({"kind": "hub", "dataset": "d"}, {"kind": "memmap", "path": "p"})
    for raw, added in ((hub, {"skip": 3}), (memmap, {"step_labels": True, "learn_steps": True})):
        assert not added.keys() & source_config(raw).settings().keys()
        assert added.items() <= source_config({**raw, **added}).settings().items()


def test_wrong_mixtures_are_refused(mixed, tokenizer):
    with pytest.raises(DataError, match="long: no tokens, but short has"):
        Loader([mixed[0] | {"tokens": 5}, mixed[1]], tokenizer, 64, 4, 0)
    with pytest.raises(DataError, match="two sources are named 'short'"):
        Loader([mixed[0], mixed[0]], tokenizer, 64, 4, 0)
    with pytest.raises(DataError, match="the list is empty"):
        Loader([], tokenizer, 64, 4, 0)
    with pytest.raises(DataError, match="loss_on: 'some' is not accepted"):
        Loader(mixed, tokenizer, 64, 4, 0, loss_on="some")


def test_presets_are_valid_and_can_be_changed():
    for name, raw in SOURCES.items():
        assert source_config(raw).label == name
        changed = expand({"preset": name, "tokens": 5, "split": "test"}, "s")
        assert changed == raw | {"tokens": 5, "split": "test"}
    assert expand({"kind": "arith", "num": 3}, "s") == {"kind": "arith", "num": 3}
    with pytest.raises(RecipeError, match=r"s\.preset: 'openhermes' is not accepted; accepted: f"):
        expand({"preset": "openhermes"}, "s")
    with pytest.raises(RecipeError, match="give preset or kind, not both"):
        expand({"preset": "openhermes-2.5", "kind": "jsonl"}, "s")


def test_file_that_is_gone_is_named(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "1"}\n')
    records = JsonlRecords([file])
    file.unlink()
    with pytest.raises(DataError, match=r"a\.jsonl: cannot be read \(No such file"):
        records[0]
