"""Table and figure are made from stored results alone."""

import copy
import json
import struct
from pathlib import Path
from typing import Any

import pytest

from demo.figure import draw
from demo.report import reported_ks, results_text, speed_summary, table


def test_speed_summary_takes_ratios_within_rounds(results: dict[str, Any]) -> None:
    found = speed_summary(results["speed_rounds"], ["teacher", "student"])
    assert found["teacher"]["decode"]["tokens_per_s"] == {"median": 90, "min": 50, "max": 100}
    assert found["teacher"]["decode"]["ratio"] == {"median": 1, "min": 1, "max": 1}
    # 150/100, 80/50, 108/90; the ratio of the medians would be 108/90 = 1.2
    assert found["student"]["decode"]["ratio"]["median"] == pytest.approx(1.5)
    assert found["student"]["decode"]["ratio"]["min"] == pytest.approx(1.2)
    assert found["student"]["decode"]["ratio"]["max"] == pytest.approx(1.6)


def test_reported_ks() -> None:
    assert reported_ks({"pass@16": 0, "pass@2": 0, "pass@16_stderr": 0, "boxed": 0}) == [2, 16]


def test_table(results: dict[str, Any]) -> None:
    text = table(results)
    header, rule, *rows = text.split("\n\n")[0].splitlines()
    assert "teacher model" in header
    assert "student model" in header
    assert set(rule) == {"-", " "}
    cells: dict[str, list[str]] = {}
    for row in rows:
        cells.setdefault(row[: header.index("teacher")].strip(), []).extend(row.split("  "))
    assert "20.0 ± 1.2" in " ".join(cells["pass@1 [%]"])
    assert "60.0 ± 4.6" in " ".join(cells["pass@4 [%]"])
    assert "1.50 (1.20 to 1.60)" in " ".join(cells["relative **"])
    assert "90 (50 to 100)" in " ".join(cells["decode tokens/s *"])
    assert "1.50 (1.50 to 1.50)" in " ".join(cells["relative **"])
    assert "1500 (1500 to 1500)" in " ".join(cells["prefill tokens/s *"])
    assert "1.50" in " ".join(cells["peak memory [GiB]"])
    assert "median (range) of 3 rounds" in text
    starts = [row.index("25.0") for row in rows if row.startswith("cut at 160 tokens")]
    assert starts == [header.index("teacher")]


def test_table_without_what_is_unknown(results: dict[str, Any]) -> None:
    reduced = copy.deepcopy(results)
    del reduced["models"][1]["metrics"]["truncated"]
    assert "cut at" not in table(reduced)


def test_results_text_holds_what_the_table_needs(results: dict[str, Any]) -> None:
    assert "samples" not in results["models"][0]
    assert table(json.loads(results_text(results))) == table(results)


@pytest.mark.filterwarnings("error")
def test_draw(results: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "figure.png"
    draw(json.loads(results_text(results)), path)
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width > 1200
    assert height > 500
    assert [file.name for file in tmp_path.iterdir()] == ["figure.png"]


def test_draw_says_what_it_shows(
    results: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import matplotlib.pyplot as plt

    figures: list[Any] = []
    monkeypatch.setattr(plt, "close", figures.append)
    draw(results, tmp_path / "figure.png")
    left, right = figures[0].axes
    legend = [text.get_text() for text in left.get_legend().get_texts()]
    assert legend == ["teacher model", "student model"]
    assert "k" in left.get_xlabel()
    assert "%" in left.get_ylabel()
    assert "per second" in right.get_ylabel()
    lines = {line.get_label(): line for line in left.get_lines()}
    assert list(lines["teacher model"].get_ydata()) == pytest.approx([20, 60])
