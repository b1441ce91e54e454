"""The command ``thinkfast-eval prm-study`` on stored samples."""

import errno
import json
import os
import random
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from run_folder import write_run

from lm_eval_tasks.cli import main
from lm_eval_tasks.estimators import (
    best_of_n_at_k,
    majority_at_k,
    paired_difference,
    pass_at_k,
    weighted_bon_at_k,
)
from lm_eval_tasks.prm_study.degrade import LEVELS
from lm_eval_tasks.rewards.scores import ScoreRecord, score_path
from lm_eval_tasks.scored import load_scored

NUM_PROBLEMS, NUM_SAMPLES = 12, 16


def write_scores(folder: Path, name: str, quality: float, seed: int) -> None:
    """Two step scores per sample; the last one is right with probability ``quality``."""
    generator = random.Random(seed)
    path = score_path(folder, name)
    path.parent.mkdir(exist_ok=True)
    lines = []
    for problem, drawn in load_scored(folder).items():
        for sample in drawn:
            is_honest = generator.random() < quality
            last = generator.uniform(0.5, 1) if sample.correct == is_honest else generator.random()
            scores = [round(generator.random(), 6), round(last / 1.5, 6)]
            is_empty = sample.sample_index == 3
            record = ScoreRecord(
                problem, sample.sample_index, [] if is_empty else scores, 0.1, name,
                "empty" if is_empty else None,
            )  # fmt: skip
            lines.append(json.dumps(record.as_dict()) + "\n")
    path.write_text("".join(lines))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run with verdicts and the scores of a good and a bad reward."""
    generator = random.Random(0)
    texts = {}
    for problem in range(NUM_PROBLEMS):
        answers = [generator.choice(["7", "7", "8", "9", "none"]) for _ in range(NUM_SAMPLES)]
        texts[f"p{problem}"] = ["?" if a == "none" else f"so\n#### {a}" for a in answers]
    folder = tmp_path_factory.mktemp("study") / "run"
    write_run(folder, texts)
    assert main(["score", str(folder)]) == 0
    write_scores(folder, "good", 0.9, seed=1)
    write_scores(folder, "bad", 0.5, seed=2)
    return folder


@pytest.fixture(scope="module")
def study(folder: Path) -> dict[str, Any]:
    """The JSON of a small study with figure."""
    arguments = ["--k", "6", "--repeats", "2", "--num-subsets", "64"]
    assert main(["prm-study", str(folder), *arguments]) == 0
    found: dict[str, Any] = json.loads((folder / "prm-study" / "prm_study.json").read_text())
    return found


def test_study_shows_what_lets_a_reader_doubt(study: dict[str, Any], folder: Path) -> None:
    text = (folder / "prm-study" / "prm_study.md").read_text()
    for doubt in (
        "cut at the token limit",
        "no answer found",
        "prompt tokens from the prefix cache",
        "effective batch size",
    ):
        assert doubt in text, doubt
    assert study["runs"][0]["facts"]["num_samples"] == NUM_PROBLEMS * NUM_SAMPLES


def condition(study: dict[str, Any], **wanted: Any) -> dict[str, Any]:
    (found,) = [
        one
        for one in study["runs"][0]["conditions"]
        if all(one[key] == value for key, value in wanted.items())
    ]
    return found


def test_clean_values_are_those_of_the_estimators(study: dict[str, Any], folder: Path) -> None:
    (run,) = study["runs"]
    assert study["settings"]["rewards"] == ["bad", "good"]
    assert run["ks"] == [1, 2, 4, 6, 8, 16]
    for aggregation in ("min", "prod", "last", "mean"):
        problems = load_scored(folder, "good", aggregation).values()
        found = condition(study, family="clean", reward="good", aggregation=aggregation)
        lists = [
            ([s.answer_class for s in p], [s.correct for s in p], [s.score for s in p])
            for p in problems
        ]
        for i, k in enumerate(run["ks"]):
            bon = sum(best_of_n_at_k(*one, run["ks"])[i] for one in lists) / len(lists)
            assert found["bon"][str(k)]["value"] == pytest.approx(bon)
            values = [weighted_bon_at_k(*one, run["ks"], 64).values[i] for one in lists]
            weighted = sum(values) / len(lists)
            assert found["weighted_bon"][str(k)]["value"] == pytest.approx(weighted)
    majority = [majority_at_k(one[0], one[1], [6]).values[0] for one in lists]
    assert run["majority"]["6"]["value"] == pytest.approx(sum(majority) / len(majority))
    gain = found["bon"]["6"]["minus_majority"]["value"]
    assert gain == pytest.approx(found["bon"]["6"]["value"] - run["majority"]["6"]["value"])


def test_better_rewards_are_worth_more(study: dict[str, Any]) -> None:
    good = condition(study, family="clean", reward="good", aggregation="last")
    bad = condition(study, family="clean", reward="bad", aggregation="last")
    assert good["auroc"] > 0.7
    assert bad["auroc"] == pytest.approx(0.5, abs=0.12)
    assert good["bon"]["6"]["value"] > bad["bon"]["6"]["value"]
    aurocs = [
        condition(study, family="flip", reward="good", level=level)["auroc"]
        for level in (0.1, 0.25, 0.5, 1.0)
    ]
    assert aurocs == sorted(aurocs, reverse=True)
    flipped = condition(study, family="flip", reward="good", level=1.0)
    assert flipped["auroc"] == pytest.approx(1 - good["auroc"], abs=0.02)
    assert flipped["bon"]["6"]["loss_to_own_clean"]["value"] == pytest.approx(
        good["bon"]["6"]["value"] - flipped["bon"]["6"]["value"]
    )
    assert flipped["repeats"] == 1
    assert condition(study, family="noise", reward="good", level=1.0)["repeats"] == 2


def test_a_perfect_verifier_reaches_coverage(study: dict[str, Any], folder: Path) -> None:
    oracle = condition(study, family="oracle", level=0.0)
    counts = [(len(p), sum(s.correct for s in p)) for p in load_scored(folder).values()]
    coverage = sum(pass_at_k(n, c, 6) for n, c in counts) / len(counts)
    assert oracle["auroc"] == 1.0
    assert oracle["bon"]["6"]["value"] == pytest.approx(coverage)
    assert oracle["weighted_bon"]["6"]["value"] == pytest.approx(
        coverage, abs=4 * oracle["weighted_bon"]["6"]["monte_carlo_error"] + 1e-9
    )
    assert "loss_to_own_clean" not in oracle["bon"]["6"]


def test_losses_are_paired_and_against_the_first_reward(
    study: dict[str, Any], folder: Path
) -> None:
    assert study["settings"]["reference"] == {"reward": "bad", "aggregation": "last"}
    reference, *others = study["runs"][0]["conditions"]
    assert (reference["family"], reference["reward"]) == ("clean", "bad")
    for method in ("bon", "weighted_bon"):
        assert "loss_to_reference" not in reference[method]["6"]
        for one in others:  # swaps, degraded scores and verifiers alike
            loss = one[method]["6"]["loss_to_reference"]
            expected = reference[method]["6"]["value"] - one[method]["6"]["value"]
            assert loss["value"] == pytest.approx(expected)
            assert loss["low"] <= loss["value"] <= loss["high"]
    swap = condition(study, family="clean", reward="good", aggregation="last")
    values: dict[str, list[float]] = {}
    for reward in ("bad", "good"):
        values[reward] = [
            float(
                best_of_n_at_k(
                    [s.answer_class for s in drawn],
                    [s.correct for s in drawn],
                    [s.score for s in drawn],
                    [6],
                )[0]
            )
            for drawn in load_scored(folder, reward).values()
        ]
    interval, _ = paired_difference(values["bad"], values["good"])
    assert swap["bon"]["6"]["loss_to_reference"] == pytest.approx(asdict(interval))
    # Unpaired, the interval would be that of two means of 12 different problems.
    width = interval.high - interval.low
    alone = [one["bon"]["6"]["high"] - one["bon"]["6"]["low"] for one in (reference, swap)]
    assert width < sum(length**2 for length in alone) ** 0.5
    worst = condition(study, family="flip", reward="good", level=1.0)
    own = worst["bon"]["6"]["loss_to_own_clean"]["value"]
    total = worst["bon"]["6"]["loss_to_reference"]["value"]
    assert total == pytest.approx(own + swap["bon"]["6"]["loss_to_reference"]["value"])


def test_files_and_table(study: dict[str, Any], folder: Path) -> None:
    out = folder / "prm-study"
    assert {path.name for path in out.iterdir()} == {
        "prm_study.json", "prm_study.md", "prm_study.png", "prm_study.svg",
        "prm_loss.png", "prm_loss.svg",
    }  # fmt: skip
    table, _, _ = (out / "prm_study.md").read_text().partition("### What was run")
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + len(study["runs"][0]["conditions"])
    assert "bon@6" in rows[0]
    assert "good, last, noise 0.5" in table
    cells = {row.split(" | ")[0]: row.strip(" |").split(" | ")[-2:] for row in rows[2:]}
    assert cells["| bad, last"] == ["reference", "reference"]
    swap = condition(study, family="clean", reward="good", aggregation="last")
    loss = swap["bon"]["6"]["loss_to_reference"]
    value, low, high = (f"{100 * loss[end]:+.1f}" for end in ("value", "low", "high"))
    assert cells["| good, last"][0] == f"{value} [{low}, {high}]"
    assert study["command"].startswith("thinkfast-eval prm-study")
    assert study["hardware"]["cores"] >= 1


def test_same_again(study: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    arguments = ["--k", "6", "--repeats", "2", "--num-subsets", "64", "--no-figure"]
    out = tmp_path / "again"
    assert main(["prm-study", str(folder), *arguments, "--out", str(out)]) == 0
    assert json.loads((out / "prm_study.json").read_text())["runs"] == study["runs"]


@pytest.mark.parametrize("name", ["prm_study.png", "prm_loss.png", "prm_study.svg"])
def test_a_full_disk_while_the_figure_is_drawn(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    from matplotlib.figure import Figure

    whole = Figure.savefig

    def full(figure: Figure, path: Path, **options: Any) -> None:
        if not Path(path).name.startswith(name):
            return whole(figure, path, **options)
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Figure, "savefig", full)
    levels = [f"{family}=" for family in LEVELS]
    arguments = ["--reward", "good", "--levels", *levels, "--num-subsets", "16"]
    assert main(["prm-study", str(folder), *arguments, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"{name}: cannot be written (No space left on device)" in error
    assert error.count("\n") == 1
    left = {path.name for path in tmp_path.iterdir()}
    assert {"prm_study.json", "prm_study.md"} <= left
    assert not any(path.startswith(name) for path in left), "no half of a figure"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--k", "17"], "has 16 samples, k is 17"),
        (["--k", "0"], "--k 0"),
        (["--levels", "noise=x"], "--levels noise=x"),
        (["--levels", "flip=2"], "--levels flip=2: levels go from 0 to 1"),
        (["--levels", "gauss=1"], "need FAMILY=L[,L...]"),
        (["--reward", "unknown"], "not one of the published models"),
        (["--num-subsets", "1"], "--num-subsets 1"),
    ],
)
def test_bad_input(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["prm-study", str(folder), "--no-figure", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_missing_scores_and_runs(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "bare", {"a": ["#### 7"]})
    assert main(["prm-study", str(tmp_path / "bare")]) == 2
    assert "no scores in common" in capsys.readouterr().err
    assert main(["prm-study", str(tmp_path / "nowhere")]) == 2
    assert "is no run folder" in capsys.readouterr().err
    write_run(tmp_path / "more", {"a": ["#### 7"] * 4})
    assert main(["score", str(tmp_path / "more")]) == 0
    write_scores(tmp_path / "more", "good", 0.9, seed=1)
    path = score_path(tmp_path / "more", "good")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    capsys.readouterr()
    assert main(["prm-study", str(tmp_path / "more")]) == 2
    assert "1 of 4 samples are not scored by good" in capsys.readouterr().err
