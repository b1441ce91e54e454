"""The tasks through lm-eval's own evaluator, with a scripted model."""

import json
import math
import random
import statistics
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.tasks import TaskManager
from run_folders import write_run, write_scores
from scripted_lm import GSM8K_ROWS, MATH500_ROWS, ScriptedLM, evaluate, write_jsonl

from lm_eval_tasks import task_path
from lm_eval_tasks.commands.score import evaluate_run
from lm_eval_tasks.errors import InputError
from lm_eval_tasks.estimators import pass_at_k
from lm_eval_tasks.rewards.reward import Scored
from lm_eval_tasks.samples import SampledText
from lm_eval_tasks.verdicts import score_run

GSM8K_CORRECT = [1, 0, 4]
GOLD = ["18", "70,000", "5"]


@pytest.fixture
def gsm8k(tmp_path: Path) -> str:
    return str(write_jsonl(tmp_path / "gsm8k.jsonl", GSM8K_ROWS))


@pytest.fixture
def math500(tmp_path: Path) -> str:
    return str(write_jsonl(tmp_path / "math500.jsonl", MATH500_ROWS))


def _problem(prompt: str) -> int:
    return next(i for i, row in enumerate(GSM8K_ROWS) if row["question"] in prompt)


def _gsm8k_script(prompt: str, j: int) -> str:
    """Answer correctly in the last samples, so that scoring the first one alone is wrong."""
    i = _problem(prompt)
    answer = GOLD[i] if j >= 4 - GSM8K_CORRECT[i] else "1"
    return f"Sample {j}: so the result is \\boxed{{{answer}}}."


def test_all_samples_reach_the_score(gsm8k: str) -> None:
    lm = ScriptedLM(_gsm8k_script)
    results = evaluate(lm, "gsm8k_passk", {"num_samples": 4, "data_file": gsm8k})
    found = results["results"]["gsm8k_passk"]
    for k in (1, 2, 4):
        values = [pass_at_k(4, correct, k) for correct in GSM8K_CORRECT]
        assert found[f"pass@{k},all"] == pytest.approx(statistics.fmean(values))
        stderr = statistics.stdev(values) / math.sqrt(len(values))
        assert found[f"pass@{k}_stderr,all"] == pytest.approx(stderr)
    assert {name for name in found if name.startswith("pass@3")} == set()
    assert found["n_distinct,all"] == 1.0
    assert found["boxed,all"] == 1.0
    assert found["no_answer,all"] == 0.0
    assert "truncated,all" not in found, "the model did not say how its texts ended"
    assert "gen_tokens,all" not in found
    assert len(lm.calls) == 1
    assert len(lm.calls[0]) == 12
    samples = results["samples"]["gsm8k_passk"]
    assert [len(sample["resps"][0]) for sample in samples] == [4, 4, 4]
    json.dumps(samples)


def test_prompt_and_generation_settings(gsm8k: str, math500: str) -> None:
    lm = ScriptedLM(lambda prompt, j: f"{j}")
    evaluate(lm, "gsm8k_passk", {"num_samples": 2, "data_file": gsm8k})
    evaluate(lm, "math500_passk", {"num_samples": 2, "data_file": math500})
    for request, field, max_tokens in (
        (lm.calls[0][0], GSM8K_ROWS[0]["question"], 1024),
        (lm.calls[1][0], MATH500_ROWS[0]["problem"], 2048),
    ):
        prompt, settings = request.args
        assert prompt == (
            f"{field}\n\nLet's think step by step and output the final answer within \\boxed{{}}."
        )
        assert settings == {
            "do_sample": True,
            "temperature": 0.7,
            "top_p": 1.0,
            "max_gen_toks": max_tokens,
            "until": [],
        }


