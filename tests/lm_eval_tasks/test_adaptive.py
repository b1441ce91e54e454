"""The stopping rule against integrals and simulation, and the replay on known problems."""

import json

import numpy as np
import pytest
from synthetic_runs import make_run

from lm_eval_tasks.adaptive import reallocation, replay, savings, stopping_points
from lm_eval_tasks.cli import main
from lm_eval_tasks.scored import ScoredSample
from lm_eval_tasks.stopping import doubt, least_lead


def sample(answer, cost_s=1.0):
    return ScoredSample(
        finish_s=1.0,
        cost_s=cost_s,
        answer_class=answer,
        correct=answer == 0,
        score=None,
        num_tokens=1,
        is_truncated=False,
    )


@pytest.mark.parametrize(("leader", "second"), [(0, 0), (1, 0), (4, 0), (5, 2), (9, 9), (30, 17)])
def test_doubt_is_the_posterior_below_one_half(leader, second):
    p = (np.arange(200_000) + 0.5) / 200_000
    density = p**leader * (1 - p) ** second
    assert doubt(leader, second) == pytest.approx(density[p < 0.5].sum() / density.sum(), abs=1e-9)


def test_doubt_of_a_smaller_leader_is_refused():
    with pytest.raises(ValueError, match="second <= leader"):
        doubt(1, 2)


def test_least_lead_is_the_smallest_that_decides():
    needed = least_lead(40, 0.05)
    assert needed[0] == 4  # (1/2)^5 is the first power below 5 %
    for second in range(20):
        leader = needed[second]
        assert doubt(leader, second) <= 0.05 < doubt(leader - 1, second)
    assert (least_lead(10, 0.0) == 11).all()
    with pytest.raises(ValueError, match=r"error level is 0\.5"):
        least_lead(4, 0.5)


def test_stopping_points_by_hand():
    samples = [sample(a) for a in (0, 0, 0, 0, None, 1, 1, 0)]
    orders = np.array(
        [[0, 1, 2, 3, 4, 5, 6, 7], [4, 0, 1, 2, 3, 5, 6, 7], [5, 6, 0, 1, 4, 2, 3, 7]]
    )
    # Four right ones decide at 5 %; a silent sample before them only takes time. In the third
    # order the lead of 4 to 2 with one sample left cannot be lost any more.
    assert stopping_points(samples, orders, 0.05).tolist() == [4, 5, 7]
    # Certainty: 4 to 0 with 3 left, 4 to 0 with 3 left, 4 to 2 with 1 left.
    assert stopping_points(samples, orders, 0.0).tolist() == [5, 5, 7]
    assert stopping_points(samples, orders, 0.2, least_votes=5).tolist() == [5, 5, 7]


def test_stated_error_holds_for_one_look():
    """With the rule's own prior, decided votes are wrong about as often as the posterior says."""
    generator = np.random.default_rng(0)
    wrong = looked = 0
    for share in generator.random(20_000):
        heads = int((generator.random(9) < share).sum())
        leader, second = max(heads, 9 - heads), min(heads, 9 - heads)
        if doubt(leader, second) <= 0.1:
            looked += 1
            wrong += (share > 0.5) != (heads > 4)
    assert looked > 5000
    assert wrong / looked <= 0.1


def problems_of(num_easy, num_hard, count=24):
    generator = np.random.default_rng(5)
    shares = [0.95] * num_easy + [0.55] * num_hard
    return [[sample(int(generator.random() > s)) for _ in range(count)] for s in shares]


