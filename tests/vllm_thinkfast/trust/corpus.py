"""Damaged checkpoint folders: a seeded list of cases, the same in every process.

A case replaces one or several files of a small valid folder, one per published format and some
written by ``thinkfast convert``. In the valid folders every option differs from its default as far
as the format allows, so that a value that is dropped shows.
"""

import itertools
import json
import math
import random
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from tests.reference.random_checkpoints import ROPE_LLAMA3, write_checkpoint
from vllm_thinkfast.checkpoints.convert import convert_checkpoint
from vllm_thinkfast.configs import llamba, mamba_in_llama

SEED = 20261121

Files = dict[str, bytes | None]


@dataclass(frozen=True)
class Case:
    """One damaged folder."""

    base: str
    """Name of the valid folder."""
    what: str
    """For people: which file, which field, what was done to it."""
    files: Files
    """Name -> contents instead of the valid folder's; None: the file is gone."""
    must_fail: bool = False
    """Loading it as if nothing were wrong would be a mistake, whatever is loaded."""
    hints: tuple[str, ...] = field(default=())
    """An error has to name one of these: the field or the tensor if one was damaged, else the
    file."""
    has_values: bool = True
    """Whether the file says which numbers its tensors hold. In files before torch 1.6 a tensor may
    name a storage that is not there: torch 2.13 then gives whatever is in memory, every time
    something else, and has no way to tell."""


_SMALL = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "vocab_size": 24,
    "rms_norm_eps": 2e-5,
    "max_position_embeddings": 4096,
}
_BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llamba": (
        "llamba",
        {
            "config": {
                "vocab_size": 22,
                "pad_vocab_size_multiple": 4,
                "d_model": 16,
                "n_layer": 2,
                "tie_embeddings": False,
                "lm_head_bias": True,
                "norm_epsilon": 3e-5,
                "mlp_cfg": {"intermediate_size": 24, "bias": True},
                "ssm_cfg": {
                    "d_state": 4,
                    "n_v_heads": 4,
                    "n_qk_heads": 2,
                    "chunk_size": 64,
                    "expand": 2,
                    "activation": "silu",
                    "bias": True,
                    "d_conv": 3,
                    "conv_bias": False,
                },
            }
        },
    ),
    "mamba1": (
        "mambainllama_mamba1",
        {
            "config": {**_SMALL, "head_dim": 16, "rope_scaling": ROPE_LLAMA3},
            "mamba_config": {
                "rms_norm_eps": 4e-5,
                "d_inner": None,
                "ssm_cfg": {
                    "d_state": 8,
                    "d_conv": 3,
                    "expand": 1,
                    "dt_rank": 3,
                    "repeat_kv_before_conv": False,
                    "conv_bias": False,
                    "proj_x_bias": True,
                    "proj_z_bias": True,
                    "out_proj_bias": True,
                },
            },
        },
    ),
    "mamba2": (
        "mambainllama_mamba2",
        {
            "config": {
                **_SMALL,
                "model_type": "mistral",
                "sliding_window": 6,
                "tie_word_embeddings": True,
            },
            "mamba_config": {
                "ssm_cfg": {
                    "d_conv": 3,
                    "chunk_size": 64,
                    "conv_bias": False,
                    "norm_before_gate": True,
                    "repeat_kv_before_conv": True,
                    "D_has_hdim": True,
                    "bias": True,
                    "dt_limit": [0.25, math.inf],
                }
            },
            "container": "bin",
        },
    ),
    "m1": (
        "m1",
        {"config": {**_SMALL, "head_dim": 16}, "container": "sharded_safetensors"},
    ),
}
FORMAT_OF = {name: format for name, (format, _) in _BASES.items()}
CONVERTED = ("llamba", "mamba1", "mamba2")
"""Bases that are also there as ``thinkfast convert`` writes them, under the name BASE-hf."""


def write_bases(root: Path) -> None:
    """Writes the valid folders."""
    for name, (format, options) in _BASES.items():
        write_checkpoint(root / name, format, seed=3, **options)
        if name in CONVERTED:
            convert_checkpoint(root / name, root / f"{name}-hf")
            # The conversion's own record is no part of the model.
            (root / f"{name}-hf" / "thinkfast_convert.json").unlink()


