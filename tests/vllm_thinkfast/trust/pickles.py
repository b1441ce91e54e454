"""Weight files in torch's own container that hold something else than plain tensors."""

import builtins
import collections
import io
import os
import pickle
import re
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

MARK = "THE-PICKLE-RAN"
"""Every hostile pickle makes a file of this name in the working directory, if it is executed."""

State = dict[str, torch.Tensor]


class _Call:
    """Pickles as a call of a function."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self._call = function, args

    def __reduce__(self) -> Any:
        return self._call


def saved(value: Any, *, zip: bool = True) -> bytes:
    """What ``torch.save`` writes, the same in every process."""
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=zip)
    if zip:
        return file.getvalue()
    # Before torch 1.6 storages were named by their addresses.
    names: dict[bytes, bytes] = {}

    def renamed(found: re.Match[bytes]) -> bytes:
        address = found[0]
        return names.setdefault(address, b"%0*d" % (len(address), len(names)))

    return re.sub(rb"\d{12,16}", renamed, file.getvalue())


def in_one_storage(state: State) -> State:
    """The same tensors as parts of one; files before torch 1.6 order storages by address."""
    whole = torch.cat([tensor.flatten() for tensor in state.values()])
    parts = whole.split([tensor.numel() for tensor in state.values()])
    return {
        name: part.view(tensor.shape)
        for (name, tensor), part in zip(state.items(), parts, strict=True)
    }


def with_program(program: bytes, state: State) -> bytes:
    """A valid file whose pickle is replaced by ``program``."""
    source, target = zipfile.ZipFile(io.BytesIO(saved(state))), io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as out:
        for entry in source.infolist():
            is_program = entry.filename.endswith("data.pkl")
            # A name alone would bring today's time with it.
            name = zipfile.ZipInfo(entry.filename)
            out.writestr(name, program if is_program else source.read(entry))
    return target.getvalue()


def _payloads() -> dict[str, Any]:
    touch = f"open({MARK!r}, 'w').close()"
    return {
        "os.system": _Call(os.system, f"touch {MARK}"),
        "eval": _Call(eval, touch),
        "exec": _Call(exec, touch),
        "open": _Call(open, MARK, "w"),
        "subprocess": _Call(subprocess.check_call, ["touch", MARK]),
        "pathlib": _Call(Path.touch, Path(MARK)),
        "getattr": _Call(getattr, _Call(__import__, "os"), "getcwd"),
        "map": _Call(list, _Call(map, os.mkdir, [MARK])),
        "__import__": _Call(builtins.__import__, "this"),
        "torch.load": _Call(torch.load, MARK),
        "a dict": _Call(dict, [("x", _Call(os.mkdir, MARK))]),
        "OrderedDict": collections.OrderedDict(a=_Call(os.mkdir, MARK)),
        "jit": _Call(torch.jit.load, MARK),
    }


def hostile(state: State) -> Iterator[tuple[str, bytes]]:
    """(what it calls, contents): none of them may run."""
    for what, payload in _payloads().items():
        yield f"pickle calls {what}", saved({"x": payload})
        yield f"pickle calls {what}, before the tensors", saved({"x": payload, **state})
        yield f"pickle calls {what}, after the tensors", saved({**state, "x": payload})
        if isinstance(payload, _Call):
            yield f"pickle calls {what}, as a key", saved({(payload, 1): 2, **state})
        yield f"pickle calls {what}, file before torch 1.6", saved({"x": payload}, zip=False)
        yield f"pickle calls {what}, nothing of torch", pickle.dumps({"x": payload})
        for protocol in (0, 4, 5):
            program = pickle.dumps({"x": payload}, protocol=protocol)
            yield f"pickle calls {what}, protocol {protocol}", with_program(program, state)
    system = b"cposix\nsystem\n(S'touch " + MARK.encode() + b"'\ntR."
    yield "program in text", system
    yield "program in text in a zip", with_program(system, state)
    extension = b"\x80\x04\x82\x01."
    yield "extension registry", with_program(extension, state)
    yield "inst", with_program(b"(S'touch " + MARK.encode() + b"'\niposix\nsystem\n.", state)
    yield "obj", with_program(b"(cposix\nsystem\nS'touch " + MARK.encode() + b"'\no.", state)
    stack_global = b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x02ls\x85R."
    yield "stack global", with_program(stack_global, state)


def unusual(state: State) -> Iterator[tuple[str, bytes, bool]]:
    """(what it is, contents, whether it must be refused)."""
    name = next(key for key, value in state.items() if value.dim() == 2)
    tensor = state[name]

    def changed(value: Any) -> bytes:
        return saved({**state, name: value})

    for what, value in {
        "a list": [1],
        "a number": 5,
        "None": None,
        "an array of tensors": [tensor],
        "a dict": {"weight": tensor},
        "sparse": tensor.to_sparse(),
        "sparse rows": tensor.to_sparse_csr(),
        "meta": tensor.to("meta"),
        "quantised": torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
        "complex": tensor.to(torch.complex64),
        "int8": tensor.to(torch.int8),
        "bool": tensor.to(torch.bool),
        "transposed": tensor.T,
        "one row less": tensor[:-1],
        "one row more": torch.cat([tensor, tensor[:1]]),
        "one dimension more": tensor[None],
        "flat": tensor.flatten(),
        "empty": tensor[:0],
        "a scalar": tensor[0, 0],
    }.items():
        yield f"{name} is {what}", changed(value), True
    for what, value in {
        "a parameter": torch.nn.Parameter(tensor),
        "needs a gradient": tensor.clone().requires_grad_(),
        "bfloat16": tensor.to(torch.bfloat16),
        "float16": tensor.to(torch.float16),
        "float64": tensor.to(torch.float64),
        "a column-major view": tensor.T.contiguous().T,
        "one value": tensor[:1, :1].expand(tensor.shape),
        "part of a larger tensor": torch.cat([tensor, tensor])[1 : 1 + len(tensor)],
        "NaN": torch.full_like(tensor, torch.nan),
        "infinite": torch.full_like(tensor, torch.inf),
    }.items():
        yield f"{name} is {what}", changed(value), False
    yield "an OrderedDict", saved(collections.OrderedDict(state)), False
    yield "file before torch 1.6", saved(in_one_storage(state), zip=False), False
    for what, whole in {
        "no tensors": {},
        "a list of tensors": list(state.values()),
        "one tensor": tensor,
        "None": None,
        "state in a field": {"state_dict": state},
        "state with a number": {**state, "epoch": 5},
        "integer names": dict(enumerate(state.values())),
        "one integer name": {**state, 5: tensor},
        "a tuple as a name": {**state, (1, 2): tensor},
        "None as a name": {**state, None: tensor},
        "a surplus tensor": {**state, "surplus": tensor},
        "a surplus tensor with an escape sequence": {**state, "\x1b[31m\n" + name: tensor},
        "a tensor less": {key: value for key, value in state.items() if key != name},
        "two names exchanged of other shapes": _exchanged(state, same_shape=False),
    }.items():
        yield what, saved(whole), True
    yield "two names exchanged of one shape", saved(_exchanged(state, same_shape=True)), False
    for what, program in {
        "an empty program": b"",
        "a stop": b".",
        "None": b"N.",
        "a long integer": b"\x80\x02\x8b" + (2**31 - 1).to_bytes(4, "little") + b"1.",
        "a long string": b"\x80\x04\x8d" + (2**62).to_bytes(8, "little") + b"x.",
        "a memo that is not there": b"\x80\x02h\x07.",
        "a billion laughs": b"\x80\x02](" + b"]" + b"2" * 10 + b"e" + b"." * 2,
        "a storage that is not there": saved(state)[-1:] + b"\x80\x02.",
        "nested without end": b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".",
        "a frame too long": b"\x80\x04\x95" + (2**63 - 1).to_bytes(8, "little") + b"N.",
    }.items():
        yield f"program: {what}", with_program(program, state), True
        yield f"program without a zip: {what}", program, True
    yield "safetensors in a .bin", b"\x02\0\0\0\0\0\0\0{}", True
    yield "a git-lfs pointer", b"version https://git-lfs.github.com/spec/v1\n", True


def _exchanged(state: State, *, same_shape: bool) -> State:
    names = list(state)
    a, b = next(
        (a, b)
        for a in names
        for b in names
        if a < b and (state[a].shape == state[b].shape) == same_shape
    )
    return {**state, a: state[b], b: state[a]}