def test_certainty_changes_no_vote_and_saves():
    saved = savings(replay(problems_of(20, 10), 0.0, num_orders=16), draws=200)
    assert saved["changed_votes"]["value"] == 0
    assert saved["accuracy_change"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert 0.3 < saved["samples_saved"]["value"] < 0.5
    assert saved["seconds_saved"]["value"] == pytest.approx(saved["samples_saved"]["value"])


def test_looser_levels_save_more_and_change_more():
    found = [savings(replay(problems_of(20, 10), e, 16), draws=200) for e in (0.01, 0.1, 0.3)]
    saved = [one["samples_saved"]["value"] for one in found]
    changed = [one["changed_votes"]["value"] for one in found]
    assert saved == sorted(saved)
    assert changed == sorted(changed)
    assert saved[0] > 0.4
    assert changed[0] < 0.03
    for one in found:
        assert one["samples_saved"]["low"] <= one["samples_saved"]["value"]
        assert one["samples_saved"]["value"] <= one["samples_saved"]["high"]


def test_reallocation_reaches_the_accuracy_of_uniform_sampling_sooner():
    found = reallocation(replay(problems_of(30, 15), 0.01, num_orders=16), draws=100)
    x, uniform, adaptive = found["x"], found["uniform"]["y"], found["adaptive"]["y"]
    assert x[-1] == pytest.approx(24.0)
    assert uniform[0] == adaptive[0]
    half = found["targets"][1]
    assert half["saved"] > 0.15
    assert half["share_not_reached"] < 0.5
    assert half["adaptive_s"] < half["uniform_s"] <= 12.5
    # Where both have had the same time, the adaptive policy is not behind by more than its error.
    assert min(np.subtract(adaptive, uniform)) > -0.02


def test_equal_policies_save_nothing():
    """Votes that are never decided: both policies draw the same."""
    tied = [[sample(i % 2) for i in range(8)] for _ in range(10)]
    found = replay(tied, 0.0, num_orders=8)
    assert (found.stops == 8).mean() > 0.9
    result = reallocation(found, draws=100)
    assert result["uniform"] == result["adaptive"]
    assert all(target["saved"] == 0 for target in result["targets"])


def test_adaptive_command(tmp_path, capsys):
    folder = make_run(tmp_path / "model", num_samples=12)
    arguments = ["adaptive", str(folder), "--error", "0.1", "0", "--orders", "4", "--draws", "100"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "| model | 0.1 |" in shown
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["adaptive-model.png", "adaptive.html", "adaptive.json", "adaptive.md"]
    for name in ("adaptive.md", "adaptive.html"):
        text = (tmp_path / "out" / name).read_text()
        for needed in (
            "cut at the token limit",
            "no answer found",
            "prompt tokens from the prefix cache",
            "effective batch size",
        ):
            assert needed in text, (name, needed)
    numbers = json.loads((tmp_path / "out" / "adaptive.json").read_text())
    levels = numbers["runs"][0]["levels"]
    assert [level["error"] for level in levels] == [0.1, 0.0]
    assert levels[1]["savings"]["changed_votes"]["value"] == 0
    assert main([*arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == numbers["runs"]


@pytest.mark.parametrize(("problems", "samples"), [(1, 1), (3, 1), (1, 4)])
def test_adaptive_command_on_little(tmp_path, capsys, problems, samples):
    run = make_run(tmp_path / "model", num_problems=problems, num_samples=samples)
    assert main(["adaptive", str(run), "--draws", "100", "--orders", "2"]) == 0
    assert "| model | 0.2 |" in capsys.readouterr().out


def test_replay_of_equal_costs_and_one_round():
    result = reallocation(replay([[sample(0)], [sample(1)]], 0.0, num_orders=2), draws=100)
    assert result["x"][-1] == 1.0
    assert result["uniform"]["y"][-1] == result["adaptive"]["y"][-1] == 0.5


@pytest.mark.parametrize("other", ["tiny/0.7", "tiny-0.7"])
def test_adaptive_command_refuses_equal_names(tmp_path, capsys, other):
    runs = [
        str(make_run(tmp_path / folder, num_problems=2, num_samples=2, name=name))
        for folder, name in (("a", "tiny/0.7"), ("b", other))
    ]
    assert main(["adaptive", *runs, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "two runs are named tiny/0.7; give one another name in its config.json" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--error", "0.6"], "--error 0.6: need 0 or more and below 0.5"),
        (["--error", "-0.1"], "--error -0.1"),
        (["--orders", "0"], "--orders 0: need a whole number of at least 1"),
        (["--draws", "5"], "--draws 5"),
    ],
)
def test_adaptive_command_bad_input(tmp_path, capsys, arguments, message):
    assert main(["adaptive", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