def cases(root: Path) -> Iterator[Case]:
    """All cases for the folders that ``write_bases`` made; contents are made on demand."""
    for folder in sorted(root.iterdir()):
        for file in ("config.json", "mamba_config.json"):
            if (folder / file).is_file():
                yield from _field_cases(folder, file)
                yield from _text_cases(folder, file)
    yield from _index_cases(root / "m1")
    for name in ("llamba", "mamba1", "mamba1-hf"):
        yield from _header_cases(root / name)
    yield from _bin_cases(root / "mamba2")


# ------------------------------------------------------------------------------------------------
# Fields of the JSON files


NEVER_READ = frozenset(
    {
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "initializer_range",
        "pretraining_tp",
        "resid_dropout",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
"""Fields of the valid config.json files that say nothing about the model."""
_NUM_VALUES = 14
"""Values drawn for each field, of those below."""


def _values(old: Any) -> list[Any]:
    """What a field is set to, besides what fits its old value."""
    fixed: list[Any] = [
        None, True, False, 0, -1, 1, 3, 2**31 - 1, 10**12, 2**63, 10**30, 0.0, -0.5, 0.5, 1e308,
        math.nan, math.inf, -math.inf, "", "abc", "16", "true", "null", [], [[]], {},
        {"a": {"b": [1, {"c": None}]}}, "x" * 5000, "\0\x1b[31m\n", "../../etc/passwd",
        [0] * 300, json.loads("[" * 20 + "]" * 20),
    ]  # fmt: skip
    related: list[Any] = [[old], [old, old], {"value": old}, str(old)]
    if isinstance(old, bool):
        related += [not old, int(old)]
    elif isinstance(old, (int, float)):
        related += [old + 1, old - 1, old * 2, float(old), -old]
    elif isinstance(old, str):
        related += [old.upper(), old + " "]
    return fixed + related


def _paths(value: Any, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Ways to every field and element."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in items:
        yield (*prefix, key)
        if isinstance(child, (dict, list)):
            yield from _paths(child, (*prefix, key))


def _changed(document: Any, path: tuple[Any, ...], change: Any) -> Any:
    """A copy of ``document`` in which ``change(parent, key)`` was applied to a copy of a parent."""
    copy: Any = document.copy()
    if len(path) == 1:
        return change(copy, path[0])
    copy[path[0]] = _changed(copy[path[0]], path[1:], change)
    return copy


def _misspellings(name: str, draw: random.Random) -> list[str]:
    at = draw.randrange(len(name) - 1)
    swapped = name[:at] + name[at + 1] + name[at] + name[at + 2 :]
    found = [name + "s", name[:-1], name.upper(), name.replace("_", ""), swapped]
    return [other for other in found if other != name]


_MARK = "@@"


def path_words(path: tuple[Any, ...]) -> list[str]:
    """The names in a path, without positions in lists."""
    return [word for word in path if isinstance(word, str)]


_PUBLISHED = {"config.json": llamba, "mamba_config.json": mamba_in_llama}
"""File -> the module that knows what we call the fields that a publisher writes into it."""


_NAMED_INSTEAD = {
    # A width of one that the heads do not divide, fewer layers than some index of a layer, ...
    "d_model": ("mixer_width",),
    "hidden_size": ("mixer_width",),
    "num_hidden_layers": ("attention_layers",),
    "rope_parameters": ("rope_type",),
    "weight_layout": ("M1 folders",),
}
"""Field -> what errors name that come up only beside another field."""


def field_names(file: str, path: tuple[Any, ...], old: Any = None) -> tuple[str, ...]:
    """What an error may call a field.

    The words of its path, our own name for it, and what is in it if it is an object.
    """
    words = path_words(path)
    ours = [
        name
        for name, published in _PUBLISHED[file]._PUBLISHED_NAMES.items()
        if words[-1] in re.findall(r"\w+", published.partition(" of ")[0])
    ]
    inside = old if isinstance(old, dict) else ()
    return (*words, *ours, *inside, *_NAMED_INSTEAD.get(words[-1], ()))


def _field_cases(folder: Path, file: str) -> Iterator[Case]:
    draw = random.Random(f"{SEED} {folder.name} {file}")
    document = json.loads((folder / file).read_text())
    for path in _paths(document):
        where = ".".join(map(str, path))
        key, parent = path[-1], document
        for step in path[:-1]:
            parent = parent[step]
        old = parent[key]
        hints = field_names(file, path, old)

        def case(
            what: str,
            change: Any,
            must_fail: bool = False,
            more: tuple[str, ...] = (),
            path: Any = path,
            where: str = where,
            hints: tuple[str, ...] = hints,
        ) -> Case:
            files: Files = {file: _dump(_changed(document, path, change))}
            what = f"{file}: {where} {what}"
            return Case(folder.name, what, files, must_fail, (*hints, *more))

        for value in draw.sample(_values(old), _NUM_VALUES):
            yield case(f"= {_short(value)}", lambda p, k, v=value: _set(p, k, v))
        yield case("removed", _remove)
        if isinstance(parent, list):
            yield case("twice", lambda p, k: [*p, p[k]])
            continue
        is_read = (
            old is not None
            and key not in NEVER_READ
            and not (folder.name == "m1" and "rope_scaling" in path)
        )
        for name in draw.sample(_misspellings(key, draw), 2):
            # A name so short that any other is as close is not taken for a misspelling.
            yield case(
                f"renamed to {name}",
                lambda p, k, n=name: {(n if key == k else key): v for key, v in p.items()},
                must_fail=is_read and len(key) > 4,
                more=(name,),
            )
        yield case("beside a misspelling", lambda p, k: {**p, k + "s": 5}, must_fail=is_read)
        # The same key twice, with other values: JSON leaves open which counts.
        text = json.dumps(_changed(document, path, lambda p, k: {_MARK: 0, **p}))
        other = json.dumps(draw.choice(_values(old)))
        twice = text.replace(f'"{_MARK}": 0', f"{json.dumps(key)}: {other}", 1).encode()
        yield Case(folder.name, f"{file}: {where} twice", {file: twice}, True, hints)


def _set(parent: Any, key: Any, value: Any) -> Any:
    parent[key] = value
    return parent


def _remove(parent: Any, key: Any) -> Any:
    del parent[key]
    return parent


def _dump(document: Any) -> bytes:
    return json.dumps(document, indent=2).encode("utf-8", "surrogatepass")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:40] + "..."


_HOSTILE_FIELDS: dict[str, Any] = {
    # What an object of Python has, and what transformers reads by name.
    "__class__": "x", "__dict__": {}, "__init__": 1, "to_dict": 1, "from_dict": 1, "self": 1,
    "kwargs": 1, "cls": 1, "mixer_size": 5, "conv_dim": 5, "layers_block_type": ["attention"],
    "attribute_map": {"hidden_size": "vocab_size"}, "sub_configs": {"a": 1}, "dtype": "load",
    "torch_dtype": "Tensor", "architectures": "LlambaForCausalLM", "id2label": 5,
    "id2label ": {"a": "b"}, "num_labels": "many", "per_layer_config": 5, "problem_type": 7,
    "rope_scaling": {"rope_type": "linear", "factor": 9.0}, "rope_parameters": {"factor": 2.0},
    "partial_rotary_factor": 0.5, "quantization_config": 5, "": 1, "a.b": 1, "\ud800": 1,
    "\x1b[31m\n": 1, "auto_map": {"AutoConfig": "evil.Config"},
    "weight_layout": "m1", "hidden_size": 32, "mamba_version": "mamba2", "rms_norm_eps": 0.5,
    "final_norm_eps": 0.5, "d_model": 16, "ssm_cfg": {}, "attention_layers": [0],
}  # fmt: skip


def _text_cases(folder: Path, file: str) -> Iterator[Case]:
    draw = random.Random(f"{SEED} text {folder.name} {file}")
    raw = (folder / file).read_bytes()
    document = json.loads(raw)

    def case(what: str, content: bytes | None, must_fail: bool = False, word: str = file) -> Case:
        names = field_names(file, (word,), document.get(word))
        # A field without a name has only the file's; one that cannot be printed is shown escaped.
        hints = (*names, ascii(word)[1:-1]) if word else (file,)
        return Case(folder.name, f"{file}: {what}", {file: content}, must_fail, hints)

    for length in sorted(draw.sample(range(1, len(raw) - 2), 12)):
        yield case(f"first {length} bytes", raw[:length], must_fail=True)
    for what, text in {
        "empty": b"",
        "a space": b" ",
        "null": b"null",
        "a list": b"[]",
        "a string": b'"x"',
        "a number": b"5",
        "no fields": b"{}",
        "NUL bytes": b"\0" * 64,
        "a picture": b"\x89PNG\r\n\x1a\n" + raw,
        "UTF-16": raw.decode().encode("utf-16"),
        "text after the end": raw + b"}",
        "two documents": raw + raw,
        "single quotes": raw.replace(b'"', b"'"),
        "comma before the end": raw.rstrip().removesuffix(b"}") + b",}",
        "not UTF-8": raw.replace(b": ", b": \xff", 1),
        "nested without end": b'{"a":' + b"[" * 100_000,
        "deeply nested field": raw.replace(b"{", b'{"deep": ' + b"[" * 400 + b"]" * 400 + b",", 1),
        "integer of 5000 digits": raw.replace(b"{", b'{"d_xb": ' + b"7" * 5000 + b",", 1),
        "a directory": None,
    }.items():
        if text is not None:
            yield case(what, text, must_fail=what not in ("comma", "no fields"))
    yield case("byte order mark", b"\xef\xbb\xbf" + raw)
    yield case("absent", None)
    for name, value in _HOSTILE_FIELDS.items():
        yield case(f"{name!r} = {_short(value)} added", _dump({**document, name: value}), word=name)
    yield case("10^9 labels added", _dump({**document, "num_labels": 10**9}))
    for at in draw.sample(range(len(raw)), 12):
        flipped = bytearray(raw)
        flipped[at] ^= 1 << draw.randrange(8)
        yield case(f"bit flipped in byte {at}", bytes(flipped))


def _index_cases(folder: Path) -> Iterator[Case]:
    file = "model.safetensors.index.json"
    document = json.loads((folder / file).read_text())
    weight_map = document["weight_map"]
    first, other = sorted(set(weight_map.values()))
    outside = str((folder.parent / "llamba" / "model.safetensors").resolve())

    def case(what: str, content: Any, must_fail: bool = True, **files: bytes | None) -> Case:
        data = content if isinstance(content, bytes | None) else _dump(content)
        hints = (file, *files, *weight_map)
        return Case(folder.name, f"{file}: {what}", {file: data, **files}, must_fail, hints)

    names = [
        "../llamba/model.safetensors", outside, "./../m1/" + first, "..", ".", "", "/etc/passwd",
        "/dev/zero", "a\0b.safetensors", "absent.safetensors", "config.json", "x" * 5000,
        first + " ", first.upper(), None, 5, [first], {"file": first}, True,
    ]  # fmt: skip
    for name in names:
        changed = {**weight_map, next(iter(weight_map)): name}
        yield case(f"a tensor in {_short(name)}", {**document, "weight_map": changed})
        everywhere = dict.fromkeys(weight_map, name)
        yield case(f"all tensors in {_short(name)}", {**document, "weight_map": everywhere})
    for value in [None, 5, [], {}, "x", [first, other], {"a": {}}, {"": ""}]:
        yield case(f"weight_map = {_short(value)}", {**document, "weight_map": value})
    yield case("no weight_map", {"metadata": {}})
    yield case("empty", b"")
    yield case("truncated", _dump(document)[:200])
    yield case("nested without end", b"[" * 100_000)
    yield case("absent", None, must_fail=False)
    yield case("absent, and one shard", None, **{other: None})
    yield case("only one shard named", {"weight_map": dict.fromkeys(weight_map, first)})
    yield case("shard absent", document, **{first: None})
    yield case("shard empty", document, **{first: b""})
    yield case("both shards the same", document, **{first: (folder / other).read_bytes()})
    yield case(
        "tensors of the other shard",
        {"weight_map": {name: first if f == other else other for name, f in weight_map.items()}},
        must_fail=False,
    )
    yield case(
        "names that no shard has",
        {"weight_map": {name + "x": f for name, f in weight_map.items()}},
        must_fail=True,
    )


# ------------------------------------------------------------------------------------------------
# safetensors headers


def _header_cases(folder: Path) -> Iterator[Case]:
    file = "model.safetensors"
    draw = random.Random(f"{SEED} header {folder.name}")
    raw = (folder / file).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    names = sorted(name for name in header if name != "__metadata__")

    def case(what: str, content: bytes, hint: str = "", must_fail: bool = False) -> Case:
        hints = (file, hint) if hint else (file, *names)
        return Case(folder.name, f"{file}: {what}", {file: content}, must_fail, hints)

    def pack(changed: Any, what: str, hint: str = "", must_fail: bool = False) -> Case:
        return case(what, packed(changed, data), hint, must_fail)

    for what, content in {
        "empty": b"",
        "seven bytes": raw[:7],
        "length only": raw[:8],
        "header cut": raw[: 8 + length // 2],
        "no data": raw[: 8 + length],
        "last byte gone": raw[:-1],
        "a byte too many": raw + b"\0",
        "data twice": raw + data,
        "byte order mark": struct.pack("<Q", length + 3) + b"\xef\xbb\xbf" + raw[8:],
        "not UTF-8": raw[:8] + raw[8:].replace(b"dtype", b"\xff\xfe\xfd\xfc\xfb", 1),
        "nested without end": struct.pack("<Q", 10**5) + b"[" * 10**5 + data,
        "a pickle": b"\x80\x02}q\x00." + raw,
        "a zip": b"PK\x03\x04" + raw,
        "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    }.items():
        yield case(what, content, must_fail=True)
    for wrong in (
        0, 1, 2, length - 1, length + 1, length * 2, len(raw), len(raw) - 8, 10**8, 10**8 + 1,
        2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 8, 2**64 - 1,
    ):  # fmt: skip
        yield case(f"header length {wrong}", struct.pack("<Q", wrong) + raw[8:], must_fail=True)
    for value in ([], None, 5, "x", {}, {"__metadata__": {}}):
        yield pack(value, f"header {value!r}", must_fail=True)
    for value in (None, [], 5, "x", {"format": 5}, {"format": "tf"}, {"format": None}, {"a": {}}):
        yield pack({**header, "__metadata__": value}, f"__metadata__ = {value!r}")
    yield pack({k: v for k, v in header.items() if k != "__metadata__"}, "no __metadata__")
    for name in draw.sample(names, 12):
        entry = header[name]
        begin, end = entry["data_offsets"]
        without = {k: v for k, v in header.items() if k != name}
        yield pack(without, f"{name} removed", name, must_fail=True)
        for other in (name + "s", name.upper(), "", "../" + name, "\x1b[31m\n" + name, "x" * 9000):
            yield pack({**without, other: entry}, f"{name} renamed to {_short(other)}", name, True)
        yield pack({**header, name + ".copy": entry}, f"{name} under two names", name, True)
        for key, values in {
            "dtype": ["F16", "BF16", "F64", "I8", "I32", "U8", "BOOL", "F8_E4M3", "F4", "C64",
                      "f32", "", None, 5, "X" * 2000],
            "shape": [
                [], [0], [-1], [1], None, "x", 5, [1.5], ["4"], [True], [[4]], [2**63], [2**64],
                [2**32, 2**32], [10**30], [*entry["shape"], 1], [1, *entry["shape"]],
                entry["shape"][::-1], [math.prod(entry["shape"])], [0, *entry["shape"]],
            ],
            "data_offsets": [
                [], [begin], [begin, end, end], [end, begin], [begin, end + 1], [begin + 1, end],
                [begin - 4, end - 4], [begin + 4, end + 4], [0, end - begin], [begin, begin],
                [-1, end], [begin, 2**63], [begin, 2**64], [2**64 - 1, 2**64 - 1], [1.5, end],
                [begin, "8"], None, "x", [len(data), len(data) + end - begin],
            ],
        }.items():  # fmt: skip
            for value in draw.sample(values, 7):
                changed = {**header, name: {**entry, key: value}}
                yield pack(changed, f"{name}: {key} = {_short(value)}", name)
            gone = {k: v for k, v in entry.items() if k != key}
            yield pack({**header, name: gone}, f"{name}: no {key}", name, True)
        yield pack({**header, name: {**entry, "extra": 5}}, f"{name}: another field", name)
        twin = json.dumps({name: {**entry, "shape": [1]}})[1:-1]
        text = json.dumps(header).replace("{", "{" + twin + ", ", 1).encode()
        yield case(f"{name} twice", struct.pack("<Q", len(text)) + text + data, name)
    same: dict[Any, list[str]] = {}
    for name in names:
        same.setdefault(tuple(header[name]["shape"]), []).append(name)
    for shape, twins in same.items():
        for a, b in itertools.islice(itertools.combinations(twins, 2), 3):
            swapped = {**header, a: header[b], b: header[a]}
            yield pack(swapped, f"{a} and {b} exchanged, both {list(shape)}")
            yield pack({**header, a: header[b]}, f"{a} has the bytes of {b}", a, True)
    for _ in range(100):
        changed = bytearray(raw)
        at = draw.randrange(8 + length)
        changed[at] ^= 1 << draw.randrange(8)
        yield case(f"bit flipped in byte {at} of the header", bytes(changed))
    for _ in range(40):
        changed = bytearray(raw)
        at = draw.randrange(8, 8 + length)
        changed[at : at + draw.randrange(1, 9)] = draw.randbytes(draw.randrange(9))
        yield case(f"bytes replaced at {at} of the header", bytes(changed))


def packed(header: Any, data: bytes) -> bytes:
    """A safetensors file of any header."""
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data


def _bin_cases(folder: Path) -> Iterator[Case]:
    from tests.vllm_thinkfast.trust import pickles

    file = "pytorch_model.bin"
    draw = random.Random(f"{SEED} bin")
    raw = (folder / file).read_bytes()
    state = torch.load(folder / file, weights_only=True)

    def case(what: str, content: bytes | None, must_fail: bool = False, **files: bytes) -> Case:
        hints = (file, *files, *state)
        return Case(folder.name, f"{file}: {what}", {file: content, **files}, must_fail, hints)

    for what, content in pickles.hostile(state):
        yield case(what, content, must_fail=True)
    for what, content, must_fail in pickles.unusual(state):
        yield case(what, content, must_fail)
    for length in sorted(draw.sample(range(len(raw) - 1), 20)):
        yield case(f"first {length} bytes", raw[:length], must_fail=True)
    program = raw.index(b"data.pkl")
    for _ in range(200):
        changed = bytearray(raw)
        at = program + draw.randrange(4000)
        changed[at] ^= 1 << draw.randrange(8)
        yield case(f"bit flipped in byte {at}", bytes(changed))
    for _ in range(60):
        changed = bytearray(raw)
        at = draw.randrange(len(raw))
        changed[at : at + draw.randrange(1, 40)] = draw.randbytes(draw.randrange(40))
        yield case(f"bytes replaced at {at}", bytes(changed))
    legacy = pickles.saved(pickles.in_one_storage(state), zip=False)
    for _ in range(100):
        changed = bytearray(legacy)
        at = draw.randrange(4000)
        changed[at] ^= 1 << draw.randrange(8)
        flipped = case(f"bit flipped in byte {at} of a file before torch 1.6", bytes(changed))
        yield replace(flipped, has_values=False)
    index = "pytorch_model.bin.index.json"
    for name in ("../llamba/model.safetensors", "/etc/passwd", "config.json", 5, None):
        content = _dump({"weight_map": dict.fromkeys(state, name)})
        yield case(f"index with {name!r}", raw, must_fail=True, **{index: content})
    whole = _dump({"weight_map": dict.fromkeys(state, file)})
    yield case("index of one file", raw, **{index: whole})
