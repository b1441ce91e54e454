from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import yaml

from thinkfast_distill.recipe import (
    RecipeError,
    apply_overrides,
    differing_keys,
    parse,
    read_yaml,
    to_yaml,
)


@dataclass
class Square:
    side: int


@dataclass
class Circle:
    radius: float


@dataclass
class Shape:
    UNION_KEYS: ClassVar[dict[str, Any]] = {"size": ("kind", {"square": Square, "circle": Circle})}

    kind: Literal["square", "circle"]
    size: Any = None
    tags: list[str] = field(default_factory=list)
    weights: dict[str, float] = field(default_factory=dict)
    note: str | None = None
    is_filled: bool = False

    def __post_init__(self):
        if self.note == "bad":
            raise RecipeError("note: 'bad' is not accepted.")


@pytest.mark.parametrize(
    ("text", "expected"),
    [(4, 4), (4e9, 4_000_000_000), ("4e9", 4_000_000_000), ("12", 12)],
)
def test_parse_integer(text, expected):
    found = parse(Square, {"side": text}, "r")
    assert found.side == expected
    assert isinstance(found.side, int)


@pytest.mark.parametrize("raw", [True, 1.5, "1.5", "many", None, [1], float("inf"), "nan"])
def test_parse_refuses_no_integer(raw):
    with pytest.raises(RecipeError, match=r"r: side: .*int"):
        parse(Square, {"side": raw}, "r")


def test_parse_reads_exponents_that_yaml_takes_for_text():
    raw = yaml.safe_load("radius: 1e-4")
    assert isinstance(raw["radius"], str)  # the trap this is about
    assert parse(Circle, raw, "r").radius == pytest.approx(1e-4)


def test_parse_names_unknown_key_and_accepted_ones():
    with pytest.raises(RecipeError) as caught:
        parse(Shape, {"kind": "square", "size": {"sied": 2}}, "r.yaml")
    assert str(caught.value) == "r.yaml: size.sied: unknown key; accepted: side."
    with pytest.raises(RecipeError, match=r"r.yaml: colour: unknown key; accepted: kind, size"):
        parse(Shape, {"kind": "square", "colour": 1}, "r.yaml")


def test_parse_chooses_the_class_by_the_other_key():
    assert parse(Shape, {"kind": "square", "size": {"side": 2}}, "r").size == Square(2)
    assert parse(Shape, {"kind": "circle", "size": {"radius": 2}}, "r").size == Circle(2.0)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"kind": "line"}, "r: kind: 'line' is not accepted; accepted: square, circle."),
        ({"kind": "square"}, "r: size.side: missing; it has no default."),
        ({"size": {}}, "r: kind: missing; it has no default."),
        ({"kind": "square", "size": {"side": 1}, "tags": "a"}, "r: tags: expected a list"),
        ({"kind": "square", "size": {"side": 1}, "tags": [1]}, "r: tags.0: 1 is not of type str"),
        (
            {"kind": "square", "size": {"side": 1}, "weights": {"a": "x"}},
            "r: weights.a: 'x' is not of type float",
        ),
        ({"kind": "square", "size": {"side": 1}, "is_filled": 1}, "r: is_filled: 1 is not of type"),
        ({"kind": "square", "size": {"side": 1}, "note": "bad"}, "r: note: 'bad' is not accepted."),
        (["kind"], "r: expected a mapping of keys"),
    ],
)
def test_parse_message(raw, message):
    with pytest.raises(RecipeError) as caught:
        parse(Shape, raw, "r")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("raw", ["nan", float("inf"), True, "x", None])
def test_parse_refuses_no_finite_number(raw):
    with pytest.raises(RecipeError, match=r"r: radius: .* is not of type float"):
        parse(Circle, {"radius": raw}, "r")


def test_to_yaml_reads_back_equal():
    shape = Shape("circle", Circle(1e-4), ["a"], {"b": 1e-12}, "n", True)
    assert parse(Shape, yaml.safe_load(to_yaml(shape)), "r") == shape


def test_apply_overrides():
    raw = {"stages": [{"kind": "sft", "lr": 1}, {"kind": "sft", "name": "two", "lr": 2}]}
    changed = apply_overrides(
        raw, ["stages.0.lr=5e-1", "stages.two.lr=3", "seed=7", "a.b.c=[1, x]", "note="]
    )
    assert changed == {
        "stages": [{"kind": "sft", "lr": "5e-1"}, {"kind": "sft", "name": "two", "lr": 3}],
        "seed": 7,
        "a": {"b": {"c": [1, "x"]}},
        "note": None,
    }
    assert raw["stages"][0]["lr"] == 1, "the input must stay as it is"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lr", "an override is written key=value"),
        ("=3", "an override is written key=value"),
        ("stages.9.lr=1", "no single list item '9'; accepted: 0 to 2 or two"),
        ("stages.sft.lr=1", "no single list item 'sft'"),
        ("seed.x=1", "seed is 3, it has no key 'x'"),
        ("seed=[1", "not valid YAML"),
    ],
)
def test_apply_overrides_message(override, message):
    raw = {"seed": 3, "stages": [{"kind": "sft"}, {"kind": "sft"}, {"name": "two"}]}
    with pytest.raises(RecipeError, match=message):
        apply_overrides(raw, [override])


def test_read_yaml_errors(tmp_path: Path):
    path = tmp_path / "r.yaml"
    with pytest.raises(RecipeError, match="cannot be read"):
        read_yaml(path)
    path.write_text("a: 1\nb: [1\n")
    with pytest.raises(RecipeError, match=r"r.yaml:\d: not valid YAML"):
        read_yaml(path)
    path.write_text("- 1\n")
    with pytest.raises(RecipeError, match="expected a mapping of keys, found list"):
        read_yaml(path)
    path.write_text("a: 1\nb: 2\na: 3\n")
    with pytest.raises(RecipeError, match=r"r.yaml:3: not valid YAML: the key 'a' occurs twice"):
        read_yaml(path)
    path.write_text("a: 1\n? [b]\n: 2\n")
    with pytest.raises(RecipeError, match=r"r.yaml:2: not valid YAML: \['b'\] cannot be a key"):
        read_yaml(path)


def test_differing_keys():
    one = {"a": 1, "b": {"c": 2, "d": [1, 2]}, "e": [1]}
    other = {"a": 1, "b": {"c": 3, "d": [1, 5]}, "e": [1, 2], "f": 0}
    assert differing_keys(one, other) == {
        "b.c": (2, 3),
        "b.d.1": (2, 5),
        "e": ([1], [1, 2]),
        "f": (None, 0),
    }
    assert differing_keys(one, one) == {}
