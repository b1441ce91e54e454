"""The engine behind every key map: rules, checked reading, writing.

A rule says which tensors of a published file make up which tensors of the house:

* one to one: a rename,
* many to one: the parts are rows of the house tensor, in order (MambaInLlama's separate
  projections of Mamba-1 become one fused ``in_proj``),
* one to many: the published tensor's rows are the house tensors, in order (M1's fused
  ``mha.in_proj`` becomes q, k and v).

Reading is strict: a missing, surplus or wrongly shaped tensor is an error that names key, expected
and found. Nothing is ever loaded "as far as it goes".
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from vllm_thinkfast.configs.fields import printable

Shape = tuple[int, ...]
_MAX_LISTED = 12
_COMPUTED = (".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached")
"""Buffers that old versions of transformers saved; a model computes them from its configuration."""


class CheckpointError(ValueError):
    """The tensors of a folder do not match its configuration."""


@dataclass(frozen=True)
class Rule:
    """``published`` tensors, stacked by rows, are ``house`` tensors stacked by rows."""

    house: tuple[str, ...]
    published: tuple[str, ...]
    rows: tuple[int, ...] = ()
    """Rows of each published part; needed only when there are several."""


def rename(house: str, published: str) -> Rule:
    """A rule for a tensor that only has another name."""
    return Rule((house,), (published,))


def read_tensors(
    rules: Iterable[Rule],
    house_shapes: Mapping[str, Shape],
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    source: str,
    tied: tuple[str, str] | None = None,
    pass_through: tuple[str, ...] = (),
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields house tensors, complete and checked.

    Args:
        rules: the key map of the folder's format.
        house_shapes: name -> shape of every tensor the model needs.
        tensors: (published name, tensor), in any order; parts are held until their rule is
            complete.
        source: the folder, for messages.
        tied: (head, embedding) house names when the head shares the embedding's weights. The head
            may be absent; if present it must be equal.
        pass_through: suffixes of tensors that a quantised checkpoint adds (scales and the like);
            such a tensor is yielded under its own name. With any given, shapes are not compared,
            because packed weights have other ones.

    Yields:
        (house name, tensor).

    Raises:
        CheckpointError: missing, surplus, duplicate, integer or wrongly shaped tensors, or a tied
            head that differs from the embedding.
    """
    by_published: dict[str, Rule] = {name: rule for rule in rules for name in rule.published}
    pending: dict[Rule, dict[str, torch.Tensor]] = {}
    seen: set[str] = set()
    produced: set[str] = set()
    surplus: list[str] = []
    wrong: list[str] = []
    wrong_dtype: list[str] = []
    tie_parts: dict[str, torch.Tensor] = {}
    for name, tensor in tensors:
        if name.endswith(_COMPUTED):
            continue
        rule = by_published.get(name)
        if rule is None:
            if pass_through and name.endswith(pass_through):
                yield name, tensor
            else:
                surplus.append(f"{printable(name)} {list(tensor.shape)}")
            continue
        if name in seen:
            raise CheckpointError(
                f"{source}: {printable(name)} occurs twice; remove one of the files."
            )
        seen.add(name)
        expected = published_shape(rule, name, house_shapes)
        if not pass_through and tuple(tensor.shape) != expected:
            wrong.append(f"{name}: expected {list(expected)}, found {list(tensor.shape)}")
            continue
        if not pass_through and not tensor.is_floating_point():
            wrong_dtype.append(f"{name}: {tensor.dtype}")
            continue
        parts = pending.setdefault(rule, {})
        parts[name] = tensor
        if len(parts) < len(rule.published):
            continue
        del pending[rule]
        for house, value in _apply(rule, parts, house_shapes):
            produced.add(house)
            if tied and house in tied:
                tie_parts[house] = value
                _check_tied(tie_parts, tied, source)
                if house == tied[0]:
                    continue
            yield house, value
    optional = {tied[0]} if tied else set()
    missing = [
        f"{name} {list(published_shape(rule, name, house_shapes))}"
        for name, rule in by_published.items()
        if name not in seen and not optional.issuperset(rule.house)
    ]
    problems = [
        f"{what}: {', '.join(items[:_MAX_LISTED])}"
        + (f" and {len(items) - _MAX_LISTED} more" if len(items) > _MAX_LISTED else "")
        for what, items in (
            ("missing", missing),
            ("surplus", surplus),
            ("wrong shape", wrong),
            ("not floating point", wrong_dtype),
        )
        if items
    ]
    if problems:
        raise CheckpointError(
            f"{source}: the weights do not match the configuration; {'; '.join(problems)}. "
            "Check that config files and weights belong to the same checkpoint."
        )


def write_tensors(
    rules: Iterable[Rule],
    house_shapes: Mapping[str, Shape],
    tensors: Mapping[str, torch.Tensor],
) -> Iterator[tuple[str, torch.Tensor]]:
    """The inverse of ``read_tensors``: yields (published name, tensor).

    Raises:
        CheckpointError: a house tensor is missing.
    """
    for rule in rules:
        absent = [name for name in rule.house if name not in tensors]
        if absent:
            if all(name.startswith("lm_head.") for name in absent):
                continue  # tied models have no head of their own
            raise CheckpointError(f"cannot write {rule.published}: {absent} missing.")
        stacked = [tensors[name] for name in rule.house]
        whole = stacked[0] if len(stacked) == 1 else torch.cat(stacked)
        if len(rule.published) == 1:
            yield rule.published[0], whole
        else:
            yield from zip(rule.published, whole.split(list(rule.rows)), strict=True)


def published_shape(rule: Rule, name: str, house_shapes: Mapping[str, Shape]) -> Shape:
    """Shape of one published tensor of a rule."""
    first = house_shapes[rule.house[0]]
    if rule.rows:
        return (rule.rows[rule.published.index(name)], *first[1:])
    return (sum(house_shapes[house][0] for house in rule.house), *first[1:])


def _apply(
    rule: Rule, parts: Mapping[str, torch.Tensor], house_shapes: Mapping[str, Shape]
) -> Iterator[tuple[str, torch.Tensor]]:
    ordered = [parts[name] for name in rule.published]
    whole = ordered[0] if len(ordered) == 1 else torch.cat(ordered)
    if len(rule.house) == 1:
        yield rule.house[0], whole
        return
    rows = [house_shapes[name][0] for name in rule.house]
    yield from zip(rule.house, whole.split(rows), strict=True)


def _check_tied(parts: dict[str, torch.Tensor], tied: tuple[str, str], source: str) -> None:
    head, embedding = (parts.get(name) for name in tied)
    if head is None or embedding is None:
        return
    # Folders of mixed precision exist: the head may be the rounded embedding, or the reverse.
    narrow = min(head.dtype, embedding.dtype, key=lambda dtype: dtype.itemsize)
    if not torch.equal(head.to(narrow), embedding.to(narrow)):
        raise CheckpointError(
            f"{source}: {tied[0]} differs from {tied[1]} although the configuration ties them; "
            'set "tie_word_embeddings": false in config.json if the head was trained.'
        )
    parts.clear()
