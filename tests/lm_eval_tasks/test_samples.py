"""Sampled texts and their seeds."""

import copy
import json
import pickle

from lm_eval_tasks.samples import SEED_FIELDS, SampledText, run_key, sample_seed


def test_sampled_text_is_a_string_that_keeps_its_facts() -> None:
    text = SampledText("a \\boxed{1}", 7, "length")
    assert text == "a \\boxed{1}"
    assert json.dumps(text) == json.dumps(str(text))
    for copied in (pickle.loads(pickle.dumps(text)), copy.deepcopy(text)):
        assert copied == text
        assert (copied.num_tokens, copied.finish_reason) == (7, "length")
    assert text.is_truncated
    assert not SampledText("", 1, "stop").is_truncated


def test_sample_seed_is_reproducible_and_distinct() -> None:
    seeds = {
        sample_seed(run, problem, index)
        for run in (0, 1, 1234)
        for problem in ("t/1", "t/11", "u/1")
        for index in range(200)
    }
    assert len(seeds) == 3 * 3 * 200
    assert all(0 <= seed < 2**63 for seed in seeds)
    # Pinned: another value would silently change every seeded run.
    assert sample_seed(1234, "gsm8k_passk/0", 0) == 6983572907145955680


def test_runs_with_one_run_seed_share_no_seeds() -> None:
    config = {
        "model_id": "files:a",
        "temperature": 0.7,
        "top_p": 1.0,
        "max_tokens": 128,
        "regime": "saturated",
        "seed_fields": list(SEED_FIELDS),
    }
    others = {
        "model_id": "files:b",
        "temperature": 0.8,
        "top_p": 0.9,
        "max_tokens": 64,
        "regime": "latency",
    }
    assert others.keys() == set(SEED_FIELDS)
    runs = [config, *(config | {name: value} for name, value in others.items())]
    seeds = {sample_seed(1234, "t/1", j, run_key(run)) for run in runs for j in range(200)}
    assert len(seeds) == len(runs) * 200
    # A file that was read again, and lm-eval's side, which has tuples and no other fields.
    assert run_key(json.loads(json.dumps(config))) == run_key(config | {"engine": {}})
    # Pinned, and runs of earlier versions go on with what they began with.
    assert sample_seed(1234, "gsm8k/0", 0, run_key(config)) == 7594656415927850872
    del config["seed_fields"]
    assert sample_seed(1234, "gsm8k/0", 0, run_key(config)) == sample_seed(1234, "gsm8k/0", 0)
