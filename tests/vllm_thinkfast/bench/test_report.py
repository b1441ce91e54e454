"""Ratios within rounds, spread, roofline fractions, table and figure."""

from pathlib import Path
from typing import Any

import pytest

from tests.vllm_thinkfast.bench.scripted import COST, MACHINE, cell_row, models, settings
from vllm_thinkfast.bench import figure, report
from vllm_thinkfast.bench.roofline import Machine, StepCost
from vllm_thinkfast.bench.run import Measured

FACTS = {
    "num_parameters": 1000,
    "max_decoding": {"8+4": 9},
    "largest_batch": {"8+4": 6},
    "step_cost": COST,
    "prefix_caching": True,
}


def measured(**changes: Any) -> Measured:
    """Llamba is three times as fast; in the second round everything takes twice as long."""
    cells = {}
    for batch in (1, 4):
        label = f"{batch} x 8+4"
        cells["llama", label] = [cell_row(100, batch), cell_row(100, batch, slower=2)]
        cells["llamba", label] = [cell_row(300, batch), cell_row(290, batch, slower=2)]
    found = Measured([MACHINE, MACHINE], {"llama": FACTS, "llamba": FACTS}, cells)
    for name, value in changes.items():
        setattr(found, name, value)
    return found


def summarised(tmp_path: Path, found: Measured | None = None) -> dict[str, Any]:
    return report.summarise(found or measured(), models(tmp_path, "llama", "llamba"), settings())


def test_ratio_is_formed_within_rounds(tmp_path: Path) -> None:
    """The machine halved its speed between the rounds; the ratio does not show it."""
    (entry,) = [
        cell
        for cell in summarised(tmp_path)["cells"]
        if (cell["cell"], cell["model"]) == ("4 x 8+4", "llamba")
    ]
    assert entry["decode_ratio"] == pytest.approx({"median": 2.95, "least": 2.9, "most": 3.0})
    assert entry["tokens_per_s_ratio"] == pytest.approx(entry["decode_ratio"])
    assert entry["decode_cpu_ratio"] == pytest.approx(entry["decode_ratio"])
    assert entry["time_per_token_s"]["least"] == pytest.approx(1 / 300)
    assert entry["cache_bytes_per_sequence"] == 1000


def test_roofline_fraction(tmp_path: Path) -> None:
    """4 sequences of 10.5 tokens: 4000 + 4 (200 + 11.5 * 8) bytes at 1e6 per second."""
    entry = summarised(tmp_path)["cells"][2]
    assert (entry["cell"], entry["model"]) == ("4 x 8+4", "llama")
    assert entry["roofline_fraction"]["most"] == pytest.approx(5168e-6 / 0.01)
    assert entry["prefill_flops_fraction"]["most"] == pytest.approx(2000 * 32 / 0.02 / 1e7)


def test_batch_that_differs_between_rounds(tmp_path: Path) -> None:
    """A round's roofline is that of its batch, where "max" follows from what memory is free."""
    found = measured()
    row = cell_row(100, 6, slower=2)
    found.cells["llama", "4 x 8+4"][1] = row
    summary = summarised(tmp_path, found)
    entry = summary["cells"][2]
    assert entry["batch"] == 4
    assert entry["roofline_fraction"]["most"] == pytest.approx(5168e-6 / 0.01)
    assert entry["roofline_fraction"]["least"] == pytest.approx(5752e-6 / 0.02)
    assert entry["prefill_flops_fraction"]["least"] == pytest.approx(2000 * 48 / 0.04 / 1e7)
    lines = list(report.render(summary, settings()))
    assert lines[-1] == "4 x 8+4, llama: batches of 4 to 6 in the rounds"
    assert not any("batches of" in line for line in report.render(summarised(tmp_path), settings()))


def test_compute_bound_step() -> None:
    machine = Machine("cpu", 1e12, 2e12, 1e6)
    cost = StepCost(**COST)
    assert cost.num_flops(2, 10) == 2 * (2000 + 150 + 160)
    assert cost.least_seconds(2, 10, machine) == pytest.approx(4620e-6)
    assert machine.bytes_per_s == 2e12
    windowed = StepCost(**COST, window=4)
    assert windowed.num_flops(2, 10) == cost.num_flops(2, 4)
    assert windowed.num_bytes(2, 10) == cost.num_bytes(2, 4)
    assert windowed.num_bytes(2, 3) == cost.num_bytes(2, 3)


def test_failures_and_missing_reference(tmp_path: Path) -> None:
    found = measured()
    found.cells["llama", "1 x 8+4"] = [{"error": "llama: IndexError"}] * 2
    found.facts["llama"] = {"error": "llama: IndexError"}
    summary = summarised(tmp_path, found)
    first, second = summary["cells"][:2]
    assert first == {
        "cell": "1 x 8+4",
        "mode": "separate",
        "num_prompt_tokens": 8,
        "num_tokens": 4,
        "model": "llama",
        "error": "llama: IndexError",
    }
    assert second["decode_ratio"] is None
    text = "\n".join(report.render(summary, settings()))
    assert "did not start: llama: IndexError" in text
    assert "1 x 8+4, llama: llama: IndexError" in text


def test_contention_is_said(tmp_path: Path) -> None:
    assert not summarised(tmp_path)["is_contended"]
    found = measured()
    found.cells["llama", "1 x 8+4"][0]["load_average"] = 4.0
    summary = summarised(tmp_path, found)
    assert summary["is_contended"]
    assert any(line.startswith("CONTENDED") for line in report.render(summary, settings()))


def test_batch_that_did_not_run_together(tmp_path: Path) -> None:
    """No time per token, but a rate over all."""
    found = measured()
    for row in found.cells["llama", "4 x 8+4"]:
        for name in [name for name in row if name.startswith(("step_", "decode_", "mean_"))]:
            del row[name]
        row["num_decode_steps"] = 0
        row["most_running"] = 3
    summary = summarised(tmp_path, found)
    llama, llamba = summary["cells"][2:]
    assert llama["time_per_token_s"] is None
    assert llama["most_running"] == 3
    assert llamba["decode_ratio"] is None
    assert llamba["decode_cpu_ratio"] is None
    assert llamba["tokens_per_s_ratio"] is not None
    figure.draw(summary, models(tmp_path, "llama", "llamba"), settings(), tmp_path / "x.png")


def test_table(tmp_path: Path) -> None:
    lines = list(report.render(summarised(tmp_path), settings()))
    assert lines[0].startswith("machine, cpu, OMP_NUM_THREADS=1: triad 0.0 GB/s")
    header = next(line for line in lines if line.startswith("cell"))
    row = next(line for line in lines if line.startswith("4 x 8+4  llamba"))
    assert row[header.index("decode ratio") :].startswith("2.95 (2.90-3.00)")


def test_figure(tmp_path: Path) -> None:
    summary = summarised(tmp_path)
    figure.draw(summary, models(tmp_path, "llama", "llamba"), settings(), tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_matplotlib_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install matplotlib, or give --no-figure"):
        figure.check_matplotlib()
