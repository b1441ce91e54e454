"""Figures as data and as pictures."""

import json
import re

import pytest
from synthetic_runs import make_run

from lm_eval_tasks.cli import main
from lm_eval_tasks.figures import COLOURS, DASHES, Figure, Series, end_order, spread
from lm_eval_tasks.html_report import Axes, figure_html
from lm_eval_tasks.plots import MARKERS, draw_figures

FAST = ["--draws", "100", "--orders", "8"]


def line(name="a", y=(0.1, 0.5, 0.9), **options):
    low, high = [v - 0.05 for v in y], [v + 0.05 for v in y]
    return Series(name, [1.0, 2.0, 8.0], list(y), low, high, **options)


def figure(*lines, **options):
    return Figure("test", "A title", "seconds", "accuracy [%]", list(lines), **options)


def test_draw_figures(tmp_path):
    from matplotlib.image import imread

    many = [line(f"model {i}", colour=i % len(COLOURS), has_markers=True) for i in range(8)]
    front = [False, True, True]
    figures = [
        figure(line(), line("b", (0.2, 0.3, 0.3), colour=1, on_front=front), note="95% bands"),
        Figure("many", "Many lines", "k", "tokens/s", many, x_base=2, is_percent=False),
    ]
    paths = draw_figures(figures, tmp_path / "new" / "folder", dpi=80)
    assert [path.name for path in paths] == ["test.png", "many.png", "overview.png"]
    for path in paths:
        picture = imread(path)[:, :, :3]
        assert picture.shape[0] > 200
        assert (picture.min(axis=2) < 0.9).mean() > 0.01  # more than an empty page
    assert not list(tmp_path.rglob("*.part"))


def test_colours_and_second_cues_are_distinct():
    assert len(set(COLOURS)) == len(COLOURS) == len(MARKERS)
    assert len(set(DASHES)) == len(DASHES)


def test_spread_keeps_labels_apart_and_in_order():
    placed = spread([5.0, 5.0, 5.1, 0.0], 1.0, 0.0, 10.0)
    # Around the middle of those that were too close; the others stay.
    middle = (5.0 + 5.0 + 5.1) / 3
    assert placed == pytest.approx([middle - 1, middle, middle + 1, 0.0])
    assert spread([9.9, 9.8], 1.0, 0.0, 10.0) == pytest.approx([10.0, 9.0])
    assert spread([0.1, 0.2, 5.0], 1.0, 0.0, 10.0) == pytest.approx([0.0, 1.0, 5.0])
    # In the order that the lines have.
    assert spread([5.0, 5.2], 1.0, 0.0, 10.0, [1, 0]) == pytest.approx([5.6, 4.6])
    assert spread([], 1.0, 0.0, 10.0) == []


def test_labels_follow_the_order_of_the_lines():
    """Not that of their ends: a slow line that goes on longer may end above faster ones."""
    above = Series("above", [1.0, 2.0, 4.0], [0.5, 0.7, 0.8])
    below = Series("below", [1.0, 3.0, 4.0, 9.0], [0.3, 0.5, 0.6, 0.85])
    late = Series("late", [8.0, 9.0], [0.1, 0.2])
    assert end_order([above, below]) == [1, 0]
    assert end_order([above, below, late]) == [2, 1, 0]


def test_points_of_equal_x_stand_beside_each_other():
    points = [line(str(i), has_markers=True) for i in range(3)]
    shifts = figure(*points, x_base=2).shifts()
    assert shifts == sorted(set(shifts))
    assert shifts[1] == 1.0
    assert shifts[2] / shifts[0] < 2**0.5, "well within a doubling of x"
    assert figure(*points).shifts() == [1.0] * 3, "their x differ"
    assert figure(line(), x_base=2).shifts() == [1.0]


def test_y_axis_begins_near_shares_that_are_all_high():
    high, low = line(y=(0.62, 0.7, 0.8)), line(y=(0.1, 0.5, 0.9))
    assert figure(high).y_limits == pytest.approx((50.0, 90.1))
    assert figure(low).y_limits[0] == 0.0
    assert figure(high, is_percent=False).y_limits[0] == 0.0
    beside = figure(high, sharing_y=[high, line(y=(0.3, 0.9, 0.95))])
    assert beside.y_limits == figure(line(y=(0.3, 0.9, 0.95))).y_limits
    axes = Axes(figure(high))
    assert axes.y_ticks() == pytest.approx([50, 60, 70, 80, 90])
    assert axes.y(50.0) > axes.y(90.0) > 0


def test_front_of_a_figure():
    first = line("a", colour=0, on_front=[True, False, False])
    second = line("b", colour=1, on_front=[False, True, True])
    assert figure(first, second).front() == [(0, 1.0, 2.0), (1, 2.0, 8.0)]
    assert figure(line()).front() == []
    text = figure_html(figure(first, second), 0)
    assert text.count("<rect") == 2 + 1
    assert "Pareto front" in text
    assert "Pareto front" not in figure_html(figure(line()), 0)