def test_chat_template_of_the_command_line(gsm8k: str) -> None:
    lm = ScriptedLM(lambda prompt, j: f"{j}")
    results = evaluate(
        lm, "gsm8k_passk", {"num_samples": 2, "data_file": gsm8k}, apply_chat_template=True
    )
    prompt = lm.calls[0][0].args[0]
    assert prompt.startswith(f"<user>{GSM8K_ROWS[0]['question']}")
    assert prompt.endswith("within \\boxed{}.<bot>")
    metadata = results["configs"]["gsm8k_passk"]["metadata"]
    assert metadata["chat_template_applied_by"] == "lm-eval"
    assert metadata["num_samples"] == 2


def test_math500(math500: str) -> None:
    def script(prompt: str, j: int) -> str:
        if "sqrt" in prompt:
            return ["It is $\\boxed{\\sqrt{8}}$.", "no idea", "\\boxed{2}"][j]
        return ["The answer is 0.5.", "I get $\\boxed{\\dfrac12}$", "so 1/2"][j]

    results = evaluate(
        ScriptedLM(script), "math500_passk", {"num_samples": 3, "data_file": math500}
    )
    found = results["results"]["math500_passk"]
    assert found["pass@1,all"] == pytest.approx((1 / 3 + 1) / 2)
    assert found["pass@2,all"] == pytest.approx((2 / 3 + 1) / 2)
    assert found["pass@3,all"] == 1.0
    assert found["no_answer,all"] == pytest.approx(1 / 6)
    assert found["boxed,all"] == pytest.approx(0.5)
    sample = results["samples"]["math500_passk"][0]
    assert sample["doc"]["unique_id"] == "test/algebra/a.json"
    assert sample["target"] == "2\\sqrt{2}"


def test_finish_reasons_and_token_counts_reach_the_metrics(gsm8k: str) -> None:
    def script(prompt: str, j: int) -> SampledText:
        return SampledText(f"{j} \\boxed{{5}}", 10 * (j + 1), "length" if j == 3 else "stop")

    results = evaluate(ScriptedLM(script), "gsm8k_passk", {"num_samples": 4, "data_file": gsm8k})
    found = results["results"]["gsm8k_passk"]
    assert found["truncated,all"] == 0.25
    assert found["gen_tokens,all"] == 25.0
    assert found["pass@1,all"] == pytest.approx(1 / 3)


def test_copies_are_refused(gsm8k: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What lm-eval's API models do: they send seed 1234 with every request."""
    options: dict[str, Any] = {"num_samples": 3, "data_file": gsm8k}
    lm = ScriptedLM(lambda prompt, j: "\\boxed{5}")
    with pytest.raises(ValueError, match=r"identical.*--gen_kwargs seed=-1"):
        evaluate(lm, "gsm8k_passk", options)
    assert capsys.readouterr().err.count("error: ") == 1
    allowed = evaluate(lm, "gsm8k_passk", options | {"allow_identical_samples": True})
    assert allowed["results"]["gsm8k_passk"]["n_distinct,all"] == pytest.approx(1 / 3)
    single = evaluate(lm, "gsm8k_passk", options | {"num_samples": 1})
    assert single["results"]["gsm8k_passk"]["n_distinct,all"] == 1.0


@pytest.mark.parametrize("settings", ["temperature=0", "do_sample=false", "n=8"])
def test_settings_that_make_copies_are_refused(gsm8k: str, settings: str) -> None:
    lm = ScriptedLM(_gsm8k_script)
    with pytest.raises(ValueError, match="num_samples="):
        evaluate(lm, "gsm8k_passk", {"num_samples": 4, "data_file": gsm8k}, gen_kwargs=settings)
    assert lm.calls == [], "refused before anything is generated"


def test_an_alias_of_max_gen_toks_is_not_dropped_silently(gsm8k: str) -> None:
    options = {"num_samples": 4, "data_file": gsm8k}
    with pytest.raises(ValueError, match="--gen_kwargs max_gen_toks=300 instead"):
        evaluate(ScriptedLM(_gsm8k_script), "gsm8k_passk", options, gen_kwargs="max_tokens=300")


def test_temperature_of_the_command_line_keeps_sampling(gsm8k: str) -> None:
    lm = ScriptedLM(_gsm8k_script)
    options = {"num_samples": 4, "data_file": gsm8k}
    evaluate(lm, "gsm8k_passk", options, gen_kwargs="temperature=1.0,max_gen_toks=300")
    settings = lm.calls[0][0].args[1]
    assert (settings["temperature"], settings["max_gen_toks"]) == (1.0, 300)
    assert settings["do_sample"] is True
    assert settings["until"] == []


def test_use_cache_does_not_replay_samples(gsm8k: str, tmp_path: Path) -> None:
    """lm-eval's response cache returns N copies of the last sample when do_sample is not true."""
    cache = str(tmp_path / "cache")
    options = {"num_samples": 4, "data_file": gsm8k}
    for _ in range(2):
        lm = ScriptedLM(lambda p, j: SampledText(_gsm8k_script(p, j), 7, "stop"))
        results = evaluate(lm, "gsm8k_passk", options, use_cache=cache)
        assert len(lm.calls[0]) == 12
        assert results["results"]["gsm8k_passk"]["pass@4,all"] == pytest.approx(2 / 3)
        assert results["results"]["gsm8k_passk"]["gen_tokens,all"] == 7


def test_cache_requests_is_ignored(gsm8k: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its key does not know num_samples: a second run with another N would repeat the first."""
    monkeypatch.setattr(
        "lm_eval.api.task.save_to_cache", lambda **_: pytest.fail("requests were cached")
    )
    lm = ScriptedLM(_gsm8k_script)
    evaluate(lm, "gsm8k_passk", {"num_samples": 4, "data_file": gsm8k}, cache_requests=True)
    assert len(lm.calls[0]) == 12


def test_samples_option(gsm8k: str) -> None:
    options = {"num_samples": 4, "data_file": gsm8k}
    lm = ScriptedLM(_gsm8k_script)
    with pytest.raises(ValueError, match="ascending order"):
        evaluate(lm, "gsm8k_passk", options, samples={"gsm8k_passk": [2, 0]})
    results = evaluate(lm, "gsm8k_passk", options, samples={"gsm8k_passk": [0, 2]})
    assert results["results"]["gsm8k_passk"]["pass@1,all"] == pytest.approx((0.25 + 1) / 2)


def test_predict_only_keeps_the_texts(gsm8k: str) -> None:
    lm = ScriptedLM(_gsm8k_script)
    results = evaluate(lm, "gsm8k_passk", {"num_samples": 4, "data_file": gsm8k}, predict_only=True)
    (first, *_) = results["samples"]["gsm8k_passk"]
    assert len(first["resps"][0]) == 4
    assert "pass@1,all" not in results["results"]["gsm8k_passk"]


def test_default_number_of_samples(gsm8k: str) -> None:
    lm = ScriptedLM(lambda prompt, j: f"{j} \\boxed{{5}}")
    results = evaluate(lm, "gsm8k_passk", {"data_file": gsm8k}, limit=1)
    assert len(lm.calls[0]) == 64
    assert "pass@64,all" in results["results"]["gsm8k_passk"]
    assert results["configs"]["gsm8k_passk"]["metadata"]["num_samples"] == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples=0: need a whole number of at least 1"),
        ({"num_samples": -4}, "num_samples=-4: need"),
        ({"num_samples": 2.5}, "num_samples=2.5: need"),
        ({"num_samples": "many"}, "num_samples='many': need"),
        ({"num_samples": True}, "num_samples=True: need"),
        ({"num_sample": 4}, "num_sample=...: unknown option, did you mean num_samples"),
        ({"datafile": "x"}, "did you mean data_file"),
        ({"data": "x"}, "data=...: unknown option, did you mean data_file"),
        ({"repeats": 16}, "repeats=...: unknown option, did you mean num_samples"),
        ({"samples": 16}, "did you mean num_samples"),
        ({"n": 16}, "n=...: unknown option, did you mean num_samples"),
        ({"aggregate": "min"}, "did you mean aggregation"),
        ({"template": "off"}, "did you mean chat_template"),
        ({"reward_model": "x"}, "did you mean reward?"),
        ({"identical": True}, "did you mean allow_identical_samples"),
        ({"chat_template": "on"}, "chat_template='on': accepted are auto"),
        ({"allow_identical_samples": 1}, "accepted are true and false"),
        ({"data_file": "/nowhere/x.jsonl"}, "data_file=/nowhere/x.jsonl: cannot be read"),
    ],
)
def test_wrong_options(gsm8k: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        evaluate(ScriptedLM(_gsm8k_script), "gsm8k_passk", {"data_file": gsm8k} | options)
    assert message in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, SystemExit)
    assert caught.value.code == 2


@pytest.mark.parametrize("task", ["gsm8k_passk", "gsm8k_maj", "math500_passk", "math500_maj"])
def test_index_entry_is_completed_from_the_definition(
    task: str, gsm8k: str, math500: str, tmp_path: Path
) -> None:
    """integrations/lm_eval_index has only name and class; the rest comes from the package."""
    index = Path(__file__).parents[2] / "integrations" / "lm_eval_index" / "thinkfast"
    metadata = {"num_samples": 2, "data_file": gsm8k if "gsm8k" in task else math500}
    configs = []
    for folder in (index, task_path()):
        manager = TaskManager(
            include_path=str(folder), include_defaults=False, metadata=dict(metadata)
        )
        loaded = manager.load([task])["tasks"][task]
        config = loaded.dump_config()
        config["metadata"].pop("config_source")
        configs.append(json.loads(json.dumps(config, default=repr)))
    assert configs[0] == configs[1]
    assert configs[0]["metadata"]["version"] == 1.1


def test_hub_data_set_is_asked_for_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(path: str, name: str | None = None, **_: Any) -> dict[str, Any]:
        asked.append((path, name))
        rows = GSM8K_ROWS if "gsm8k" in path else MATH500_ROWS
        return {"test": datasets.Dataset.from_list(rows)}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    manager = TaskManager(include_path=str(task_path()), include_defaults=False)
    tasks = manager.load(["gsm8k_passk", "math500_passk"])["tasks"]
    assert asked == [("openai/gsm8k", "main"), ("HuggingFaceH4/MATH-500", None)]
    assert [len(task.eval_docs) for task in tasks.values()] == [3, 2]


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(path: str, name: str | None = None, **_: Any) -> None:
        raise ConnectionError(f"Couldn't reach '{path}' on the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError, match=r"on the Hub\); .*--metadata data_file=FILE\.jsonl$"):
        evaluate(ScriptedLM(_gsm8k_script), "gsm8k_passk", {"num_samples": 2})


def test_two_tasks_in_one_run(gsm8k: str, math500: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both tasks share one submission and keep their own numbers of samples and metrics."""
    import datasets

    rows = {"openai/gsm8k": GSM8K_ROWS, "HuggingFaceH4/MATH-500": MATH500_ROWS}
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda path, name=None: {"test": datasets.Dataset.from_list(rows[path])},
    )
    manager = TaskManager(
        include_path=str(task_path()), include_defaults=False, metadata={"num_samples": 2}
    )
    lm = ScriptedLM(lambda prompt, j: f"{j}: \\boxed{{5}}")
    results = lm_eval.simple_evaluate(
        lm, tasks=["gsm8k_passk", "math500_passk"], task_manager=manager
    )
    assert results is not None
    assert len(lm.calls) == 1
    assert len(lm.calls[0]) == 10
    assert results["results"]["gsm8k_passk"]["pass@2,all"] == pytest.approx(1 / 3)
    assert results["results"]["math500_passk"]["pass@2,all"] == 0.0


# -- votes and rewards ----------------------------------------------------------------------------


class ScriptedReward:
    """Rates a text by the number after "score"; one without it has no steps, so no score."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.is_closed = False

    def score_texts(self, samples: list[tuple[str, str]]) -> list[Scored]:
        self.asked += samples
        found = []
        for _, text in samples:
            steps = [float(word) for word in text.partition("score")[2].split()]
            steps = [0.99] if text == "no idea" else steps
            found.append(Scored(steps, 5, None if steps else "empty"))
        return found

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def reward(monkeypatch: pytest.MonkeyPatch) -> ScriptedReward:
    scripted = ScriptedReward()
    monkeypatch.setattr("lm_eval_tasks.rewards.reward.get_reward", lambda spec: scripted)
    return scripted


SPEC = "some/prm,protocol=math-shepherd"
#: Right answers, wrong ones that agree, one without an answer, one without a score.
TEXTS = [
    "\\boxed{GOLD} score 0.2 0.9",
    "\\boxed{1} score 0.3 0.4",
    "\\boxed{1} score 0.8 0.35",
    "\\boxed{2} score 0.5 0.1",
    "no idea",
    "\\boxed{GOLD}",
]


def _voting_script(prompt: str, j: int) -> SampledText:
    i = _problem(prompt)
    text = TEXTS[(j + i) % 6].replace("GOLD", GOLD[i] if i < 2 else "6")
    return SampledText(text, 10 + j, "length" if j == 5 else "stop")


def test_maj(gsm8k: str) -> None:
    lm = ScriptedLM(_voting_script)
    results = evaluate(lm, "gsm8k_maj", {"num_samples": 6, "data_file": gsm8k})
    found = results["results"]["gsm8k_maj"]
    assert found["maj@1,all"] == pytest.approx(2 / 9)
    assert found["pass@1,all"] == pytest.approx(2 / 9)
    assert found["maj@6,all"] == pytest.approx((0.5 + 0.5 + 0) / 3), "2 right against 2 wrong: tie"
    assert "maj@6_stderr,all" in found
    assert not any(name.startswith(("bon", "weighted")) for name in found)


def test_wbon(gsm8k: str, reward: ScriptedReward) -> None:
    options = {"num_samples": 6, "data_file": gsm8k, "reward": SPEC}
    results = evaluate(ScriptedLM(_voting_script), "gsm8k_wbon", options)
    found = results["results"]["gsm8k_wbon"]
    assert found["bon@6,all"] == pytest.approx(2 / 3), "the best rated has no answer, then 0.9"
    assert found["weighted_bon@6,all"] == pytest.approx(2 / 3), "0.9 against 0.75"
    assert found["weighted_bon@1,all"] == pytest.approx(1 / 9), "no score, no vote"
    metadata = results["configs"]["gsm8k_wbon"]["metadata"]
    assert (metadata["reward"], metadata["aggregation"]) == (SPEC, "last")
    assert [question for question, _ in reward.asked[::6]] == [r["question"] for r in GSM8K_ROWS]
    assert reward.is_closed
    json.dumps(results["samples"])
    first = evaluate(ScriptedLM(_voting_script), "gsm8k_wbon", options | {"aggregation": "min"})[
        "results"
    ]["gsm8k_wbon"]
    assert first["weighted_bon@6,all"] == 0.0, "0.2 against 0.3 + 0.35"
    assert (
        "bon@6,all"
        in evaluate(ScriptedLM(_voting_script), "gsm8k_bon", options)["results"]["gsm8k_bon"]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "gsm8k_wbon needs a process reward model: --metadata reward=MODEL"),
        ({"reward": "some/prm"}, "say how it is read with protocol="),
        ({"reward": SPEC, "aggregation": "max"}, "aggregation='max': accepted are min, prod"),
    ],
)
def test_reward_options_are_checked_before_sampling(
    gsm8k: str, options: dict[str, Any], message: str
) -> None:
    lm = ScriptedLM(_voting_script)
    with pytest.raises(InputError) as caught:
        evaluate(lm, "gsm8k_wbon", {"num_samples": 2, "data_file": gsm8k} | options)
    assert message in str(caught.value)
    assert lm.calls == []


def test_store_gives_the_same_numbers(gsm8k: str, reward: ScriptedReward, tmp_path: Path) -> None:
    """The same samples in a run folder, scored by thinkfast-eval's code."""
    options = {"num_samples": 32, "data_file": gsm8k, "reward": SPEC}

    def script(prompt: str, j: int) -> SampledText:
        chance = random.Random(f"{_problem(prompt)}/{j}")
        answer = chance.choice([GOLD[_problem(prompt)], "1", "2", "3 eggs", "3", "four"])
        text = f"{j}: \\boxed{{{answer}}} score {chance.random():.9f}"
        return SampledText(text if chance.random() < 0.9 else f"nothing {'x' * j}", 9, "stop")

    results = evaluate(ScriptedLM(script), "gsm8k_wbon", options)["results"]["gsm8k_wbon"]
    folder = write_run(
        tmp_path / "run",
        {f"gsm8k/{i}": gold for i, gold in enumerate(GOLD)},
        {
            f"gsm8k/{i}": [script(row["question"], j) for j in range(32)]
            for i, row in enumerate(GSM8K_ROWS)
        },
    )
    write_scores(folder, "scripted", lambda text: reward.score_texts([("", text)])[0].step_scores)
    score_run(folder)
    stored = evaluate_run(folder, reward="scripted", aggregation="last")
    shared = [name for name in results if "@" in name and "stderr" not in name]
    assert len(shared) == 4 * 6
    for name in shared:
        key = name.removesuffix(",all")
        label = "[prm=scripted,last]" if "bon" in key else ""
        mean = stored.metrics[key + label]["mean"]
        assert results[name] == pytest.approx(mean, abs=1e-12), name
        stderr = results[name.replace(",all", "_stderr,all")]
        assert stored.metrics[key + label]["stderr"] == pytest.approx(stderr)
    assert results["no_answer,all"] == pytest.approx(stored.no_answer)


def test_all_kinds_draw_the_same_samples(gsm8k: str) -> None:
    """Problems have one name in all of a benchmark's tasks, and the seeds follow from it."""
    names = []
    for task in ("gsm8k_passk", "gsm8k_maj"):
        lm = ScriptedLM(_voting_script)
        evaluate(lm, task, {"num_samples": 2, "data_file": gsm8k})
        names.append([request.problem for request in lm.calls[0]])
    assert names[0] == names[1] == [f"gsm8k/{i}" for i in range(3) for _ in range(2)]


def test_gsm8k_500_is_the_first_500_rows(gsm8k: str, tmp_path: Path) -> None:
    rows = [{"question": f"What is {i}?", "answer": f"#### {i}"} for i in range(502)]
    path = str(write_jsonl(tmp_path / "many.jsonl", rows))
    lm = ScriptedLM(lambda prompt, j: f"{j} #### {j}")
    results = evaluate(lm, "gsm8k_500_maj", {"num_samples": 2, "data_file": path})
    found = results["results"]["gsm8k_500_maj"]
    assert found["pass@2,all"] == pytest.approx(2 / 500)
    assert lm.calls[0][-1].problem == "gsm8k/499"
    with pytest.raises(InputError, match="first 500 rows of the test set and the data has 3"):
        evaluate(lm, "gsm8k_500_passk", {"num_samples": 2, "data_file": gsm8k})


def test_group_of_the_paper(
    math500: str, reward: ScriptedReward, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    many = [{"question": f"What is {i}?", "answer": f"#### {i}"} for i in range(500)]
    rows = {"openai/gsm8k": many, "HuggingFaceH4/MATH-500": MATH500_ROWS}
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda path, name=None: {"test": datasets.Dataset.from_list(rows[path])},
    )
    lm = ScriptedLM(lambda prompt, j: f"{j}: \\boxed{{1}} score 0.5")
    results = evaluate(lm, "thinkfast", {"num_samples": 2, "reward": SPEC}, limit=2)
    assert set(results["results"]) >= {"math500_wbon", "gsm8k_500_wbon"}
    assert results["results"]["gsm8k_500_wbon"]["weighted_bon@2,all"] == 0.5
    assert len(lm.calls[0]) == 8