def test_axes_place_values():
    axes = Axes(figure(line()))
    assert axes.x(1.0) < axes.x(2.0) < axes.x(8.0)
    # Log axis: equal ratios, equal distances.
    assert axes.x(8.0) - axes.x(2.0) == pytest.approx(2 * (axes.x(2.0) - axes.x(1.0)), abs=0.1)
    assert axes.y(0.0) > axes.y(50.0) > axes.y(95.0)
    ticks = axes.y_ticks()
    assert ticks[0] == 0
    assert ticks == pytest.approx([0, 25, 50, 75, 100])
    assert axes.x_ticks() == [1.0, 2.0, 5.0]
    assert Axes(figure(line(), x_base=2)).x_ticks() == [1.0, 2.0, 8.0]


def test_axes_of_a_single_point_and_of_zeros():
    flat = Axes(figure(Series("a", [3.0], [0.0])))
    assert flat.top > 0
    assert flat.x(3.0) == pytest.approx((flat.x(2.9) + flat.x(3.1)) / 2, abs=1)


def test_figure_html_draws_bands_markers_and_dashes():
    text = figure_html(figure(line(dash=1, has_markers=True), line("b", colour=1)), 3)
    assert 'data-figure="3"' in text
    assert text.count("<polyline") == 2
    assert text.count("<polygon") == 1
    assert text.count("<line class=bar") == text.count("<circle") == 3
    assert text.count("stroke-dasharray") == 1


@pytest.fixture
def drawn(monkeypatch):
    """What would be drawn; matplotlib takes long."""
    calls = []
    monkeypatch.setattr(
        "lm_eval_tasks.report.draw_figures", lambda figures, folder: calls.append((figures, folder))
    )
    return calls


def test_report_links_its_pictures(tmp_path, drawn):
    run = make_run(tmp_path / "model", num_problems=4, num_samples=4)
    assert main(["report", str(run), "--out", str(tmp_path / "out"), *FAST]) == 0
    ((figures, folder),) = drawn
    text = (tmp_path / "out" / "report.md").read_text()
    links = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    files = [folder / f"{figure.name}.png" for figure in figures]
    assert [tmp_path / "out" / link for link in links] == files
    assert [figure.name for figure in figures] == [
        "coverage-vs-k",
        "majority-vs-k",
        "coverage-vs-seconds",
        "majority-vs-seconds",
        "coverage-vs-tokens",
        "majority-vs-tokens",
    ]


def test_plot_command_draws_a_report_again(tmp_path, capsys, drawn):
    run = make_run(tmp_path / "model", num_problems=4, num_samples=4)
    out = tmp_path / "figures"
    assert main(["plot", str(run), "--out", str(out), *FAST]) == 0
    assert (out / "report.html").is_file()
    assert not (out / "report.md").exists()

    report = tmp_path / "report"
    assert main(["report", str(run), "--out", str(report), "--no-png", *FAST]) == 0
    again = tmp_path / "again"
    assert main(["plot", str(report / "results.json"), "--out", str(again)]) == 0
    assert (again / "points.csv").read_text() == (report / "points.csv").read_text()
    assert drawn[0][0] == drawn[1][0]

    # Reports of earlier versions know less of their runs.
    results = json.loads((report / "results.json").read_text())
    for run in results["groups"][0]["runs"]:
        for name in ("load", "rounds", "caches"):
            del run["facts"][name]
        del run["grading"], run["reward"]
    (tmp_path / "earlier.json").write_text(json.dumps(results))
    assert main(["plot", str(tmp_path / "earlier.json"), "--out", str(again)]) == 0
    assert (again / "points.csv").read_text() == (report / "points.csv").read_text()
    assert len(drawn) == 3

    results = str(report / "results.json")
    for given in (
        ["--level", "0.5"],
        ["--level", "0.95"],
        ["--draws", "100"],
        ["--orders", "4"],
        ["--reward", "prm"],
        ["--aggregation", "last"],
        ["--window", "1", "2"],
        ["--reward-time"],
    ):
        capsys.readouterr()
        assert main(["plot", results, "--out", str(tmp_path / "no"), *given]) == 2
        error = capsys.readouterr().err
        assert f"{given[0]}: {results} holds numbers" in error
        assert f"thinkfast-eval report RUN {given[0]}" in error
    assert not (tmp_path / "no").exists()

    capsys.readouterr()
    (tmp_path / "old.json").write_text(json.dumps({"format": 0}))
    (tmp_path / "short.json").write_text(json.dumps({"format": 1, "groups": [], "notes": []}))
    for arguments, message in (
        ([str(tmp_path / "old.json")], "format 0, this version reads 1"),
        ([str(tmp_path / "short.json")], "fields missing or of a wrong type: settings, created"),
        ([str(report / "results.json"), str(run)], "either one results.json or run folders"),
    ):
        assert main(["plot", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
